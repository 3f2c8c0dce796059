"""Kills conversions at random moments and lets them continue; a script for test_recovery.py.

usage: killing.py SOURCE FOLDER SEED

Importing torch and planning take far longer than converting the bundled model, so one process does both once and
forks a child for each attempt. Prints what it saw as JSON; anything wrong is an AssertionError.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import flashpack
from flashpack.formats.constants import JOURNAL, MANIFEST

KILLS = 30


def contents(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def identity_of(path: Path) -> tuple[int, int]:
    """Inode and modified time: what writing the file again would change."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def finished_files(out: Path) -> dict[str, tuple[int, int]]:
    """What the journal lists, by path."""
    journal = out / JOURNAL
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    paths = [line["file"]["path"] for line in map(json.loads, lines) if "file" in line]
    return {path: identity_of(out / path) for path in paths}


def attempt(source: Path, out: Path, workers: int, delay: float | None = None) -> bool:
    """Convert in a child and kill it after ``delay`` seconds; whether the conversion came to its end."""
    before = finished_files(out)
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writable, b"!")
            report = flashpack.convert(source, out, workers=workers)
            assert report.resumed_files == len(before), f"{report.resumed_files} of {len(before)} files kept"
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.read(readable, 1)
    os.close(readable)
    os.close(writable)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the conversion failed with {status}"
    assert {path: identity_of(out / path) for path in before} == before, "finished work was done again"
    # A child killed between its last step and its exit has done all the same.
    return status == 0 or ((out / MANIFEST).exists() and not (out / JOURNAL).exists())


def main(source: Path, folder: Path, seed: int) -> None:
    # Many small files instead of one dense file, so that there are many moments to be killed at.
    importlib.import_module("flashpack.converter.plan").DENSE_FILE_BYTES = 250_000
    work = flashpack.converter.plan(source)
    importlib.import_module("flashpack.converter.convert").plan = lambda *_: work
    files = len(work.dense_files) + len(work.layers)
    attempt(source, folder / "warm", 1)
    lengths = []
    for workers in (1, 2):
        begun = time.monotonic()
        assert attempt(source, folder / f"whole-{workers}", workers)
        lengths.append(time.monotonic() - begun)
    expected = contents(folder / "whole-1")
    moments = random.Random(seed)
    out = folder / "out"
    stages: list[int] = []

    def killed(workers: int, delay: float) -> bool:
        """Whether the kill hit; notes how many files were finished then, or that the pack was committed."""
        if attempt(source, out, workers, delay):
            return False
        stages.append(files + 1 if (out / MANIFEST).exists() else len(finished_files(out)))
        return True

    # A kill somewhere in each conversion; the next one brings it to its end.
    tried = 0
    while len(stages) < KILLS and tried < 6 * KILLS:
        workers = 1 + tried % 2
        if killed(workers, moments.uniform(0, lengths[workers - 1])):
            assert attempt(source, out, 1)
            lengths[workers - 1] *= 1.02
        else:  # the machine has become faster since: others have stopped working
            lengths[workers - 1] *= 0.85
        assert contents(out) == expected, "another result"
        shutil.rmtree(out)
        tried += 1
    single, stages = stages, []
    # One conversion, killed again and again: often before it finishes another file.
    while len(stages) < KILLS:
        if not killed(1, moments.uniform(0, 3 * lengths[0] / files)):
            assert contents(out) == expected, "another result"
            shutil.rmtree(out)
    assert attempt(source, out, 1)
    assert contents(out) == expected, "another result"
    sys.stdout.write(json.dumps({"files": files, "tried": tried, "single": single, "chain": stages}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
