"""A pool of reading threads in which a read that somebody waits for comes before one that is only a guess.

A record is read whole, or in a few parts at once where there are fewer records to read than threads. Positional reads
and checksums release the interpreter's lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from flashpack.runtime.cache import Key

READ_THREADS = 8
"""Reads in flight. A drive reaches its rate only with several large reads queued."""

AHEAD_DEPTH = 2
"""Guesses in flight at once, when there are reads that somebody waits for: so many may be in their way."""

_MAX_PARTS = 4
_MIN_PART = 512 * 2**10  # smaller reads cost the drive more than a shorter wait gains
_PAGE = 4096


@dataclass(eq=False, slots=True)
class Read:
    """One record on its way from the drive into the arena.

    ``slot``: its place, ``size``: bytes to read. ``wanted``: somebody waits for it; ``ahead``: it was begun, or goes
    on, without that. ``left``: parts not yet read. ``error``: why it failed; valid once it has landed.
    """

    key: Key
    slot: int
    size: int
    wanted: bool
    ahead: bool
    left: int = 1
    error: Exception | None = None


Work = Callable[[Read, int, int], None]
"""Fills the bytes [start, end) of a record."""


def parts(size: int, records: int) -> list[tuple[int, int]]:
    """``size`` bytes as page-aligned (start, end): several where ``records`` reads would leave threads idle."""
    count = max(1, min(_MAX_PARTS, READ_THREADS // max(1, records), size // _MIN_PART))
    step = -(-size // (count * _PAGE)) * _PAGE
    return [(start, min(size, start + step)) for start in range(0, size, step)]


class ReadPool:
    """``READ_THREADS`` threads. ``landed`` gets every read when it is complete or has failed.

    Reads that nobody waits for begin only while none that somebody waits for is unfinished. The pool refers to its
    owner only through the reads it has not finished.
    """

    def __init__(self) -> None:
        self.landed: SimpleQueue[Read] = SimpleQueue()
        self._ready: SimpleQueue[_Part | None] = SimpleQueue()
        self._lock = threading.Lock()  # of all that follows
        self._ahead: deque[_Part] = deque()
        self._wanted = 0
        self._guesses = 0
        self._depth = READ_THREADS
        self._threads = [
            threading.Thread(target=self._serve, name=f"flashpack-read-{i}", daemon=True) for i in range(READ_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, read: Read, pieces: list[tuple[int, int]], work: Work, finish: Callable[[Read], None]) -> None:
        """Read a record that somebody waits for: ``work`` on each of ``pieces`` at once, then ``finish``."""
        read.left = len(pieces)
        with self._lock:
            self._wanted += 1
            self._depth = AHEAD_DEPTH
        for start, end in pieces:
            self._ready.put(_Part(read, start, end, work, finish))

    def start_ahead(self, read: Read, work: Work, finish: Callable[[Read], None]) -> None:
        """Read a record whole, after those started ahead before it, when nobody waits for another one."""
        with self._lock:
            self._ahead.append(_Part(read, 0, read.size, work, finish))
            self._release()

    def take_back(self, read: Read | None = None) -> Read | None:
        """Take back ``read`` (None: the last) of those started ahead, unless it has begun. What was taken back."""
        with self._lock:
            if read is None:
                return self._ahead.pop().read if self._ahead else None
            for i, part in enumerate(self._ahead):
                if part.read is read:
                    del self._ahead[i]
                    return read
        return None

    def close(self) -> None:
        """Finish what has begun, drop what was only a guess, stop; harmless if repeated."""
        with self._lock:
            self._ahead.clear()
        for _ in self._threads:
            self._ready.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():  # where the last read is what kept the store alive
                thread.join()
        self._threads = []

    def _release(self) -> None:
        """Let guesses begin as far as they may; the lock is held."""
        while self._ahead and not self._wanted and self._guesses < self._depth:
            self._guesses += 1
            self._ready.put(self._ahead.popleft())

    def _serve(self) -> None:
        while (part := self._ready.get()) is not None:
            read, error = part.read, None
            try:
                part.work(read, part.start, part.end)
            except Exception as e:  # raised where the record is waited for
                error = e
            with self._lock:
                read.left -= 1
                read.error = read.error or error
                last = not read.left
            if last:
                if read.error is None:
                    try:
                        part.finish(read)
                    except Exception as e:
                        read.error = e
                with self._lock:
                    if part.wanted:
                        self._wanted -= 1
                    else:
                        self._guesses -= 1
                    self._release()
                self.landed.put(read)
            del part, read, error  # an idle thread keeps nothing alive


class _Part:
    """A piece of a read for one thread. ``wanted`` as it was when it began: a guess may turn out to be wanted."""

    __slots__ = ("end", "finish", "read", "start", "wanted", "work")

    def __init__(self, read: Read, start: int, end: int, work: Work, finish: Callable[[Read], None]) -> None:
        self.read = read
        self.start = start
        self.end = end
        self.work = work
        self.finish = finish
        self.wanted = read.wanted
