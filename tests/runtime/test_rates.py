"""Rates of random reads: what is read, what is left out, and what counts as the drive's."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flashpack.formats.constants import PAGE
from flashpack.runtime import rates
from flashpack.runtime.drive import Extent
from flashpack.runtime.reads import READ_THREADS

MIB = 2**20


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "large").write_bytes(os.urandom(8 * MIB))
    (tmp_path / "small").write_bytes(os.urandom(MIB // 2 + 7))
    return tmp_path


def test_only_sizes_of_which_there_are_enough_places(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MAX_BYTES", 8 * MIB)
    found = rates.measure(files, ["large", "small"], [PAGE, MIB // 2, MIB], 60.0)
    assert [r.size for r in found] == [PAGE, MIB // 2]
    assert all(r.buffered > 0 and 0 <= r.cached <= 1 for r in found)
    assert rates.measure(files, ["small"], [MIB]) == []


def test_reads_stay_inside_the_files_and_are_whole_pages(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Extent] = []

    def rate(pool: ThreadPoolExecutor, fds: dict[int, int], extents: list[Extent], places: list[memoryview]) -> float:
        assert len(extents) == len(places) == READ_THREADS
        seen.extend(extents)
        return 1e9

    monkeypatch.setattr(rates, "rate", rate)
    monkeypatch.setattr(rates, "MAX_BYTES", 16 * MIB)
    sizes = [PAGE, MIB // 4]
    found = rates.measure(files, ["large", "small"], sizes, 60.0)
    assert [r.buffered for r in found] == pytest.approx([1e9, 1e9])
    lengths = {0: 8 * MIB, 1: MIB // 2 + 7}
    assert all(x.offset % PAGE == 0 and x.offset + x.size <= lengths[x.layer] for x in seen)
    assert {x.layer for x in seen} == {0, 1}
    for size in sizes:  # bounded, however fast the drive is
        assert sum(x.size for x in seen if x.size == size) == 2 * rates.MAX_BYTES
    assert [x.size for x in seen[: 4 * READ_THREADS : READ_THREADS]] == [PAGE, PAGE, MIB // 4, MIB // 4]


def test_without_time_nothing_is_begun(files: Path) -> None:
    assert rates.measure(files, ["large"], [PAGE], 0.0) == []


def test_a_file_system_without_direct_reads(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rates.open_file

    def without(folder: Path, path: str, direct: bool) -> int:
        if direct:
            raise OSError(22, "Invalid argument")
        return real(folder, path, direct)

    before = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(rates, "open_file", without)
    monkeypatch.setattr(rates, "MAX_BYTES", MIB)
    (found,) = rates.measure(files, ["large"], [PAGE], 60.0)
    assert found.direct is None
    assert len(os.listdir("/dev/fd")) == before


def test_the_rate_of_the_drive_is_not_that_of_the_page_cache() -> None:
    assert rates.Rate(MIB, 1e9, 2e9, 0.0).drive == 2e9
    assert rates.Rate(MIB, 1e9, 9e9, 0.2).drive == 1e9
    assert rates.Rate(MIB, None, 9e9, 0.2).drive is None
