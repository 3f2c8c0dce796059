"""flashpack export as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

from flashpack.formats import Pack
from tests.cli.test_cli import in_process
from tests.conftest import PackOf


def test_what_is_written_and_lost_is_said(pack_of: PackOf, tmp_path: Path) -> None:
    pack = pack_of("qwen3_moe", "q4", "source")
    done = in_process("export", pack, tmp_path / "out", "--to", "hf")
    assert done.returncode == 0, done.stderr
    first, loss = done.stdout.splitlines()
    sizes = [p.stat().st_size for p in (tmp_path / "out").iterdir()]
    assert first == f"{tmp_path / 'out'}: {sum(sizes) / 1000:.1f} kB in {len(sizes)} files, for hf"
    assert loss.startswith("  lost: experts, 4-bit g64: decoded, and ")
    assert loss.endswith(" of 294,912 values rounded to bfloat16")
    assert done.stderr == ""
    again = in_process("export", pack, tmp_path / "out", "--to", "hf")
    assert again.returncode == 6
    assert again.stderr.count("\n") == 1
    assert "holds an export; use --overwrite to replace it" in again.stderr
    options = ("--overwrite", "--json", "--shard-size", "100kB")
    result = json.loads(in_process("export", pack, tmp_path / "out", "--to", "hf", *options).stdout)
    assert result["identity"] == Pack(pack).identity
    assert len(result["files"]) > 10
    assert result["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert result["losses"] == [loss.removeprefix("  lost: ")]


def test_a_lossless_export_says_so(pack_of: PackOf, tmp_path: Path) -> None:
    pack = pack_of("qwen3_moe-ct_int4", "source", "source")
    done = in_process("export", pack, tmp_path / "out", "--to", "hf", "--weights", "compressed")
    assert done.stdout.splitlines()[1:] == ["  nothing was lost"]


def test_mistakes_are_refused_in_a_line(pack_of: PackOf, tmp_path: Path) -> None:
    pack = pack_of("qwen3_moe", "q4", "source")
    for arguments, code, message in (
        ((pack, "--to", "onnx"), 2, "--to onnx: choose from hf, mlx, flash-moe"),
        ((pack, "--to", "hf", "--weights", "compressed"), 3, "use --weights bf16"),
        ((pack, "--to", "hf", "--shard-size", "big"), 2, "is not a size"),
        ((tmp_path / "none", "--to", "hf"), 4, "no such folder"),
    ):
        done = in_process("export", arguments[0], tmp_path / "out", *arguments[1:])
        assert done.returncode == code
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
