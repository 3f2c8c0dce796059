"""The arena: the memory in which records lie, in slots."""

from __future__ import annotations

import mmap

import torch


class HostArena:
    """``size`` bytes of private anonymous memory: page-aligned, as direct reads need it, and taken from the system only
    when it is written to. It is given back when nobody refers to it any more.

    Huge pages are not asked for. Where memory is in small pieces the system has to look for them while a record is read,
    and a virtual machine's host gives them slowly: a start takes much longer, and decoding gains 4 % at the most
    (docs/experiments/store.md).
    """

    def __init__(self, size: int) -> None:
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = memoryview(mapping)
        self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)

    def room(self, start: int, size: int) -> memoryview:
        return self._bytes[start : start + size]

    def landed(self, start: int, record: memoryview) -> None:
        pass
