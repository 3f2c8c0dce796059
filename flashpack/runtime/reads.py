"""A pool of reading threads in which a read that somebody waits for comes before one that is only a guess.

A record is read whole by one thread: to split it into parallel reads gained nothing (docs/experiments/store.md).
Positional reads and checksums release the interpreter's lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from flashpack.runtime.cache import Key

READ_THREADS = 8
"""Reads in flight, unless a profile says otherwise. A drive reaches its rate only with several large reads queued."""

AHEAD_DEPTH = 2
"""Guesses in flight at once, when there are reads that somebody waits for: so many may be in their way."""

FIRST_DEPTH = 4
"""Guesses in flight before anybody has waited. Not more: checking them takes processor time from the start."""


@dataclass(eq=False, slots=True)
class Read:
    """One record on its way from the drive into the arena.

    ``slot``: its place, ``size``: bytes to read. ``wanted``: somebody waits for it; ``ahead``: it was begun, or goes
    on, without that. ``error``: why it failed; valid once it has landed.
    """

    key: Key
    slot: int
    size: int
    wanted: bool
    ahead: bool
    error: Exception | None = None


class ReadPool:
    """``threads`` threads. ``landed`` gets every read when it is complete or has failed.

    Reads that nobody waits for begin only while none that somebody waits for is unfinished. The pool refers to its
    owner only through the reads it has not finished.
    """

    def __init__(self, threads: int = READ_THREADS) -> None:
        self.landed: SimpleQueue[Read] = SimpleQueue()
        self._ready: SimpleQueue[tuple[Read, Callable[[Read], None], bool] | None] = SimpleQueue()
        self._lock = threading.Lock()  # of all that follows
        self._ahead: deque[tuple[Read, Callable[[Read], None]]] = deque()
        self._wanted = 0
        self._guesses = 0
        self._depth = FIRST_DEPTH
        self._threads = [
            threading.Thread(target=self._serve, name=f"flashpack-read-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def start(self, read: Read, work: Callable[[Read], None]) -> None:
        """Read a record that somebody waits for; ``work`` does it."""
        with self._lock:
            self._wanted += 1
            self._depth = AHEAD_DEPTH
        self._ready.put((read, work, True))

    def start_ahead(self, read: Read, work: Callable[[Read], None]) -> None:
        """Read a record after those started ahead before it, when nobody waits for another one."""
        with self._lock:
            self._ahead.append((read, work))
            self._release()

    def take_back(self, read: Read | None = None) -> Read | None:
        """Take back ``read`` (None: the last) of those started ahead, unless it has begun. What was taken back."""
        with self._lock:
            if read is None:
                return self._ahead.pop()[0] if self._ahead else None
            for i, (other, _) in enumerate(self._ahead):
                if other is read:
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
            self._ready.put((*self._ahead.popleft(), False))

    def _serve(self) -> None:
        while (task := self._ready.get()) is not None:
            read, work, wanted = task
            try:
                work(read)
            except Exception as e:  # raised where the record is waited for
                read.error = e
            with self._lock:
                if wanted:
                    self._wanted -= 1
                else:
                    self._guesses -= 1
                self._release()
            self.landed.put(read)
            del task, read, work  # an idle thread keeps nothing alive
