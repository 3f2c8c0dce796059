"""Direct or buffered: the rule, what is in the page cache, and that every choice reads the same bytes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from flashpack.formats import Pack
from flashpack.kernels.cpu.arena import HostArena
from flashpack.runtime import drive
from flashpack.runtime.budget import stride_counts
from tests.conftest import PackOf


@pytest.mark.parametrize(
    ("rounds", "way", "tried"),
    [
        ([(1e9, 3e9)] * 3, "buffered", 3),
        ([(1e9, 1.2e9)], "direct", 1),
        ([(1e9, 0.5e9), (1e9, 9e9), (1e9, 9e9)], "direct", 1),
        ([(1e9, 3e9), (1e9, 3e9), (1e9, 1.1e9)], "direct", 3),
    ],
)
def test_buffered_is_chosen_only_if_clearly_faster_every_time(
    rounds: list[tuple[float, float]], way: str, tried: int
) -> None:
    left = iter(rounds)
    assert drive.choose(left)[0] == way
    assert len(rounds) - len(list(left)) == tried


@pytest.mark.skipif(sys.platform != "linux", reason="drops pages from the page cache")
def test_pages_in_the_page_cache_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(16 * 2**16))
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if drive.in_page_cache(fd, 2**16, 2**17):
        pytest.skip("this file system keeps its pages")
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
    os.pread(fd, 2**16, 2**17)
    assert drive.in_page_cache(fd, 2**17, 2**16) == 1
    assert drive.in_page_cache(fd, 2**16, 2**17) == 0.5
    os.close(fd)


def opened(pack: Pack, records: int, available: int, io: str | None = None) -> tuple[drive.Drive, memoryview]:
    (stride,) = stride_counts(pack.manifest)
    arena = HostArena(records * stride)
    shards = {layer.index: pack.open_shard(layer) for layer in pack.manifest.layers}
    found = drive.open_for_reading(pack, shards, arena, available, io=io)
    for shard in shards.values():
        shard.close()
    return found, arena.room(0, records * stride)


def test_a_pack_that_fits_twice_is_read_through_the_page_cache(pack_of: PackOf) -> None:
    pack = Pack(pack_of("qwen3_moe"))
    fits, _ = opened(pack, 24, 2 * pack.expert_bytes)
    assert (fits.io, "page cache" in fits.why) == ("buffered", True)
    fits.close()
    tight, _ = opened(pack, 24, 2 * pack.expert_bytes - 1)
    assert tight.why != fits.why
    tight.close()
    tight.close()


@pytest.mark.parametrize("records", [1, 2, 4, 9])
def test_the_probe_takes_what_memory_there_is(pack_of: PackOf, records: int) -> None:
    pack = Pack(pack_of("qwen3_moe"))
    found, arena = opened(pack, records, 10**12)
    assert found.io in ("direct", "buffered")
    assert found.why
    (stride,) = stride_counts(pack.manifest)
    layer = pack.manifest.layers[1]
    with pack.open_shard(layer) as shard:
        offset, _ = shard.extent(3)
    assert os.preadv(found.fds[layer.index], [arena[:stride]], offset) == stride
    assert bytes(arena[:stride]) == (pack.folder / layer.path).read_bytes()[offset : offset + stride]
    found.close()


def test_where_there_are_no_direct_reads_it_is_said(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    real = drive._open_all

    def without(pack: Pack, direct: bool) -> dict[int, int]:
        if direct:
            raise OSError(22, "Invalid argument")
        return real(pack, direct)

    monkeypatch.setattr(drive, "_open_all", without)
    found, _ = opened(Pack(pack_of("qwen3_moe")), 2, 10**12)
    assert (found.io, found.why) == ("buffered", "the file system has no direct reads")
    found.close()


@pytest.mark.parametrize("cached", [True, False])
def test_only_records_outside_the_page_cache_count_unless_nearly_all_are_in_it(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """A rate of buffered reads that come from memory says nothing about the drive."""
    seen: list[tuple[int, int]] = []

    def in_page_cache(fd: int, offset: int, size: int) -> float:
        return 1.0 if cached or offset % 3 == 0 else 0.0

    def rate(pool: object, fds: dict[int, int], records: list[drive.Extent], places: list[memoryview]) -> float:
        seen.extend((r.layer, r.offset) for r in records)
        return 1e9 if len(seen) // len(records) % 2 else 5e9  # the first of each round is direct

    monkeypatch.setattr(drive, "in_page_cache", in_page_cache)
    monkeypatch.setattr(drive, "rate", rate)
    found, _ = opened(Pack(pack_of("qwen3_moe")), 2, 10**12)
    assert found.io == "buffered"
    assert found.why.endswith("from the page cache") == cached
    assert len(set(seen)) == len(seen) == 2 * drive._ROUNDS * 2
    if not cached:
        assert all(offset % 3 for _, offset in seen)
    found.close()


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_a_profile_is_not_tried_and_gives_way_where_everything_fits_twice(pack_of: PackOf, io: str) -> None:
    pack = Pack(pack_of("qwen3_moe"))
    every = sum(layer.experts for layer in pack.manifest.layers)
    found, _ = opened(pack, every - 1, 10 * pack.expert_bytes, io)
    assert (found.io, found.why) == (io, drive.PROFILE)
    found.close()
    found, _ = opened(pack, every, 10 * pack.expert_bytes, io)
    assert (found.io, "fit into memory twice" in found.why) == ("buffered", True)
    found.close()
