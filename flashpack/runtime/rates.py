"""How fast a drive gives random parts of files, as many at once as the runtime reads."""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from flashpack.formats.constants import PAGE
from flashpack.runtime.drive import Extent, in_page_cache, open_file, rate
from flashpack.runtime.reads import READ_THREADS

SIZES = (2**20, 2**21, 2**22, 2**23)
"""Bytes of a read."""

MAX_BYTES = 2**28
"""Read in one way for one size, at the most."""

_TRIES = 8  # for a place that is not in the page cache


@dataclass(frozen=True)
class Rate:
    """Bytes per second of reads of ``size`` bytes. ``direct``: None where the file system has no such reads.
    ``cached``: how much of the buffered reads was in the page cache before, 0 to 1."""

    size: int
    direct: float | None
    buffered: float
    cached: float

    @property
    def drive(self) -> float | None:
        """The faster way past what is in memory; None if only the page cache was seen."""
        ways = [self.direct, self.buffered if self.cached == 0 else None]
        return max((way for way in ways if way), default=None)


def measure(
    folder: Path,
    paths: Sequence[str],
    sizes: Sequence[int],
    seconds: float = 3.0,
    begin: Callable[[int], object] = lambda size: None,
) -> list[Rate]:
    """Rates of random reads of ``sizes`` (multiples of the page) in the files ``paths`` below ``folder``.

    Takes ``seconds``, and on a slow drive until the reads that are under way have come; sizes that were not begun by
    then are left out, and those for which the files are too small. ``begin`` is called with each size. Raises
    ``OSError`` or ``FormatError`` if a file cannot be read.
    """
    lengths = [(folder / path).stat().st_size // PAGE * PAGE for path in paths]
    possible = [s for s in sizes if sum(n for n in lengths if n >= s) >= 2 * READ_THREADS * s]
    if not possible:
        return []
    found = []
    end = time.monotonic() + seconds
    with ExitStack() as stack:
        buffered = _open_all(folder, paths, False, stack)
        try:
            direct = _open_all(folder, paths, True, stack)
        except OSError:
            direct = {}
        memory = stack.enter_context(mmap.mmap(-1, READ_THREADS * max(possible)))
        pool = stack.enter_context(ThreadPoolExecutor(READ_THREADS))
        for left, size in zip(range(len(possible), 0, -1), possible, strict=True):
            now = time.monotonic()
            if now >= end:
                break
            begin(size)
            with memoryview(memory) as whole:
                places = [whole[i * size : (i + 1) * size] for i in range(READ_THREADS)]
                found.append(_measure(pool, direct, buffered, lengths, size, places, now + (end - now) / left))
                for place in places:
                    place.release()
    return found


def _measure(
    pool: ThreadPoolExecutor,
    direct: dict[int, int],
    buffered: dict[int, int],
    lengths: list[int],
    size: int,
    places: list[memoryview],
    end: float,
) -> Rate:
    """Both ways in turns until ``end``, at least once: a drive that others use treats both alike."""
    batch = size * len(places)
    times = {"direct": 0.0, "buffered": 0.0}
    turns, cached = 0, 0.0
    while turns == 0 or (time.monotonic() < end and (turns + 1) * batch <= MAX_BYTES):
        if direct:
            extents = [_extent(lengths, size, buffered) for _ in places]
            times["direct"] += batch / rate(pool, direct, extents, places)
        extents = [_extent(lengths, size, buffered) for _ in places]
        times["buffered"] += batch / rate(pool, buffered, extents, places)
        for x in extents:
            cached += x.cached / len(extents)
            if not x.cached and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(buffered[x.layer], x.offset, x.size, os.POSIX_FADV_DONTNEED)
        turns += 1
    total = turns * batch
    return Rate(size, total / times["direct"] if direct else None, total / times["buffered"], cached / turns)


def _extent(lengths: list[int], size: int, fds: dict[int, int]) -> Extent:
    """A random part of the files, outside the page cache if one is found there."""
    extent = None
    for x in _places(lengths, size):
        cached = in_page_cache(fds[x[0]], x[1], size)
        if extent is None or cached < extent.cached:
            extent = Extent(*x, size, cached)
        if not cached:
            break
    assert extent is not None
    return extent


def _places(lengths: list[int], size: int) -> Iterator[tuple[int, int]]:
    """(file, offset) of parts, other ones each time: a drive, or the host of this machine, remembers what it read."""
    files = [i for i, length in enumerate(lengths) if length >= size]
    for _ in range(_TRIES):
        i = random.choices(files, [lengths[i] for i in files])[0]
        yield i, random.randrange((lengths[i] - size) // PAGE + 1) * PAGE


def _open_all(folder: Path, paths: Sequence[str], direct: bool, stack: ExitStack) -> dict[int, int]:
    fds = {}
    for i, path in enumerate(paths):
        fds[i] = open_file(folder, path, direct)
        stack.callback(os.close, fds[i])
    return fds
