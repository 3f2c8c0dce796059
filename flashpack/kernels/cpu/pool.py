"""Threads whose number cannot reach a result.

Work is cut into pieces by its shape alone, and each piece is computed by exactly one thread, with torch's own threads
off: MKL and OpenBLAS cut a sum by the number of threads, torch cuts an elementwise operation so that other values go
through the remainder's code, and attention gives each thread a buffer of another alignment. So the number of threads
decides who computes a piece, never how.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's operations of this thread run on it alone; its own number of threads is restored after."""
    outside = torch.get_num_threads()
    if outside == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(outside)


class Pool:
    """``threads`` threads, the caller's among them. The others start at the first use."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._helpers: ThreadPoolExecutor | None = None
        self._starting = threading.Lock()

    def run(self, work: Callable[[T], object], pieces: Iterable[T]) -> None:
        """Call ``work`` once with every piece, in any order; nothing is recorded for autograd.

        ``work`` must write to places of its own. What it raises is raised here, once no thread works any more.
        """
        todo = deque(pieces)
        inference = torch.is_inference_mode_enabled()  # each thread has a mode of its own

        def drain() -> None:
            with torch.inference_mode(inference), torch.no_grad():
                while todo:
                    try:
                        piece = todo.popleft()
                    except IndexError:  # another thread was faster
                        return
                    work(piece)

        extra = min(self._threads, len(todo)) - 1
        if extra < 1:
            with one_thread():
                drain()
            return
        helpers = self._started()
        futures = [helpers.submit(drain) for _ in range(extra)]
        try:
            with one_thread():
                drain()
        finally:
            todo.clear()
            begun = [future for future in futures if not future.cancel()]  # the others are not waited for
            wait(begun)
        for future in begun:
            future.result()

    def _started(self) -> ThreadPoolExecutor:
        """The other threads, each with torch's threads off for good."""
        with self._starting:
            if self._helpers is None:
                self._helpers = _start(self._threads - 1)
            return self._helpers


@cache
def pool(threads: int) -> Pool:
    """The pool of ``threads`` threads; all models of the process share it."""
    return Pool(threads)


def _start(count: int) -> ThreadPoolExecutor:
    # A thread that sets its number of threads also sets what later threads of the process begin with, so that
    # all are waited for before the caller's number is set again.
    outside = torch.get_num_threads()
    helpers = ThreadPoolExecutor(count, thread_name_prefix="flashpack-compute")
    ready = threading.Barrier(count + 1)

    def prepare() -> None:
        torch.get_num_threads()  # the first question sets the thread's number to the process's, so not later
        torch.set_num_threads(1)
        ready.wait()

    try:
        for _ in range(count):
            helpers.submit(prepare)
        ready.wait()
    except BaseException:
        ready.abort()
        raise
    finally:
        torch.set_num_threads(outside)
    return helpers
