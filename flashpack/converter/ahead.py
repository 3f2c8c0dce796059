"""Work done ahead by other threads, taken in order: reading and encoding go on while what is ready is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Slot = TypeVar("Slot")
Result = TypeVar("Result")


def in_order(
    task: Callable[[int, Slot], Result], count: int, slots: Sequence[Slot]
) -> Generator[tuple[int, Slot, Result]]:
    """Run ``task(i, slot)`` for each i below ``count``, one thread for each slot; yield (i, slot, result) by i.

    A slot is the caller's until the next item is asked for. What a task raises is raised when its turn comes. All
    threads have stopped when the iteration ends, however it ends; close it if it may not be exhausted.
    """
    pool = ThreadPoolExecutor(len(slots))
    pending: deque[Future[Result]] = deque()
    try:
        for i in range(min(count, len(slots))):
            pending.append(pool.submit(task, i, slots[i]))
        for i in range(count):
            slot = slots[i % len(slots)]
            yield i, slot, pending.popleft().result()
            if i + len(slots) < count:
                pending.append(pool.submit(task, i + len(slots), slot))
    finally:
        pool.shutdown(cancel_futures=True)
