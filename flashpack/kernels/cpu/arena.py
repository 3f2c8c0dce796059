"""The arena: the memory in which records lie, in slots, in huge pages where the system has them."""

from __future__ import annotations

import contextlib
import mmap

import torch


class HostArena:
    """``size`` bytes of private anonymous memory: page-aligned, as direct reads need it, and taken from the system only
    when it is written to. It is given back when nobody refers to it any more."""

    def __init__(self, size: int) -> None:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Only a wish: systems without huge pages refuse it.
            with contextlib.suppress(OSError):
                mapping.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = memoryview(mapping)
        self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)

    def room(self, start: int, size: int) -> memoryview:
        return self._bytes[start : start + size]

    def landed(self, start: int, record: memoryview) -> None:
        pass
