"""How fast a drive gives random parts of files, as many at once as the runtime reads."""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Iterator, Sequence
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


def measure(folder: Path, paths: Sequence[str], sizes: Sequence[int], seconds: float = 3.0) -> list[Rate]:
    """Rates of random reads of ``sizes`` (multiples of the page) in the files ``paths`` below ``folder``.

    Takes ``seconds``, and on a slow drive until the reads that are under way have come; sizes that were not begun by
    then are left out, and those for which the files are too small. Raises ``OSError`` or ``FormatError`` if a file
    cannot be read.
    """
    lengths = [(folder / path).stat().st_size // PAGE * PAGE for path in paths]
    possible = [s for s in sizes if sum(n for n in lengths if n >= s) >= 2 * READ_THREADS * s]
    if not possible:
        return []
    with ExitStack() as stack:
        buffered = _open_all(folder, paths, False, stack)
        try:
            direct = _open_all(folder, paths, True, stack)
        except OSError:
            direct = {}
        memory = stack.enter_context(mmap.mmap(-1, READ_THREADS * max(possible)))
        memory[:: mmap.PAGESIZE] = bytes(len(memory) // mmap.PAGESIZE)  # else the first reads wait for pages
        whole = stack.enter_context(memoryview(memory))
        pool = stack.enter_context(ThreadPoolExecutor(READ_THREADS))
        trials = [_Trial(size, lengths, direct, buffered) for size in possible]
        return _in_turns(pool, trials, whole, time.monotonic() + seconds)


def _in_turns(pool: ThreadPoolExecutor, trials: list[_Trial], memory: memoryview, end: float) -> list[Rate]:
    """All sizes and both ways in turns: a drive that others use, or that wakes up, treats all alike."""
    for turn in range(1 + MAX_BYTES // (READ_THREADS * min(t.size for t in trials))):
        for trial in trials:
            if time.monotonic() >= end:
                return [t.result for t in trials if t.turns]
            if turn * READ_THREADS * trial.size < MAX_BYTES:
                with ExitStack() as stack:
                    cuts = (memory[i * trial.size : (i + 1) * trial.size] for i in range(READ_THREADS))
                    places = [stack.enter_context(cut) for cut in cuts]
                    trial.run(pool, places)
    return [t.result for t in trials]


class _Trial:
    """Reads of one size. ``direct`` is empty where the file system has no such reads."""

    def __init__(self, size: int, lengths: list[int], direct: dict[int, int], buffered: dict[int, int]) -> None:
        self.size = size
        self.turns = 0
        self._lengths = lengths
        self._direct = direct
        self._buffered = buffered
        self._seconds = {"direct": 0.0, "buffered": 0.0}
        self._cached = 0.0

    def run(self, pool: ThreadPoolExecutor, places: list[memoryview]) -> None:
        """One turn: as many reads as ``places`` at once, direct and then buffered."""
        batch = self.size * len(places)
        if self._direct:
            extents = [_extent(self._lengths, self.size, self._buffered) for _ in places]
            self._seconds["direct"] += batch / rate(pool, self._direct, extents, places)
        extents = [_extent(self._lengths, self.size, self._buffered) for _ in places]
        self._seconds["buffered"] += batch / rate(pool, self._buffered, extents, places)
        for x in extents:
            self._cached += x.cached / len(extents)
            if not x.cached and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._buffered[x.layer], x.offset, x.size, os.POSIX_FADV_DONTNEED)
        self.turns += 1

    @property
    def result(self) -> Rate:
        total = self.turns * READ_THREADS * self.size
        direct = total / self._seconds["direct"] if self._direct else None
        return Rate(self.size, direct, total / self._seconds["buffered"], self._cached / self.turns)


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
