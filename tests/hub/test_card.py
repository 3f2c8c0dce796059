"""``flashpack card``: what hubs and people read of a pack."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import RepoCard

from flashpack.converter.forecast import Dropped
from flashpack.formats import Pack
from flashpack.hub.card import card, checksums
from flashpack.hub.source import BaseModel
from tests.cli.test_cli import in_process
from tests.conftest import TRAINED, PackOf, contents
from tests.hub.conftest import Command

EVALUATION = {
    "divergence": {
        "windows": 24, "length": 512, "kld": 0.0142, "error": 0.001, "p99": 0.114, "top1": 0.935,
        "perplexity": 8.25, "reference_perplexity": 8.125,
    },
    "tools": {"calls": 500, "valid": 500, "exact": 499},
}  # fmt: skip


@pytest.fixture
def pack(pack_of: PackOf) -> Path:
    return pack_of("trained", "q4", "q8")


def metadata(text: str) -> dict[str, Any]:
    """What a hub finds at the beginning, read by huggingface_hub."""
    found: Any = RepoCard(text)
    return dict(found.data.to_dict())


def cells(text: str) -> dict[str, str]:
    """Rows of tables of two or three columns: first cell -> the last one."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[-1] for row in rows}


def test_a_card_has_all_that_is_known(command: Command, pack: Path, tmp_path: Path) -> None:
    before = contents(pack)
    (tmp_path / "docs.json").write_text(json.dumps(EVALUATION))
    options = ("--base-model", "Qwen/Qwen3.5@0123abc", "--license", "apache-2.0", "--eval", tmp_path / "docs.json")
    done = command("card", pack, "org/tiny", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert metadata(done.stdout) == {
        "base_model": "Qwen/Qwen3.5",
        "base_model_relation": "quantized",
        "library_name": "flashpack",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["flashpack", "mixture-of-experts", "qwen3_5_moe_text"],
    }
    found, opened = cells(done.stdout), Pack(pack)
    assert found["base model"] == "[Qwen/Qwen3.5](https://huggingface.co/Qwen/Qwen3.5), revision `0123abc`"
    assert found["model"] == "`Qwen3_5MoeForCausalLM`, 192 experts in 6 layers"
    assert "experts `q4`" in found["recipe"]
    assert found["identity"] == f"`{opened.identity}`"
    assert re.fullmatch(r"\d+\.\d+ [MG]B for the whole process, with a context of 4096 tokens", found["least memory"])
    assert f"flashpack pull org/tiny --expect {opened.identity}\nflashpack run tiny.flashpack --prompt" in done.stdout
    assert "| docs | 24 | 512 | 0.0142 | 0.114 | 0.935 | 8.25 | 8.125 | 500: 500 valid JSON, 499 exact |" in done.stdout
    assert re.search(r"^- gate mean error [\d.]+ %, largest", done.stdout, re.MULTILINE)
    for path in before:
        assert found[f"`{path}`"] == f"`{hashlib.sha256((pack / path).read_bytes()).hexdigest()}`"
    assert contents(pack) == before


def test_what_is_not_known_is_not_claimed(command: Command, pack_of: PackOf) -> None:
    pack = pack_of("trained", "source", "source")
    done = command("card", pack)
    assert done.returncode == 0, done.stderr
    assert set(metadata(done.stdout)) == {"library_name", "pipeline_tag", "tags"}
    assert cells(done.stdout)["base model"] == "not recorded in the pack"
    assert "flashpack pull" not in done.stdout
    assert f"# {pack.name}" in done.stdout
    assert "nothing was rounded" in done.stdout
    assert "KLD" not in done.stdout
    assert "What is not in it" not in done.stdout
    assert "All tensors" not in done.stdout


def test_a_source_tells_license_and_what_was_left_out(command: Command, pack: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in TRAINED.iterdir():
        if path.is_file():
            (source / path.name).symlink_to(path)
    (source / "README.md").unlink()
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# Model\n")
    done = command("card", pack, "--source", source)
    assert done.returncode == 0, done.stderr
    told = metadata(done.stdout)
    assert (told["license"], told["license_name"], told["license_link"]) == ("other", "own", "LICENSE")
    assert "base_model" not in told  # a folder has no name on a hub
    assert "All tensors of the base model are in the pack." in done.stdout
    assert metadata(command("card", pack, "--source", source, "--license", "mit").stdout)["license"] == "mit"
    (source / "README.md").write_text("---\nlicense: [a\n---\n")
    assert "license" not in metadata(command("card", pack, "--source", source).stdout)


def test_texts_of_a_pack_are_no_markup(pack: Path) -> None:
    opened = Pack(pack)
    opened.manifest.recipe["quantizer"] = "`</code><script>|\n# x"
    base = BaseModel("org/model", "a`b|c", {"license": 'x"\nevil: 1'}, [Dropped("vis|ual`.*", 3, 2_000_000)])
    text = card(opened, checksums(opened), "org/x", base, {"<b>|[x](y)": EVALUATION})
    assert set(metadata(text)) == {
        "base_model", "base_model_relation", "library_name", "pipeline_tag", "license", "tags"
    }  # fmt: skip
    found = cells(text)
    assert found["recipe"].endswith("quantizer `</code><script># x`, source\\_format `plain`")
    assert found["`visual.*`"] == "2.00 MB"
    assert "| &lt;b&gt;\\|\\[x\\](y) | 24 |" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--base-model", "nobody"), "--base-model nobody: write ORG/MODEL or ORG/MODEL@REVISION"),
        (("--license", "my own"), "--license my own: a name that hubs know"),
        (("--eval", "absent.json"), "--eval absent.json: cannot be read"),
        (("--eval", TRAINED / "config.json"), "not what 'flashpack eval --against ... --json' prints"),
        (("--eval", TRAINED / "README.md"), "not JSON"),
        (("--source", "absent"), "absent"),
    ],
)
def test_refusals_are_one_line(command: Command, pack: Path, options: tuple[object, ...], message: str) -> None:
    done = command("card", pack, *options)
    assert done.returncode in (2, 3)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_damaged_pack_gets_no_card(pack_copy: Callable[..., Path]) -> None:
    pack = pack_copy("trained")
    with open(pack / "experts" / "layer-0002.safetensors", "r+b") as f:
        f.seek(500_000)
        f.write(b"\xff" * 64)
    done = in_process("card", pack)
    assert (done.returncode, done.stdout) == (1, "")
    assert "layer 2, expert" in done.stderr
    assert "1 finding, there is no card for it; see flashpack repair" in done.stderr
