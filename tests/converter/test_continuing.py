"""A conversion that is killed in the middle of a file continues there, as far as digests prove what is there."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import flashpack
from flashpack.converter import notes, units
from flashpack.converter.report import Report
from flashpack.formats.constants import JOURNAL
from tests import commands
from tests.conftest import ROOT, TRAINED, contents
from tests.http_server import serve

EXPERT = 3 * 64 * 256 * 2
"""Bytes of an expert of the bundled model."""

PART = "experts/layer-0001.safetensors.part"


@pytest.fixture(scope="module", params=["raw", "zstd"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Report]:
    """A codec, and the pack that was made without interruption."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return request.param, out, flashpack.convert(TRAINED, out, codec=request.param)


@pytest.fixture
def stopped(whole: tuple[str, Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``stopped(dense=)``: a conversion with a note after each part, stopped in the middle of layer 1 (32 experts),
    or of the dense file."""
    monkeypatch.setattr(notes, "NOTE_SECONDS", 0.0)

    def make(dense: bool = False) -> Path:
        out, left, where = tmp_path / "out", 52, units.DenseWriter if dense else units.ShardWriter
        name = "append" if dense else "write"
        real = getattr(where, name)

        def write(writer: object, part: object, data: memoryview) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            real(writer, part, data)

        with monkeypatch.context() as patch:
            patch.setattr(where, name, write)
            with pytest.raises(KeyboardInterrupt):
                flashpack.convert(TRAINED, out, codec=whole[0], workers=1)
        return out

    return make


def written_again(out: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Report, dict[str, list[object]]]:
    """The report of the conversion that continues, and the parts that it wrote, by file."""
    seen: dict[str, list[object]] = {}
    for where, name in ((units.ShardWriter, "write"), (units.DenseWriter, "append")):

        def write(writer: object, part: object, data: memoryview, real: object = getattr(where, name)) -> None:
            seen.setdefault(writer.path, []).append(part)  # type: ignore[attr-defined]
            real(writer, part, data)  # type: ignore[operator]

        monkeypatch.setattr(where, name, write)
    return flashpack.convert(TRAINED, out, codec=codec, workers=1), seen


def test_experts_that_are_there_are_not_made_again(
    whole: tuple[str, Path, Report], stopped: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped()
    report, seen = written_again(out, whole[0], monkeypatch)
    assert seen["experts/layer-0001.safetensors"] == list(range(19, 32))
    assert contents(out) == contents(whole[1])
    assert (report.identity, report.errors, report.notices) == (whole[2].identity, whole[2].errors, [])
    assert report.resumed_bytes >= (32 + 19) * EXPERT


def test_dense_tensors_that_are_there_are_not_made_again(
    whole: tuple[str, Path, Report], stopped: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = stopped(dense=True)
    report, seen = written_again(out, whole[0], monkeypatch)
    again = set(seen["dense-00001.safetensors"])
    names = [name for tensor in flashpack.converter.plan(TRAINED).dense() for name in tensor.tensor_names().values()]
    assert again == set(names[len(names) - len(again) :])
    assert len(names) - 52 <= len(again) < len(names) - 20
    assert contents(out) == contents(whole[1])
    assert report.errors == whole[2].errors


def flip_record_7(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[16384 + 7 * ((len(data) - 16384) // 32) + 5] ^= 1
    part.write_bytes(data)


def cut(part: Path) -> None:
    os.truncate(part, 16384 + 90_000)


def lose(part: Path) -> None:
    part.unlink()


def zeros(part: Path) -> None:
    part.write_bytes(bytes(part.stat().st_size))


def link(part: Path) -> None:
    other = part.parent.parent.parent / "other"
    part.rename(other)
    part.symlink_to(other)


def lose_a_line(part: Path) -> None:
    journal = part.parent.parent / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    notes_of_layer = [i for i, line in enumerate(lines) if b'"path": "experts/layer-0001' in line]
    lines[notes_of_layer[4]] = b"damaged\n"
    journal.write_bytes(b"".join(lines))


@pytest.mark.parametrize("damage", [flip_record_7, cut, lose, zeros, lose_a_line])
def test_a_part_that_is_not_what_the_journal_says_is_made_again(
    whole: tuple[str, Path, Report],
    stopped: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:
    out = stopped()
    damage(out / PART)
    _, seen = written_again(out, whole[0], monkeypatch)
    again = seen["experts/layer-0001.safetensors"]
    assert again == list(range(int(str(again[0])), 32))
    assert int(str(again[0])) < 19
    assert contents(out) == contents(whole[1])


KILLED = """
import os, signal, sys, time
from flashpack.converter import notes, units
import flashpack
notes.NOTE_SECONDS = 0.0
real, seen = units.ShardWriter.write, 0
def write(self, expert, record):
    global seen
    real(self, expert, record)
    seen += 1
    if seen == 44:
        os.kill(os.getpid(), signal.SIGKILL)
units.ShardWriter.write = write
flashpack.convert(sys.argv[1], sys.argv[2], workers=1)
"""


def test_what_a_kill_in_the_middle_of_a_layer_makes_to_be_fetched_again_is_bounded(
    tmp_path: Path,
) -> None:
    """No more than was read ahead, here the rest of the layer. SIGKILL after 32 experts of one and 12 of the next."""
    site, server = serve(TRAINED)
    command = [commands.python(), "-c", KILLED, site.url, str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    before = site.bytes_of()
    flashpack.convert(site.url, tmp_path / "out")
    server.shutdown()
    server.server_close()
    report = flashpack.convert(TRAINED, tmp_path / "local")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    twice = site.bytes_of() - report.source_bytes
    headers = 2 * sum(int.from_bytes(p.read_bytes()[:8], "little") + 8 for p in TRAINED.glob("*.safetensors"))
    assert before < report.source_bytes
    asked_for = 2 * len(list(TRAINED.glob("*.safetensors")))  # whether they are there: a byte each
    assert twice <= headers + asked_for + 21 * EXPERT  # of 64; the last one that was written has no note
