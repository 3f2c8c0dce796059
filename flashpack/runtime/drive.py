"""How the files of a pack are read: past the page cache or through it, chosen by trying both on the drive itself.

Past it is right where the arena is the cache: the page cache would only hold what the arena has or has dropped, and
filling it costs time. But some drives and file systems are slower that way, and where the system has the whole pack in
its cache already, reading from there is faster than any drive.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from flashpack.formats import Pack
from flashpack.formats.files import open_inside, pread_into
from flashpack.formats.reader import Shard
from flashpack.kernels import Arena

_ROUNDS = 3  # each direct, then buffered, so that a noisy drive treats both alike
_DEPTH = 4  # records in flight
_PROBE_BYTES = 128 * 2**20
PROFILE = "the profile of this pack on this machine"
"""Why files are read as they are, where ``tune`` has chosen."""

_CLEARLY = 1.25  # buffered must be so much faster
_CACHED = 0.9

_DIRECT: int = getattr(os, "O_DIRECT", 0)  # macOS has none: F_NOCACHE does it there


@dataclass
class Drive:
    """Open shards by layer. ``io``: "direct" (past the page cache) or "buffered"; ``why``: in a few words."""

    fds: dict[int, int]
    io: str
    why: str

    def close(self) -> None:
        """Close the files; harmless if repeated."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds = {}


def open_for_reading(
    pack: Pack,
    shards: dict[int, Shard],
    arena: Arena,
    available: int,
    page_cache: bool = False,
    io: str | None = None,
) -> Drive:
    """Open the shards of ``pack`` in the way that suits its drive.

    ``arena``: where records go; it is still empty, and is written to. ``available``: bytes that the process could take,
    the arena among them. ``page_cache``: read through it without trying. ``io``: the way that a profile asks for,
    "direct" or "buffered", which is not tried either.
    Trying takes as long as reading 3 x 2 x 4 records, mostly a third of that.
    """
    buffered = _open_all(pack, direct=False)
    if page_cache:
        return Drive(buffered, "buffered", "a GPU wires what it uses: the rest of the memory is the page cache's")
    try:
        direct = _open_all(pack, direct=True)
    except OSError:
        return Drive(buffered, "buffered", "the file system has no direct reads")
    try:
        if arena.tensor.nbytes >= pack.expert_bytes and available >= 2 * pack.expert_bytes:
            io, why = "buffered", "all experts fit into memory twice: the next start finds them in the page cache"
        elif io is not None:
            why = PROFILE
        else:
            io, why = _probe(shards, direct, buffered, arena)
    except OSError:
        io, why = "direct", "the probe could not read"  # who needs the record will say which
    chosen, other = (direct, buffered) if io == "direct" else (buffered, direct)
    Drive(other, "", "").close()
    return Drive(chosen, io, why)


@dataclass(frozen=True)
class Extent:
    """Bytes of a file to try with, a record as a rule; ``cached``: how much of it is in the page cache, 0 to 1."""

    layer: int
    offset: int
    size: int
    cached: float


def _probe(shards: dict[int, Shard], direct: dict[int, int], buffered: dict[int, int], arena: Arena) -> tuple[str, str]:
    """The way to read, and why. Only records that are not in the page cache count, unless nearly all are."""
    stride = max(kind.stride for shard in shards.values() for kind in shard.layout.kinds)
    depth = min(_DEPTH, arena.tensor.nbytes // stride, _PROBE_BYTES // (2 * _ROUNDS * stride))
    if depth < 1:
        return "direct", "records are too large to try"
    records = _pick(shards, buffered, 4 * _ROUNDS * depth)
    cached = statistics.fmean(r.cached for r in records) > _CACHED
    records = [r for r in records if (r.cached > _CACHED if cached else not r.cached)]
    if len(records) < 2 * _ROUNDS * depth:
        return "direct", "too little of the pack is outside the page cache to try"
    places = [arena.room(i * stride, stride) for i in range(depth)]
    blocks = [records[i : i + depth] for i in range(0, len(records), depth)]

    def rates() -> Iterator[tuple[float, float]]:
        with ThreadPoolExecutor(depth) as pool:
            for one, two in zip(blocks[::2], blocks[1::2], strict=False):
                yield rate(pool, direct, one, places), rate(pool, buffered, two, places)
                if not cached and hasattr(os, "posix_fadvise"):
                    for r in two:
                        os.posix_fadvise(buffered[r.layer], r.offset, r.size, os.POSIX_FADV_DONTNEED)

    io, why = choose(islice(rates(), _ROUNDS))
    return io, why + (" from the page cache" if cached and io == "buffered" else "")


def choose(rounds: Iterable[tuple[float, float]]) -> tuple[str, str]:
    """The way to read, and why, by (direct, buffered) rates in bytes per second.

    Buffered must be clearly faster every time: the first round that does not show it is the last.
    """
    way = "direct"
    for direct, buffered in rounds:
        measured = f"{direct / 1e9:.1f} GB/s direct, {buffered / 1e9:.1f} GB/s buffered"
        way = "buffered" if buffered > _CLEARLY * direct else "direct"
        if way == "direct":
            break
    return way, measured


def rate(pool: ThreadPoolExecutor, fds: dict[int, int], records: list[Extent], places: list[memoryview]) -> float:
    """Bytes per second of reading ``records`` at once, each into its place."""
    begun = time.perf_counter()
    list(pool.map(lambda r, place: pread_into(fds[r.layer], place[: r.size], r.offset, ""), records, places))
    return sum(r.size for r in records) / (time.perf_counter() - begun)


def _pick(shards: dict[int, Shard], fds: dict[int, int], count: int) -> list[Extent]:
    """Up to ``count`` records from all over the pack, the same ones at every start."""
    everything = [(layer, e) for layer, shard in shards.items() for e in range(shard.layout.layer.experts)]
    chosen = random.Random(0).sample(everything, min(count, len(everything)))
    extents = [(layer, *shards[layer].extent(e)) for layer, e in chosen]
    return [Extent(*extent, in_page_cache(fds[extent[0]], *extent[1:])) for extent in extents]


def in_page_cache(fd: int, offset: int, size: int) -> float:
    """Share of the pages of a part of a file that are in memory. The system may say 1 where it keeps this a secret."""
    before = offset % mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(fd, before + size, prot=mmap.PROT_READ, offset=offset - before) as mapping:
        pages = np.zeros(-(-(before + size) // mmap.PAGESIZE), dtype=np.uint8)
        data = np.frombuffer(mapping, dtype=np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(data)), pages.ctypes.data_as(ctypes.c_void_p)
        )
        del data  # the mapping cannot be closed before
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return float((pages & 1).mean())


def open_file(folder: Path, path: str, direct: bool) -> int:
    """A descriptor of a file below ``folder``, for reads of whole pages; ``OSError`` if ``direct`` is not possible."""
    fd = open_inside(folder, path, _DIRECT if direct else 0)
    if direct and sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
    return fd


def _open_all(pack: Pack, direct: bool) -> dict[int, int]:
    """Descriptors by layer; ``OSError`` where ``direct`` is not possible."""
    fds: dict[int, int] = {}
    try:
        for layer in pack.manifest.layers:
            fds[layer.index] = open_file(pack.folder, layer.path, direct)
    except OSError:
        for fd in fds.values():
            os.close(fd)
        raise
    return fds
