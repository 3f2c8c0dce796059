"""A source that fails or changes while it is converted: one line, exit code 3, and what is finished is kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import flashpack
from flashpack.cli import app
from flashpack.converter import folder as source_folder
from flashpack.converter.folder import LocalFolder
from flashpack.errors import SourceError
from flashpack.formats.constants import MANIFEST
from tests.conftest import TRAINED, PackOf
from tests.converter.killing import contents, finished_files
from tests.converter.test_output_folder import at_call

SourceCopy = Callable[[str], Path]
SHARD = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("workers", [1, 4])
def test_a_read_error_stops_all_workers_and_loses_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pack_of: PackOf,
    workers: int,
) -> None:
    out, real, reads, lock = tmp_path / "out", source_folder.pread_into, 0, threading.Lock()

    def pread_into(fd: int, buffer: memoryview, offset: int, what: str) -> None:
        nonlocal reads
        with lock:
            reads += 1
            now = reads
        time.sleep(0.0005)
        if now == 400:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd, buffer, offset, what)

    with monkeypatch.context() as patch:
        patch.setattr(source_folder, "pread_into", pread_into)
        with pytest.raises(SystemExit, match=r"^3$"):
            app(["convert", str(TRAINED), str(out), "--workers", str(workers)])
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(f"flashpack: {TRAINED / 'model-0000'}")
    assert ".safetensors: reading at byte " in errors
    assert errors.endswith(" failed: Input/output error\n")
    assert reads < 600  # of some 750: others stop when they hear of it, which takes longer on busy processors
    kept = finished_files(out)
    assert kept or workers > 1
    assert flashpack.convert(TRAINED, out).resumed_files == len(kept)
    assert kept.items() <= {p: (s.st_ino, s.st_mtime_ns) for p in kept for s in [(out / p).stat()]}.items()
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))


def truncate(source: Path) -> None:
    os.truncate(source / SHARD, 1_000_000)


def replace_by_another(source: Path) -> None:
    data = (source / SHARD).read_bytes()
    (source / "new").write_bytes(data[:-100] + bytes(100))
    (source / "new").rename(source / SHARD)


def change_config(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def remove_shard(source: Path) -> None:
    (source / SHARD).unlink()


def remove_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, rf"{SHARD}: (file ends at byte 1000000, \d+ bytes missing|changed during.*size \d+ -> 1000000)"),
        (replace_by_another, rf"{SHARD}: changed during the conversion: modified \S+ -> \S+; put the original back"),
        (change_config, r"config\.json: changed during the conversion: content changed; put the original back"),
        (remove_shard, rf"{SHARD}: cannot be read: No such file or directory"),
        (remove_tokenizer, r"tokenizer\.json: cannot be read: No such file or directory"),
    ],
)
def test_a_source_that_changes_during_the_conversion_is_not_mixed(
    source_copy: SourceCopy, tmp_path: Path, pack_of: PackOf, change: Callable[[Path], None], message: str
) -> None:
    source, out = source_copy("trained"), tmp_path / "out"
    shutil.copytree(source, tmp_path / "backup")
    with pytest.raises(SourceError, match=message) as caught:
        flashpack.convert(source, out, workers=1, progress=at_call(150, lambda: change(source)))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert not (out / MANIFEST).exists()
    kept = len(finished_files(out))
    assert kept >= 1
    shutil.copytree(tmp_path / "backup", source, dirs_exist_ok=True)
    assert flashpack.convert(source, out).resumed_files == kept
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))


def test_a_config_that_changes_after_the_last_tensor_is_not_mixed_in(
    source_copy: SourceCopy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, real = source_copy("qwen3_moe"), LocalFolder.read

    def read(folder: LocalFolder, name: str) -> bytes:
        if name == "tokenizer.json":  # read once, when the tensors are done
            change_config(source)
        return real(folder, name)

    monkeypatch.setattr(LocalFolder, "read", read)
    with pytest.raises(SourceError, match=r"config\.json: changed during the conversion"):
        flashpack.convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", SHARD])
def test_a_source_file_that_cannot_be_read_is_named(
    source_copy: SourceCopy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = source_copy("trained")
    real_open, real_read = os.open, Path.read_bytes

    def refuse(path: object) -> None:
        if Path(str(path)).name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", lambda path, *a, **k: refuse(path) or real_open(path, *a, **k))
    monkeypatch.setattr(Path, "read_bytes", lambda path: refuse(path) or real_read(path))
    with pytest.raises(SourceError, match=f"{name}: cannot be read: Permission denied"):
        flashpack.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pack_is_no_source(pack_of: PackOf, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="a pack already; convert its checkpoint"):
        flashpack.convert(pack_of("trained"), tmp_path / "out")
