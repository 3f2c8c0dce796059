"""The commands as a user runs them: stdout, stderr, exit codes; in processes of their own where it matters."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashpack.cli import app
from flashpack.formats import Pack
from tests import commands
from tests.conftest import ROOT, TRAINED, PackOf

COLD = (sys.executable, "-m", "flashpack")
"""The command as it is installed: Python, its imports and all."""


def flashpack(
    *arguments: object, cwd: Path = ROOT, stdin: str = "", program: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in which everything is imported already if it is not ``COLD``."""
    command = [*(program or [commands.flashpack()]), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True, input=stdin)


def in_process(*arguments: object, cwd: Path = ROOT, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The same in this process, which has imported torch already."""
    command = list(map(str, arguments))
    with contextlib.chdir(cwd):
        done = CliRunner().invoke(app, command, input=stdin, prog_name="flashpack")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(command, done.exit_code, done.stdout, done.stderr)


def test_convert_verify_inspect_run(tmp_path: Path) -> None:
    done = flashpack("convert", TRAINED, cwd=tmp_path, program=COLD)
    assert done.returncode == 0, done.stderr
    pack = tmp_path / "tiny-qwen3.5-moe.flashpack"
    identity = Pack(pack).identity
    assert f"identity {identity}" in done.stdout
    assert "quality report tiny-qwen3.5-moe.flashpack/quality.html" in done.stdout
    assert "4.50 bits per weight" in done.stdout
    assert "experts q4, dense q8" in done.stderr
    assert "whole" in flashpack("verify", pack).stdout
    shown = flashpack("inspect", pack)
    assert identity in shown.stdout
    assert "gate.scales" in shown.stdout
    asked = ("--prompt", "What is 922 plus 291?", "--memory", "smallest")
    answer = flashpack("run", pack, *asked, program=COLD)
    assert answer.returncode == 0, answer.stderr
    call = answer.stdout.split("<tool_call>")[1].split("</tool_call>")[0]
    assert json.loads(call) == {"name": "calculator", "arguments": {"expression": "922 + 291"}}
    assert "<|im_end|>" not in answer.stdout
    assert "tokens" in answer.stderr
    assert "hits" in answer.stderr
    assert answer.stderr.count("\n") == 1


def test_json_for_scripts(pack_of: PackOf) -> None:
    pack = pack_of("trained")
    assert json.loads(in_process("inspect", pack, "--json").stdout)["identity"] == Pack(pack).identity
    assert json.loads(in_process("verify", pack, "--json").stdout)["findings"] == []
    options = ("--prompt", "-", "--raw", "--max-tokens", "5", "--json")
    done = in_process("run", pack, *options, stdin="The os module")
    result = json.loads(done.stdout)
    assert result["generated_tokens"] == 5
    assert result["finish"] == "length"
    assert set(result["experts"]["layers"]) == {str(i) for i in range(6)}
    assert result["experts"]["total"]["misses"] > 0
    assert done.stderr == ""


def test_fewer_experts_per_token_are_labelled(pack_of: PackOf) -> None:
    options = ("--raw", "-p", "The os module", "--max-tokens", "5")
    done = in_process("run", pack_of("trained"), *options, "--experts-per-token", "1")
    assert done.returncode == 0
    label, statistics = done.stderr.splitlines()
    assert label.endswith("experts per token: the output is not the model's own")
    assert statistics.startswith("[prompt")
    result = json.loads(in_process("run", pack_of("trained"), *options, "--experts-per-token", "1", "--json").stdout)
    assert result["experts_per_token"]["used"] == 1 < result["experts_per_token"]["model"]
    assert result["text"] == done.stdout.removesuffix("\n")
    refused = in_process("run", pack_of("trained"), *options, "--experts-per-token", "99")
    assert refused.returncode == 2
    assert "--experts-per-token 99: from 1 to " in refused.stderr


def test_preferred_experts_are_labelled(pack_of: PackOf) -> None:
    options = ("--raw", "-p", "The os module", "--max-tokens", "5", "--prefer-cached", "0.7")
    done = in_process("run", pack_of("trained"), *options)
    assert done.returncode == 0
    label, statistics = done.stderr.splitlines()
    assert label.endswith("experts in memory preferred, from 0.7 of the weight: the output is not the model's own")
    assert statistics.startswith("[prompt")
    assert json.loads(in_process("run", pack_of("trained"), *options, "--json").stdout)["prefer_cached"] == 0.7
    refused = in_process("run", pack_of("trained"), *options, "--reference")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--prefer-cached: the library decodes with --reference" in refused.stderr


def test_sampling_is_repeatable_by_its_seed(pack_of: PackOf) -> None:
    def text(seed: int) -> str:
        options = ("--temperature", 1.2, "--top-k", 50, "--top-p", 0.95, "--max-tokens", 24, "--seed", seed)
        done = in_process("run", pack_of("trained"), "--raw", "-p", "The", *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(2, 5)}) == 3


def test_damage_gives_exit_code_1_and_names_the_place(pack_copy: Callable[..., Path]) -> None:
    pack = pack_copy("trained")
    path = pack / "experts" / "layer-0003.safetensors"
    data = bytearray(path.read_bytes())
    data[16384 * 3] ^= 4
    path.write_bytes(data)
    done = flashpack("verify", pack)
    assert done.returncode == 1
    assert "experts/layer-0003.safetensors, layer 3, expert 1" in done.stdout
    assert flashpack("verify", pack, "--quick").returncode == 0
    (finding,) = json.loads(flashpack("verify", pack, "--json").stdout)["findings"]
    assert (finding["layer"], finding["expert"], finding["code"]) == (3, 1, "record-digest")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("convert", "no/such/folder"), 3, "no such folder"),
        (("convert", "{trained}", "--experts", "q9"), 2, "choose from"),
        (("convert",), 2, "Missing argument"),
        (("verify", "."), 4, "not a pack"),
        (("inspect", "no/such/folder"), 4, "no such folder"),
        (("run", "{pack}"), 2, "--prompt"),
        (("run", "{pack}", "-p", "x", "--device", "cuda"), 7, "'cuda' has no kernels yet"),
        (("run", "{pack}", "-p", "x", "--memory", "10MB"), 7, "is too small: this pack needs at least"),
        (("run", "{pack}", "-p", "x", "--memory", "much"), 2, "is not a size"),
        (("run", "{pack}", "-p", "x", "--context", "8"), 7, "tokens, the context 8"),
        (("run", "{pack}", "-p", "x", "--context", "1000000"), 2, "the model has 4096 positions"),
        (("run", "{pack}", "-p", "x", "--thinking", "on"), 2, "knows no thinking switch"),
        (("run", "{pack}", "-p", "x", "--thinking", "maybe"), 2, "on or off"),
        (("run", "{pack}", "-p", "", "--raw"), 2, "the prompt is empty"),
        (("run", "{untalkative}", "-p", "x"), 4, "no tokenizer"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    pack_of: PackOf, arguments: tuple[str, ...], code: int, message: str, tmp_path: Path
) -> None:
    names = {
        "trained": TRAINED,
        "pack": pack_of("trained"),
        "untalkative": pack_of("qwen3_moe_dense_first_tied"),
    }
    # The heaviest ends in a process of its own, too: there libraries have their say.
    command = flashpack if "{untalkative}" in arguments else in_process
    done = command(*(a.format(**names) for a in arguments))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    if code != 2:
        assert done.stderr.count("\n") == 1


def test_a_prompt_fills_the_context_but_not_more(pack_of: PackOf) -> None:
    options = ("--raw", "-p", "The os module provides", "--context", "16", "--json")
    result = json.loads(in_process("run", pack_of("trained"), *options).stdout)
    assert result["prompt_tokens"] + result["generated_tokens"] <= 16


def test_help_and_version_are_quick_and_need_no_torch() -> None:
    code = "import sys; sys.argv = ['flashpack', '--help']\nfrom flashpack.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "convert" in done.stdout
    assert flashpack("--version").stdout.startswith("flashpack ")
