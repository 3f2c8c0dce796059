"""recode: another codec, the same content, no source; and compressed packs everywhere a plain one works."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import flashpack
from flashpack.converter.recode import recode
from flashpack.errors import IntegrityError, OutputError, UsageError
from flashpack.formats import Pack, verify
from tests import commands
from tests.conftest import CHECKPOINTS, ROOT, contents
from tests.formats.test_repair import damage_record, damage_tensors
from tests.formats.test_verify import flip


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A plain pack whose records take several pages, and the same compressed."""
    folder = tmp_path_factory.mktemp("recode")
    flashpack.convert(CHECKPOINTS / "mixtral", folder / "raw", experts="source", dense="source")
    recode(folder / "raw", folder / "zstd", "zstd")
    return folder / "raw", folder / "zstd"


def test_there_and_back_gives_the_same_bytes(packs: tuple[Path, Path], tmp_path: Path) -> None:
    raw, packed = packs
    done = recode(packed, tmp_path / "back", "raw")
    assert contents(tmp_path / "back") == contents(raw)
    assert done.identity == Pack(raw).identity
    assert done.before < done.after
    assert verify(packed) == []


def test_converting_to_a_codec_and_recoding_to_it_give_the_same_bytes(packs: tuple[Path, Path], tmp_path: Path) -> None:
    flashpack.convert(CHECKPOINTS / "mixtral", tmp_path / "direct", experts="source", dense="source", codec="zstd")
    assert contents(tmp_path / "direct") == contents(packs[1])
    assert Pack(packs[1]).manifest.required_features == ["zstd"]


@pytest.mark.parametrize("memory", ["smallest", None])
@pytest.mark.parametrize("check", ["first", "always", "never"])
def test_a_compressed_pack_runs_with_the_same_logits(packs: tuple[Path, Path], memory: str | None, check: str) -> None:
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(3))
    logits = []
    for pack in packs:
        model = flashpack.load(pack, memory=memory, check=check)
        with torch.inference_mode():
            logits += [model(ids).logits.numpy() for _ in range(2)]
    assert all(np.array_equal(logits[0], other) for other in logits)


def test_damage_in_a_compressed_record_is_found_and_named(packs: tuple[Path, Path], tmp_path: Path) -> None:
    recode(packs[0], tmp_path / "pack", "zstd")
    damage_record(tmp_path / "pack")
    assert [(f.code, f.layer, f.expert) for f in verify(tmp_path / "pack")] == [("record-digest", 1, 3)]


@pytest.mark.parametrize("damage", [damage_record, damage_tensors, lambda pack: flip(pack / "config.json", 3)])
def test_a_damaged_pack_is_not_recoded(
    packs: tuple[Path, Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    recode(packs[0], tmp_path / "pack", "raw")
    damage(tmp_path / "pack")
    with pytest.raises(IntegrityError, match="damaged"):
        recode(tmp_path / "pack", tmp_path / "out", "zstd")
    assert not (tmp_path / "out" / "flashpack.json").exists()


KILLED = """
import importlib, os, signal, sys
module = importlib.import_module("flashpack.converter.recode")
count = 0
real = module.ShardWriter.write
def write(self, expert, record):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, expert, record)
module.ShardWriter.write = write
module.recode(sys.argv[1], sys.argv[2], "zstd", workers=1)
"""


@pytest.mark.parametrize("moment", [1, 5, 8])
def test_a_killed_recode_continues(packs: tuple[Path, Path], tmp_path: Path, moment: int) -> None:
    out = tmp_path / "out"
    script = [commands.python(), "-c", KILLED, str(packs[0]), str(out), str(moment)]
    assert subprocess.run(script, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    finished = {p: p.stat().st_mtime_ns for p in (out / "experts").glob("*.safetensors")}
    with pytest.raises(OutputError, match="codec zstd -> raw"):
        recode(packs[0], out, "raw")
    done = recode(packs[0], out, "zstd")
    assert done.resumed_files >= len(finished) - 1
    assert contents(out) == contents(packs[1])


def test_an_unknown_codec_and_a_full_folder_are_refused(packs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose from raw, zstd"):
        recode(packs[0], tmp_path / "x", "lz4")
    (tmp_path / "mine").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        recode(packs[0], tmp_path, "zstd")
    assert os.listdir(tmp_path) == ["mine"]
