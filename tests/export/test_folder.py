"""The folder of an export appears whole or not at all; what the pack holds is proven on the way."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from flashpack.errors import FlashpackError, FormatError, IntegrityError, OutputError, UsageError
from flashpack.export import export
from flashpack.export.content import Content
from flashpack.export.folder import NOTE
from flashpack.export.tensors import Tensors
from flashpack.formats import Pack
from flashpack.formats.encodings import decode
from flashpack.formats.header import TensorSpec
from tests.conftest import PackOf, contents

PackCopy = Callable[..., Path]


@pytest.fixture
def pack(pack_of: PackOf) -> Path:
    return pack_of("qwen3_moe", "source", "source")


def damage(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "offset", "where"),
    [
        ("experts/layer-0002.safetensors", 16384 * 5 + 5, "layer 2, expert 2: is damaged"),
        ("dense-00001.safetensors", 16384 + 5, r"tensor \S+: is damaged"),
        ("tokenizer.json", 5, "is damaged"),
    ],
)
def test_a_damaged_pack_is_not_exported(
    file: str, offset: int, where: str, pack_copy: PackCopy, tmp_path: Path
) -> None:
    pack = pack_copy("qwen3_moe", experts="source", dense="source")
    damage(pack / file, offset)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(IntegrityError, match=where):
        export(pack, tmp_path / "out", "hf")
    assert sorted(tmp_path.iterdir()) == before


def test_an_export_is_replaced_only_if_asked_and_by_a_whole_one(
    pack: Path, pack_copy: PackCopy, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(pack, out, "hf")
    first = contents(out)
    with pytest.raises(OutputError, match="holds an export; use --overwrite"):
        export(pack, out, "hf")
    damaged = pack_copy("qwen3_moe", experts="source", dense="source")
    damage(damaged / "experts/layer-0002.safetensors", 16384 + 5)
    with pytest.raises(IntegrityError):
        export(damaged, out, "hf", overwrite=True)
    assert contents(out) == first
    export(pack, out, "hf", shard_size=100_000, overwrite=True)
    assert contents(out) != first
    export(pack, out, "hf", overwrite=True)
    assert contents(out) == first
    assert {p.name for p in tmp_path.iterdir()} == {"out", damaged.name}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_stays(overwrite: bool, pack: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("no")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="--overwrite replaces exports only" if overwrite else "is not empty"):
        export(pack, tmp_path / "out", "hf", overwrite=overwrite)
    (tmp_path / "new.part").mkdir()
    with pytest.raises(OutputError, match="is in the way"):
        export(pack, tmp_path / "new", "hf", overwrite=overwrite)
    with pytest.raises(OutputError, match="exists and is not a folder"):
        export(pack, tmp_path / "out" / "thesis.txt", "hf", overwrite=overwrite)
    assert contents(tmp_path) == before


def test_what_a_kill_left_is_taken_away(pack: Path, tmp_path: Path) -> None:
    (tmp_path / "out.part" / "deep").mkdir(parents=True)
    (tmp_path / "out.part" / NOTE).write_text('{\n "unfinished": true\n}\n')
    (tmp_path / "out.part" / "deep" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "out").mkdir()  # an empty one is as good as none
    export(pack, tmp_path / "out", "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "deep").exists()
    assert json.loads((tmp_path / "out" / NOTE).read_text())["pack"] == Pack(pack).identity


def test_an_interruption_leaves_nothing(pack: Path, tmp_path: Path) -> None:
    read = 0

    def interrupt(count: int) -> None:
        nonlocal read
        read += count
        if read > 300_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(pack, tmp_path / "out", "hf", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_the_first_byte(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OutputError, match=r"out: \S+ MB needed, 1.00 MB free"):
        export(pack, tmp_path / "deep" / "out", "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to": "gguf"}, UsageError, "--to gguf: choose from hf, mlx, flash-moe"),
        ({"weights": "int3"}, UsageError, "--weights int3: --to hf has bf16, compressed"),
        ({"shard_size": 0}, UsageError, "--shard-size 0"),
        ({"out": "inside"}, UsageError, "outside the pack"),
    ],
)
def test_what_cannot_be_asked_for(
    options: dict[str, Any], error: type[FlashpackError], message: str, pack: Path, tmp_path: Path
) -> None:
    asked = {"out": tmp_path / "out", "to": "hf"} | options
    if asked["out"] == "inside":
        asked["out"] = pack / "experts" / "out"
    with pytest.raises(error, match=re.escape(message)):
        export(pack, **asked)
    assert list(tmp_path.iterdir()) == []


def test_progress_ends_at_what_was_announced(pack: Path, tmp_path: Path) -> None:
    announced, seen = [], []
    export(pack, tmp_path / "out", "hf", on_start=announced.append, progress=seen.append)
    assert announced == [sum(seen)]
    assert len(seen) > 24 + 3  # experts, shards, tensors


def test_pieces_are_the_whole(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every encoding that dense matrices have here, cut at rows that do not end a block of scales."""
    monkeypatch.setattr("flashpack.export.content.PIECE_VALUES", 64 * 7)
    for name, experts, dense in (("qwen3_moe-fp8block", "source", "source"), ("qwen3_moe", "dq2", "q6")):
        content = Content(Pack(pack_of(name, experts, dense)), lambda count: None)
        for tensor in map(content.tensor, content.dense):
            if tensor.encoding.dtype != "I64":
                whole = decode(tensor.encoding, tensor.parts, tensor.shape)
                assert np.array_equal(np.concatenate([p.reshape(-1) for p in tensor.pieces()]), whole.reshape(-1))
        expert = next(content.experts(content.layers[0]))
        for matrix in expert.matrices.values():
            whole = decode(matrix.encoding, matrix.parts, matrix.shape)
            assert np.array_equal(np.concatenate(list(matrix.pieces())), whole)


def test_files_hold_what_was_written_in_any_order(tmp_path: Path) -> None:
    specs = [TensorSpec("bytes", "U8", (3,)), TensorSpec("empty", "F32", (0, 4)), TensorSpec("wide", "F32", (2, 2))]
    tensors = Tensors([*specs, TensorSpec("last", "I64", ())], 20, "pt")
    tensors.open(tmp_path)
    tensors.write("wide", np.array([3, 4], dtype="<f4"), 8)
    tensors.write("last", np.array(7, dtype="<i8"))
    tensors.write("bytes", np.array([1, 2, 3], dtype=np.uint8))
    with pytest.raises(FormatError, match="8 bytes have not been written"):
        tensors.finish()
    tensors.write("wide", np.array([1, 2], dtype="<f4"))
    with pytest.raises(FormatError, match="more than its 16 bytes"):
        tensors.write("wide", np.array([1, 2], dtype="<f4"), 12)
    with pytest.raises(FormatError, match="written twice"):
        tensors.write("wide", np.array([1, 2], dtype="<f4"))
    tensors.finish()
    found = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
    assert found == {"bytes": [1, 2, 3], "empty": [], "wide": [[1, 2], [3, 4]], "last": 7}
    assert sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) == tensors.nbytes
    with pytest.raises(FormatError, match="bytes"):
        Tensors([*specs, specs[0]], 2, "pt")
