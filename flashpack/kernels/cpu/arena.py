"""The arena: the memory in which records lie, in slots, in huge pages where the system has them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import threading

import torch

_POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE, from 5.14 on: take pages as if they were written to, and leave what is in them."""

_PIECE = 2**23


class HostArena:
    """``size`` bytes of private anonymous memory: page-aligned, as direct reads need it, and taken from the system only
    when it is written to. It is given back when nobody refers to it any more.

    ``early``: memory to take it from, if there is enough.
    """

    def __init__(self, size: int, early: PrefaultedMemory | None = None) -> None:
        mapping = early.mapping if early is not None and len(early.mapping) >= size else _map(size)
        if early is not None:
            early.keep(size if mapping is early.mapping else 0)
        self._bytes = memoryview(mapping)[:size]
        self.tensor = torch.frombuffer(mapping, dtype=torch.uint8, count=size)

    def room(self, start: int, size: int) -> memoryview:
        return self._bytes[start : start + size]

    def landed(self, start: int, record: memoryview) -> None:
        pass


class PrefaultedMemory:
    """Up to ``size`` bytes for an arena whose size is not known yet. ``take`` faults their pages in, in the background,
    from the first on: on a virtual machine, whose host gives it memory page by page, that can take longer than reading
    records into them. ``taken``: how many have come; to be asked for while nothing is taken.
    """

    def __init__(self, size: int) -> None:
        self.mapping = _map(size)
        self.taken = 0
        self._limit = size
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    def take(self, most: int) -> None:
        """Go on until there are ``most`` bytes, or until ``stop``. Where the system cannot do that, nothing happens."""
        self.stop()
        if sys.platform != "linux":
            return
        self._stopped.clear()
        whole_pages = min(most, self._limit) // mmap.PAGESIZE * mmap.PAGESIZE
        self._thread = threading.Thread(target=self._take, args=(whole_pages,), name="flashpack-memory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more; harmless if nothing is taken."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None

    def keep(self, size: int) -> None:
        """Give back what is behind ``size`` bytes, and take no more than these."""
        self.stop()
        self._limit = size
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if self.taken > size and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED, size, self.taken - size)
            self.taken = size

    def _take(self, most: int) -> None:
        libc = ctypes.CDLL(None)
        held = ctypes.c_char.from_buffer(self.mapping)  # the mapping lives as long
        start = ctypes.addressof(held)
        while self.taken < most and not self._stopped.is_set():
            size = min(_PIECE, most - self.taken)
            place = ctypes.c_void_p(start + self.taken), ctypes.c_size_t(size)
            if libc.madvise(*place, _POPULATE_WRITE):  # the interpreter's lock is released meanwhile
                return
            self.taken += size


def _map(size: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Only a wish: systems without huge pages refuse it.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping
