"""After an interruption the same command continues: nothing finished is lost, nothing is mixed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import flashpack
from flashpack.cli import app
from flashpack.converter.journal import Journal
from flashpack.errors import NotAPackError, OutputError
from flashpack.formats import Pack, verify
from flashpack.formats.constants import JOURNAL
from tests import commands
from tests.conftest import CHECKPOINTS, ROOT, TRAINED, PackOf
from tests.converter.killing import KILLS, contents, identity_of

SourceCopy = Callable[[str], Path]
Interrupted = Callable[..., Path]

# Of the files that ``interrupted()`` leaves finished.
FINISHED = ["dense-00001.safetensors", "experts/layer-0000.safetensors", "experts/layer-0002.safetensors"]


def test_conversions_killed_at_random_moments_continue_to_the_same_bytes(tmp_path: Path) -> None:
    """60 SIGKILLs from outside: one each in 30 conversions, and 30 in a row."""
    seed = random.SystemRandom().randrange(2**32)
    command = [sys.executable, "-m", "tests.converter.killing", TRAINED, tmp_path, str(seed)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    seen = json.loads(done.stdout)
    assert len(seen["single"]) == len(seen["chain"]) == KILLS, f"seed {seed}: {seen}"
    assert seen["tried"] < 2 * KILLS, f"seed {seed}: too few kills hit a running conversion: {seen}"
    # The kills are spread over the run: early, late, and after many different files.
    assert len(set(seen["single"])) > 6, f"seed {seed}: {seen}"
    assert min(seen["single"]) < seen["files"] / 3 < seen["files"] * 2 / 3 < max(seen["single"]), f"seed {seed}: {seen}"


def test_an_interrupted_conversion_is_no_pack_and_keeps_what_is_finished(
    interrupted: Interrupted, pack_of: PackOf
) -> None:
    out = interrupted()
    with pytest.raises(NotAPackError, match="unfinished conversion"):
        Pack(out)
    before = {path: identity_of(out / path) for path in FINISHED}
    report = flashpack.convert(TRAINED, out)
    assert report.resumed_files == 4
    assert report.notices == []
    assert 0 < report.resumed_bytes < report.source_bytes
    assert {path: identity_of(out / path) for path in FINISHED} == before
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))


def test_a_real_interrupt_leaves_a_resumable_folder(tmp_path: Path) -> None:
    """SIGINT to the command while it works, as Ctrl-C does."""
    out = tmp_path / "out"
    slow = (
        "import time\nfrom flashpack.converter import units\nreal = units.ShardWriter.write\n"
        "def write(self, e, r):\n    time.sleep(0.05)\n    real(self, e, r)\n"
        "units.ShardWriter.write = write\nimport sys\nsys.argv[0] = 'flashpack'\n"
        "from flashpack.cli import main\nmain()\n"
    )
    command = [commands.python(), "-c", slow, "convert", str(TRAINED), str(out), "--workers", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (out / "experts" / "layer-0001.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to continue" in errors
    assert "Traceback" not in errors
    assert flashpack.convert(TRAINED, out).resumed_files >= 2
    assert verify(out) == []


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"experts": "q3"}, "recipe experts q4 -> q3"),
        ({"group_size": 32, "dense": "source"}, "recipe dense q8 -> source; recipe group_size 64 -> 32"),
    ],
)
def test_changed_options_are_refused_by_name(
    interrupted: Interrupted, options: dict[str, object], changes: str
) -> None:
    out = interrupted()
    before = contents(out)
    with pytest.raises(OutputError, match=f"differs from this one: {changes}\\. .*--overwrite"):
        flashpack.convert(TRAINED, out, **options)  # type: ignore[arg-type]
    assert contents(out) == before
    assert flashpack.convert(TRAINED, out, overwrite=True, **options).resumed_files == 0  # type: ignore[arg-type]
    assert verify(out) == []


def change_time(source: Path) -> None:
    os.utime(source / "model-00001-of-00003.safetensors", ns=(0, 1_700_000_000_123_456_789))


def change_header(source: Path) -> None:
    path = source / "model-00002-of-00003.safetensors"
    data, status = path.read_bytes(), path.stat()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip() + b" " * 8
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_config(source: Path) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 7}))


def change_every_shard(source: Path) -> None:
    for path in source.glob("*.safetensors"):
        path.write_bytes(path.read_bytes())
    change_header(source)
    change_time(source)


@pytest.mark.parametrize(
    ("change", "changes"),
    [
        (change_time, r"source model-00001-of-00003.safetensors modified \S+ -> 2023-11-14T22:13:20.123456789\. "),
        (change_header, r"source model-00002-of-00003.safetensors header changed; .*safetensors size \d+ -> \d+\. "),
        (change_config, r"source config.json content changed\. "),
        (change_every_shard, "model-00001-of.* modified .*model-00002-of.* size .*model-00003-of.* modified"),
    ],
)
def test_a_changed_source_is_refused_by_file_and_how(
    source_copy: SourceCopy, interrupted: Interrupted, change: Callable[[Path], None], changes: str
) -> None:
    source = source_copy("trained")
    out = interrupted(source)
    before = contents(out)
    change(source)
    with pytest.raises(OutputError, match=changes):
        flashpack.convert(source, out)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("old", "changes"),
    [
        ({"flashpack": "0.0.1"}, r"differs from this one: flashpack 0.0.1 -> \d"),
        ({"flashpack": "0.0.1", "source": "0" * 64}, r"flashpack 0.0.1 -> \S+; source changed"),
        ({"recipe": {str(i): i for i in range(9)}}, r"recipe 0 is gone; .*recipe 5 is gone; and \d+ more\. "),
    ],
)
def test_a_journal_of_another_version_is_refused_by_what_differs(
    interrupted: Interrupted, old: dict[str, object], changes: str
) -> None:
    out = interrupted()
    first, rest = (out / JOURNAL).read_bytes().split(b"\n", 1)
    (out / JOURNAL).write_bytes(json.dumps(json.loads(first) | old).encode() + b"\n" + rest)
    with pytest.raises(OutputError, match=changes) as caught:
        flashpack.convert(TRAINED, out)
    assert "\n" not in str(caught.value)


def damage_cut_off(journal: Path) -> None:
    journal.write_bytes(journal.read_bytes() + b'{"file": {"path": "experts/lay')


def damage_one_digit(journal: Path) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"size": 1', b'"size": 2')
    journal.write_bytes(b"".join(lines))


def damage_zeros(journal: Path) -> None:
    data = bytearray(journal.read_bytes())
    end = data.rindex(b"\n", 0, -1)  # of the last line but one
    data[end - 300 : end + 300] = bytes(600)
    journal.write_bytes(data)


def damage_line_ends(journal: Path) -> None:
    lines = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([*lines[:2], lines[2] + b"\r" + lines[3], *lines[4:], b""]))


@pytest.mark.parametrize(
    ("damage", "kept", "notices"),
    [(damage_cut_off, 4, 0), (damage_one_digit, 3, 1), (damage_zeros, 2, 1), (damage_line_ends, 2, 1)],
)
def test_what_a_damaged_line_of_the_journal_recorded_is_done_again(
    interrupted: Interrupted, pack_of: PackOf, damage: Callable[[Path], None], kept: int, notices: int
) -> None:
    out = interrupted()
    damage(out / JOURNAL)
    report = flashpack.convert(TRAINED, out)
    assert report.resumed_files == kept
    assert len([n for n in report.notices if "is damaged; what it recorded is done again" in n]) == notices
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))


def test_a_journal_whose_first_line_is_damaged_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / JOURNAL).write_bytes(b"\x00garbage\n")
    with pytest.raises(OutputError, match="damaged; use --overwrite"):
        flashpack.convert(CHECKPOINTS / "qwen3_moe", out)
    assert flashpack.convert(CHECKPOINTS / "qwen3_moe", out, overwrite=True)
    assert verify(out) == []


def test_a_journal_with_the_lines_of_another_pack_is_refused(interrupted: Interrupted, tmp_path: Path) -> None:
    lines = (interrupted(TRAINED, 140) / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / "out").rename(tmp_path / "other")
    out = interrupted(CHECKPOINTS / "qwen3_moe", 1)
    start = (out / JOURNAL).read_bytes().splitlines(keepends=True)[0]
    for foreign in (lines[3], lines[-1]):  # a layer that both have, one that this model has not
        (out / JOURNAL).write_bytes(start + foreign)
        with pytest.raises(OutputError, match=r"flashpack\.journal: .*no part of this pack.*; use --overwrite"):
            flashpack.convert(CHECKPOINTS / "qwen3_moe", out)


def lose(path: Path) -> None:
    path.unlink()


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_header(path: Path) -> None:
    with open(path, "r+b") as f:
        f.seek(40)
        byte = f.read(1)
        f.seek(40)
        f.write(bytes([byte[0] ^ 1]))


def flip_last(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def link_elsewhere(path: Path) -> None:
    path.rename(path.parent.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent.parent / "elsewhere")


@pytest.mark.parametrize("damage", [lose, shorten, flip_header, flip_last, link_elsewhere])
def test_a_finished_file_that_has_changed_is_done_again(
    interrupted: Interrupted, pack_of: PackOf, damage: Callable[[Path], None]
) -> None:
    out = interrupted()
    damage(out / FINISHED[1])
    report = flashpack.convert(TRAINED, out)
    assert report.resumed_files == 3
    assert [n for n in report.notices if f"{FINISHED[1]}: was finished and has changed since" in n]
    assert not (out / FINISHED[1]).is_symlink()
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))


def test_a_committed_pack_with_a_left_over_journal_needs_only_its_report(
    pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(journal: Journal) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            flashpack.convert(TRAINED, out)
    assert verify(out) == []
    with pytest.raises(OutputError, match="holds a finished pack"):
        flashpack.convert(TRAINED, out, experts="q3")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.*") if p.name != JOURNAL}
    report = flashpack.convert(TRAINED, out)
    whole = flashpack.convert(TRAINED, tmp_path / "whole")
    assert (report.identity, report.pack_bytes, report.errors) == (whole.identity, whole.pack_bytes, whole.errors)
    assert report.resumed_bytes == report.source_bytes
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.*")} == before
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_clock_that_jumps_changes_nothing(
    interrupted: Interrupted, pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    out = interrupted()
    for path in (*out.rglob("*"), out):
        os.utime(path, (time.time() + jump, time.time() + jump))
    real, calls = time.time, 0

    def clock() -> float:
        nonlocal calls
        calls += 1
        return real() + (jump if calls % 2 else -jump)

    monkeypatch.setattr(time, "time", clock)
    report = flashpack.convert(TRAINED, out)
    assert report.resumed_files == 4
    assert 0 < report.seconds < 600
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))


def test_the_printed_rate_counts_what_this_run_did(
    interrupted: Interrupted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also by a clock so coarse that it does not advance."""
    out = interrupted()
    with pytest.raises(SystemExit, match=r"^0$"):
        app(["convert", str(TRAINED), str(out)])
    assert re.search(r"\d s, \d+(\.\d+)? [kMG]B of source per second", capsys.readouterr().out)
    monkeypatch.setattr(time, "monotonic", lambda: 1.0)
    with pytest.raises(SystemExit, match=r"^0$"):
        app(["convert", str(TRAINED), str(out), "--overwrite"])
    assert "\n  0.0 s\n" in capsys.readouterr().out
