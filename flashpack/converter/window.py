"""Reading ahead from a source that is far away: what the next steps need is fetched before they begin.

Steps are gathered into batches of about ``BATCH_BYTES``, and what touches in a batch is one request (of at most
``PIECE_BYTES``). So the scales of ten experts that lie beside each other in the source are fetched together, and what
two matrices of an expert share is fetched once. All batches that are fetched or held count against one budget.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np

from flashpack.converter.folder import Reader, Span, Stopped

HELD_BYTES = 256 * 2**20
"""What all windows of a folder hold together, unless a single batch is larger: then that one alone."""

AHEAD_BYTES = 64 * 2**20
"""A window fetches no more than this before it is asked for, in whole batches, and at least one."""

BATCH_BYTES = 16 * 2**20
"""A batch has as many steps as fit, and at least one."""

PIECE_BYTES = 8 * 2**20
"""A request asks for no more than this, so that several share the way and a fault costs little."""

Fetch = Callable[[str, int, memoryview, threading.Event], Future[None]]
"""Begin to fill a buffer from a byte of a file."""


class Budget:
    """Bytes that may be held at once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._held = 0
        self._waiting = 0
        self._changed = threading.Condition()

    def take(self, count: int, stop: threading.Event) -> None:
        """Wait until ``count`` bytes fit, or nothing else is held."""
        with self._changed:
            self._waiting += 1
            try:
                while self._held and self._held + count > self._size:
                    if stop.is_set():
                        raise Stopped
                    self._changed.wait(0.1)
                self._held += count
            finally:
                self._waiting -= 1

    def try_take(self, count: int) -> bool:
        """Take ``count`` bytes if they fit now and nobody waits for them."""
        with self._changed:
            if self._waiting or self._held + count > self._size:
                return False
            self._held += count
            return True

    def give(self, count: int) -> None:
        with self._changed:
            self._held -= count
            self._changed.notify_all()


@dataclass
class _Run:
    """Bytes of a file without gaps, on their way."""

    file: str
    begin: int
    data: memoryview
    pieces: list[Future[None]] = field(default_factory=list)


@dataclass
class _Batch:
    """The runs of some steps, sorted; ``left`` of them have not ended."""

    runs: list[_Run]
    size: int
    left: int

    def find(self, file: str, offset: int, count: int) -> _Run | None:
        """The run that holds these bytes."""
        at = bisect_right(self.runs, (file, offset), key=lambda run: (run.file, run.begin)) - 1
        run = self.runs[at] if at >= 0 else None
        fits = run is not None and run.file == file and offset + count <= run.begin + len(run.data)
        return run if fits else None


class Window:
    """``folder.steps`` of a folder far away. ``spans(i)`` are the reads of step i, of ``count``."""

    def __init__(
        self,
        reader: Reader,
        fetch: Fetch,
        budget: Budget,
        spans: Callable[[int], list[Span]],
        count: int,
        stop: threading.Event,
    ) -> None:
        self._reader, self._fetch, self._budget, self._stop = reader, fetch, budget, stop
        self._spans, self._count = spans, count
        self._lock = threading.Lock()
        self._issuing = threading.Lock()
        self._batches: dict[int, _Batch] = {}  # by step
        self._ahead: tuple[list[Span], int] | None = None  # a batch that has not been begun
        self._next = 0  # the first step without a batch
        self._calling_off = threading.Event()

    @contextmanager
    def step(self, number: int) -> Iterator[Reader]:
        """See ``Steps``."""
        with self._issuing:
            while number >= self._next:
                self._issue(wait=True)
            while self._next < self._count and self._unused(number) < AHEAD_BYTES and self._issue(wait=False):
                pass
        batch = self._batches[number]
        try:
            yield _Part(self, batch)
        finally:
            self._end(number)

    def close(self) -> None:
        """Call off what is under way; no step may be open."""
        self._calling_off.set()
        for number in list(self._batches):
            self._end(number)

    def _unused(self, number: int) -> int:
        """Bytes of batches behind that of step ``number``."""
        with self._lock:
            later = {id(b): b.size for step, b in self._batches.items() if step > number}
            later.pop(id(self._batches.get(number)), None)
        return sum(later.values())

    def _issue(self, wait: bool) -> bool:
        """Begin to fetch the next batch; whether there is memory for it."""
        if self._ahead is None:
            self._ahead = self._gather()
        spans, steps = self._ahead
        merged = merge(spans)
        size = sum(count for _, _, count in merged)
        if wait:
            self._budget.take(size, self._stop)
        elif not self._budget.try_take(size):
            return False
        # Memory of its own, not of the interpreter's heap, so that it goes back to the system at once.
        runs = [_Run(file, begin, np.empty(count, dtype=np.uint8).data) for file, begin, count in merged]
        batch = _Batch(runs, size, steps)
        for run in runs:
            for at in range(0, len(run.data), PIECE_BYTES):
                piece = run.data[at : at + PIECE_BYTES]
                run.pieces.append(self._fetch(run.file, run.begin + at, piece, self._calling_off))
        with self._lock:
            self._batches |= dict.fromkeys(range(self._next, self._next + steps), batch)
        self._next += steps
        self._ahead = None
        return True

    def _gather(self) -> tuple[list[Span], int]:
        """The spans of the next batch, and how many steps they are."""
        spans: list[Span] = []
        size = steps = 0
        for number in range(self._next, self._count):
            more = self._spans(number)
            size += sum(count for _, _, count in more)
            if steps and size > BATCH_BYTES:
                break
            spans += more
            steps += 1
        return spans, steps

    def _end(self, number: int) -> None:
        with self._lock:
            batch = self._batches.pop(number)
            batch.left -= 1
            if batch.left:
                return
        for run in batch.runs:
            for piece in run.pieces:
                piece.cancel()
                with suppress(Exception, CancelledError):  # whoever needed it has seen it
                    piece.result(timeout=0 if self._calling_off.is_set() else None)
            run.data = memoryview(b"")
        self._budget.give(batch.size)

    def read_from(self, batch: _Batch, file: str, offset: int, buffer: memoryview) -> None:
        """Copy what has been fetched, or wait for it; what was not foreseen is read by itself."""
        run = batch.find(file, offset, buffer.nbytes)
        if run is None:
            self._reader.read_into(file, offset, buffer)
            return
        start = offset - run.begin
        end = start + buffer.nbytes
        for piece in run.pieces[start // PIECE_BYTES : -(-end // PIECE_BYTES)]:
            while True:
                if self._stop.is_set():
                    raise Stopped
                with suppress(TimeoutError):
                    piece.result(timeout=0.5)
                    break
        target = np.frombuffer(buffer, dtype=np.uint8)
        target[:] = np.frombuffer(run.data[start:end], dtype=np.uint8)


class _Part:
    """What a step reads from."""

    def __init__(self, window: Window, batch: _Batch) -> None:
        self._window, self._batch = window, batch

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        self._window.read_from(self._batch, file, offset, buffer)


def merge(spans: list[Span]) -> list[Span]:
    """The same bytes in as few spans as possible, sorted. A gap that is small beside what is before it is fetched
    too: 4 bytes that nobody needs, between two matrices, are cheaper than another request."""
    merged: list[Span] = []
    for file, begin, count in sorted(set(spans)):
        if not count:
            continue
        last_file, last, length = merged[-1] if merged else ("", 0, 0)
        if file == last_file and begin <= last + length + min(length // 64, 2**14):
            merged[-1] = (file, last, max(length, begin + count - last))
        else:
            merged.append((file, begin, count))
    return merged
