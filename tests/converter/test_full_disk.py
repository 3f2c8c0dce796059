"""A disk that fills up at any stage: one line, exit code 6, nothing lost, and the same command continues."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import flashpack
from flashpack.cli import app
from flashpack.converter import execute, units
from flashpack.converter.journal import Journal
from flashpack.errors import OutputError
from flashpack.formats import verify
from flashpack.formats.constants import MANIFEST
from tests import commands
from tests.conftest import ROOT, TRAINED, PackOf
from tests.converter.killing import contents, finished_files

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory, 64 MiB; ``resize`` changes it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs Linux and root; the file-size limit stands in for it")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here; the file-size limit stands in for it")
    yield folder
    # A file left open keeps it busy: that is a defect, but the mount must not stay behind.
    busy = subprocess.run(["umount", folder], check=False).returncode
    if busy:
        subprocess.run(["umount", "--lazy", folder], check=True)
    assert not busy, "a file on the disk is still open"


def resize(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)


def fill(disk: Path) -> None:
    """Another program's file takes all that is free."""
    with open(disk / "another program's file", "ab", buffering=0) as f:
        for piece in (2**20, 4096):
            try:
                while f.write(bytes(piece)) == piece:
                    pass
            except OSError:
                pass


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """``command(out)``: exit code and stderr of ``flashpack convert`` of the bundled model, one file at a time."""

    def run(out: Path) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit_:
            app(["convert", str(TRAINED), str(out), "--workers", "1"])
        return int(exit_.value.code or 0), capsys.readouterr().err

    return run


def check_failure(answer: tuple[int, str], out: Path) -> None:
    code, errors = answer
    (line,) = [text for text in errors.splitlines() if text.startswith("flashpack: ")]
    assert code == 6, errors
    assert "no space left on the device; free some and run the same command again to continue" in line
    assert "Traceback" not in errors
    assert not (out / MANIFEST).exists()


STAGES: dict[str, tuple[Any, str, int, int]] = {
    # what fails: the function before whose call the disk fills up, the number of that call, files finished by then
    "the dense file": (units.DenseWriter, "append", 5, 0),
    "the journal's line": (Journal, "append", 2, 0),
    "a shard": (units.ShardWriter, "write", 50, 2),
    "a copied file": (execute, "write_copy", 4, 7),
    "the manifest": (execute, "commit", 1, 7),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up_loses_nothing(
    disk: Path, command: Command, monkeypatch: pytest.MonkeyPatch, pack_of: PackOf, stage: str
) -> None:
    place, name, number, finished = STAGES[stage]
    out, real, calls = disk / "out", getattr(place, name), 0

    def call(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            fill(disk)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, call)
        check_failure(command(out), out)
    kept = finished_files(out)
    assert len(kept) == finished
    code, errors = command(out)  # still full
    assert code == 6
    assert "Traceback" not in errors
    assert finished_files(out) == kept
    resize(disk, "size=128m")
    code, errors = command(out)
    assert code == 0, errors
    assert {path: (out / path).stat().st_ino for path in kept} == {path: inode for path, (inode, _) in kept.items()}
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))


@pytest.mark.parametrize("pages", [1, 500, 1500, 2405, 2450])
def test_a_disk_that_is_too_small_is_survived_at_any_size(
    disk: Path, command: Command, monkeypatch: pytest.MonkeyPatch, pack_of: PackOf, pages: int
) -> None:
    """The early look at the free space finds enough: on many file systems it cannot be exact."""
    out = disk / "out"
    resize(disk, f"size={pages * 4096}")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, 2**40))  # type: ignore[attr-defined]
        check_failure(command(out), out)
    resize(disk, "size=64m")
    assert command(out)[0] == 0
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))


def test_a_read_only_disk_is_one_line(disk: Path, command: Command, interrupted: Callable[..., Path]) -> None:
    out = disk / "out"
    shutil.copytree(interrupted(), out)
    resize(disk, "ro")
    code, errors = command(out)
    assert (code, errors.count("\n")) == (6, 1)
    assert "Read-only file system" in errors
    code, errors = command(disk / "new")
    assert (code, errors.count("\n")) == (6, 1)
    resize(disk, "rw")
    assert flashpack.convert(TRAINED, out).resumed_files == 4
    assert verify(out) == []


def test_too_little_space_is_said_before_the_first_byte(disk: Path, tmp_path: Path, command: Command) -> None:
    resize(disk, "size=20m")
    code, errors = command(disk / "out")
    assert code == 6
    assert "out: 0.03 GB needed, 0.02 GB free; free some space or choose another disk" in errors
    assert not (disk / "out").exists()


def test_overwriting_counts_the_space_of_what_it_replaces(disk: Path, pack_of: PackOf) -> None:
    out = disk / "out"
    shutil.copytree(pack_of("trained", "q4", "q8"), out)
    before = contents(out)
    resize(disk, "size=20m")
    with pytest.raises(OutputError, match="GB needed"):
        flashpack.convert(TRAINED, out, experts="source", dense="source", overwrite=True)
    assert contents(out) == before
    resize(disk, "size=30m")
    assert flashpack.convert(TRAINED, out, experts="q3", overwrite=True)
    assert verify(out) == []


def test_no_space_is_said_before_the_first_byte(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"0.03 GB needed, 0.00 GB free"):
        flashpack.convert(TRAINED, tmp_path / "out")
    assert not (tmp_path / "out").exists()


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, 800_000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from flashpack.cli import main
sys.argv = ["flashpack", "convert", sys.argv[1], sys.argv[2]]
main()
"""


def test_a_write_that_fails_in_the_middle_is_one_line_and_resumable(tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk where mounting is not permitted: writes fail with EFBIG."""
    out = tmp_path / "out"
    command = [commands.python(), "-c", LIMITED, TRAINED, out]
    failed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    check_failure((failed.returncode, failed.stderr), out)
    assert flashpack.convert(TRAINED, out)
    assert verify(out) == []
