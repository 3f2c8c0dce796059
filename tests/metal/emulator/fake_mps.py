"""``Gpu`` of flashpack.kernels.metal.device on the processor: its tensors are CPU tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .library import ORDERS, Library
from .watch import Watch, storages

Run = Callable[[int, int, int], None]
NO_GUARD, AT_END, AT_START = range(3)


class FakeMps:
    """Runs kernels in the emulator: at once, or lazily, as late as a GPU might.

    ``schedule``: in which order groups and threads run: "forward", "reversed" or "random". Reversed, float32 numbers
    below 2^-126 are zeros, which a GPU may make of them, too.
    ``guarded``: each argument is copied for a launch so that what lies beside it cannot be read or written.
    ``lazy``: launches run at ``wait``, or when an operation of torch in a thread that launches touches memory that a
    queued launch uses. Memory written or read without torch (numpy, preadv) does not make them run: on a GPU it is not
    in order with launches either.
    ``launches``, ``commits``, ``waits`` count calls; lazy, ``waits`` also counts ``cpu()`` and ``item()``.
    A kernel that does wrong is a ``RuntimeError`` that names it, raised where it runs.
    """

    device = torch.device("cpu")

    def __init__(self, lazy: bool = False, schedule: str = "forward", seed: int = 0, guarded: bool = True) -> None:
        if schedule not in ORDERS:
            raise ValueError(f"schedule={schedule!r}: one of {', '.join(ORDERS)}")
        self.launches = self.commits = self.waits = 0
        self._lazy = lazy
        self._order = ORDERS[schedule]
        # Ends are what kernels overrun most; starts are looked at when threads run in reverse.
        self._guards = {"forward": [AT_END], "reversed": [AT_START], "random": [AT_END, AT_START]}[schedule]
        if not guarded:
            self._guards = [NO_GUARD]
        self._seed = seed
        self._queue: list[tuple[set[int], Callable[[], None]]] = []
        self._lock = threading.RLock()
        self._watches = threading.local()

    def compile(self, source: str) -> Library:
        return Library(source, self._submit)

    def host(self, tensor: Tensor) -> Tensor | None:
        return tensor.detach()

    def commit(self) -> None:
        self.commits += 1

    def wait(self) -> None:
        self.waits += 1
        self._leave()
        self._run_queue()

    def _submit(self, run: Run, tensors: list[Tensor]) -> None:
        with self._lock:
            self.launches += 1
            guard = self._guards[self.launches % len(self._guards)]
            seed = self._seed + self.launches
            if self._lazy:
                self._queue.append((storages(tensors), lambda: run(self._order, guard, seed)))
                self._enter()
            else:
                run(self._order, guard, seed)

    def _run_queue(self) -> None:
        with self._lock:
            queue, self._queue = self._queue, []
            for _, run in queue:
                run()

    def _touch(self, arguments: Any, reads: bool) -> None:
        """Before an operation of torch. ``reads``: it hands a number to the processor, so waits."""
        self.waits += reads
        if self._queue:
            touched = storages(arguments)
            if any(used & touched for used, _ in self._queue):
                self._run_queue()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """This thread's operations are in order with launches throughout. Needed lazily where launches are made inside
        contexts of torch (``inference_mode``) that end before ``wait``: they would take their order with them."""
        self._enter()
        self._watches.kept = True
        try:
            yield
        finally:
            self._watches.kept = False
            self._leave()

    def _enter(self) -> None:
        if not hasattr(self._watches, "here"):
            self._watches.here = Watch(self._touch)
            self._watches.here.enter()

    def _leave(self) -> None:
        if hasattr(self._watches, "here") and not getattr(self._watches, "kept", False):
            self._watches.here.leave()
            del self._watches.here
