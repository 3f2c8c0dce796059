"""``flashpack eval``: what it prints, how it ends, and that it leaves nothing behind."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import commands
from tests.cli.test_cli import flashpack, in_process
from tests.conftest import CHECKPOINTS, ROOT, TRAINED, PackOf

DATA = ROOT / "tests" / "data"
KEYS = {"windows", "length", "kld", "error", "p99", "top1", "perplexity", "reference_perplexity"}


@pytest.fixture
def pack(pack_of: PackOf) -> Path:
    return pack_of("trained", "q4", "q8")


@pytest.fixture
def few_calls(tmp_path: Path) -> Path:
    path = tmp_path / "calls.jsonl"
    path.write_text("".join((DATA / "toolcalls.jsonl").read_text().splitlines(keepends=True)[:3]))
    return path


def test_a_checkpoint_as_the_reference_gives_what_its_pack_gives(
    pack: Path, pack_of: PackOf, tmp_path: Path, few_calls: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    common = ("--text", DATA / "docs.txt", "--windows", "4", "--scratch", scratch)
    done = flashpack("eval", pack, "--against", TRAINED, *common, "--tools", few_calls)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"reference: \S+ MB to write for the time of this comparison\n", done.stderr)
    assert list(scratch.iterdir()) == []
    other = flashpack("eval", pack, "--against", pack_of("trained", "source", "source"), *common, "--json")
    assert other.stderr == ""
    data = json.loads(other.stdout)
    assert set(data) == {"divergence", "tools"}
    assert data["tools"] is None
    found = data["divergence"]
    assert set(found) == KEYS
    assert 0.01 < found["kld"] < 0.03
    lines = done.stdout.splitlines()
    assert lines[0] == "4 windows of 512 tokens"
    assert f" {found['kld']:.4g} +- {found['error']:.2g} " in lines[1]
    assert f"{found['top1']:.2%}" in lines[2]
    assert lines[-1] == "  tool calls       3: 3 valid JSON, 3 exact"


def test_a_limit_for_scripts(pack: Path) -> None:
    options = ("--against", pack, "--text", DATA / "docs.txt", "--windows", "2", "--length", "64")
    assert in_process("eval", pack, *options, "--max-kld", "0").returncode == 0
    done = in_process("eval", pack, *options, "--max-kld", "0.001", "--experts-per-token", "2")
    assert done.returncode == 1
    assert "2 windows of 64 tokens" in done.stdout
    assert re.fullmatch(r"flashpack: KL divergence 0\.\d+ is more than --max-kld 0\.001\n", done.stderr)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--against", CHECKPOINTS / "qwen3_moe"), 2, "different vocabularies"),
        (("--against", ROOT / "absent"), 3, "absent"),
        (("--against", TRAINED, "--ignore", "timeout"), 2, "--ignore timeout"),
        (("--against", TRAINED, "--scratch", ROOT / "absent"), 2, "not a folder"),
        (("--against", TRAINED, "--tools", DATA / "docs.txt"), 2, "line 1: not JSON"),
        (("--against", TRAINED, "--memory", "1MB"), 7, "needs at least"),
    ],
)
def test_refusals_are_one_line(
    pack: Path, tmp_path: Path, options: tuple[object, ...], code: int, message: str
) -> None:
    done = in_process("eval", pack, "--text", DATA / "docs.txt", "--windows", "1", *options, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    line = done.stderr.splitlines()[-1]
    assert line.startswith("flashpack: ")
    assert message in line
    assert "Traceback" not in done.stderr


def test_a_text_that_is_too_short_is_refused_before_anything_is_converted(pack: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("A short text.\n")
    done = flashpack("eval", pack, "--against", TRAINED, "--text", text)
    assert done.returncode == 2
    assert re.fullmatch(r"flashpack: --text \S+: \d+ tokens, and 512 are needed\n", done.stderr)


def test_not_a_pack(tmp_path: Path) -> None:
    done = flashpack("eval", TRAINED, "--against", TRAINED, "--text", DATA / "docs.txt")
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1


def test_an_interruption_leaves_nothing(pack: Path, tmp_path: Path) -> None:
    command = [
        commands.flashpack(), "eval", pack, "--against", TRAINED, "--text", DATA / "docs.txt",
        "--windows", "200", "--scratch", tmp_path,
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("flashpack-eval-*/reference/flashpack.json")) and time.monotonic() < until:
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "flashpack: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_without_a_reference_the_perplexity_is_the_same(pack: Path, few_calls: Path) -> None:
    options = ("--text", DATA / "docs.txt", "--windows", "2", "--length", "64")
    both = json.loads(in_process("eval", pack, "--against", pack, *options, "--json").stdout)["divergence"]
    alone = in_process("eval", pack, *options, "--json")
    assert alone.returncode == 0, alone.stderr
    data = json.loads(alone.stdout)
    assert data == {"perplexity": {"windows": 2, "length": 64, "perplexity": both["perplexity"]}, "tools": None}
    shown = in_process("eval", pack, *options, "--tools", few_calls).stdout.splitlines()
    assert shown[0] == "2 windows of 64 tokens"
    assert shown[1].split() == ["perplexity", f"{both['perplexity']:.4f}"]
    assert "3 valid JSON" in shown[2]
    stepwise = in_process("eval", pack, *options, "--experts-per-token", 1, "--json")
    assert json.loads(stepwise.stdout)["perplexity"]["perplexity"] > 1.05 * both["perplexity"]
    refused = in_process("eval", pack, *options, "--max-kld", "0.1")
    assert (refused.returncode, "name one with --against" in refused.stderr) == (2, True)
