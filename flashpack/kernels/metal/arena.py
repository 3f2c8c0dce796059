"""Memory of the GPU for records: reads go straight into it where the processor can reach it."""

from __future__ import annotations

import mmap
import threading

import torch

from flashpack.kernels.metal.device import Gpu


class MetalArena:
    """``kernels.interface.Arena`` in one tensor of ``size`` bytes on the GPU.

    Where the processor cannot write to it, each thread reads into a buffer of its own, which is copied.
    """

    def __init__(self, gpu: Gpu, size: int) -> None:
        self.tensor = torch.empty(size, dtype=torch.uint8, device=gpu.device)
        # What had this memory before may still be in use: torch gives it to others in the order of the device.
        gpu.wait()
        alias = gpu.host(self.tensor)
        self._bytes = None if alias is None else alias.numpy().data
        self._buffers = threading.local()

    def room(self, start: int, size: int) -> memoryview:
        return self._buffer(size) if self._bytes is None else self._bytes[start : start + size]

    def landed(self, start: int, record: memoryview) -> None:
        if self._bytes is None:
            self.tensor[start : start + len(record)].copy_(torch.frombuffer(record, dtype=torch.uint8))

    def _buffer(self, size: int) -> memoryview:
        """This thread's memory, aligned to a page."""
        kept: memoryview | None = getattr(self._buffers, "kept", None)
        if kept is None or len(kept) < size:
            kept = self._buffers.kept = memoryview(mmap.mmap(-1, size))
        return kept[:size]
