"""File systems from a made table of mounts; rates of a temporary file; what is said about rates."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashpack.doctor import disk
from flashpack.doctor.remark import Remark
from flashpack.runtime import rates
from flashpack.runtime.rates import SIZES, Rate

MOUNTS = """22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:30 / {tmp}/a\\040b rw - nfs4 server:/x rw
31 22 0:31 / {tmp}/mem rw shared:3 master:4 - tmpfs none rw
32 22 0:32 / {tmp}/mem rw - overlay none rw
"""


def by_name(findings: object) -> dict[str, Remark]:
    assert hasattr(findings, "__iter__")
    return {f.name: f for f in findings}


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mounts").write_text(MOUNTS.format(tmp=tmp_path.resolve()))
    monkeypatch.setattr(disk, "MOUNTS", tmp_path / "mounts")
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "kind", "level"), [("c", "ext4", "ok"), ("a b/pack", "nfs4", "note"), ("mem", "overlay", "note")]
)
def test_the_file_system_of_a_folder(mounts: Path, folder: str, kind: str, level: str) -> None:
    (mounts / folder).mkdir(parents=True)
    assert disk.file_system(mounts / folder)[0] == kind
    found = by_name(disk.place(mounts / folder))["file system"]
    assert found.level == level
    assert kind in found.text


def test_no_table_of_mounts_is_no_error(mounts: Path) -> None:
    (mounts / "mounts").unlink()
    assert disk.file_system(mounts) == (None, None)
    assert list(by_name(disk.place(mounts))) == ["space"]


def test_a_full_disk_is_noted_and_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**10, free=0))
    assert by_name(disk.place(tmp_path))["space"].level == "note"
    (found,) = disk.temporary(tmp_path, lambda what: None)
    assert "nearly full" in found.text


def test_the_nearest_folder_of_a_path_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert disk.existing(tmp_path / "no" / "such") == disk.existing(tmp_path / "file") == tmp_path


def test_a_temporary_file_is_measured_and_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "TRIAL_BYTES", 2 * disk._BLOCK)
    monkeypatch.setattr(rates, "MAX_BYTES", 2**24)
    said: list[str] = []
    found = by_name(disk.temporary(tmp_path, said.append))
    assert list(tmp_path.iterdir()) == []
    # 32 MiB: two times eight reads of 2 MiB, not of 4.
    assert found["1 MiB"].data["buffered"] > 0
    assert "2 MiB" in found
    assert "4 MiB" not in found
    assert "just written" in found["speed"].text
    assert said == ["the disk: writing 33.6 MB", disk.READING]
    (missing,) = disk.temporary(tmp_path / "no", said.append)
    assert missing.level == "problem"


def rates_of(direct: float | None, buffered: float, cached: float = 0.0) -> list[Rate]:
    return [Rate(size, direct, buffered, cached) for size in (3 * 2**18, *SIZES)]


def test_what_is_said_about_rates() -> None:
    found = by_name(disk.told(rates_of(3e9, 2e9), "the pack", 3 * 2**18))
    assert {f.level for f in found.values()} == {"ok"}
    assert found["768 KiB, expert"].text == found["8 MiB"].text == "3.00 GB/s direct, 2.00 GB/s buffered"
    assert by_name(disk.told(rates_of(1e8, 2e9, 0.5), "the pack"))["drive"].level == "note"
    assert by_name(disk.told(rates_of(1e9, 2e9), "the pack"))["way"].level == "ok"
    only_cache = by_name(disk.told(rates_of(None, 9e9, 1.0), "the pack"))
    assert only_cache["page cache"].level == "note"
    assert only_cache["1 MiB"].text == "no direct reads, 9.00 GB/s buffered (100% of that from the page cache)"
    assert by_name(disk.told([], "the pack"))["speed"].text.startswith("not measured")
    small = [Rate(2**15, 1e8, 1e8, 0.0)]
    assert "drive" not in by_name(disk.told(small, "the pack"))
