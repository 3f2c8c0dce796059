"""Numbers that kernels read: constants, and the tables of single launches."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from flashpack.formats.records import align
from flashpack.kernels.metal.device import Gpu

_ROOM = 2**16
"""Numbers that tables have room for between two waits, to begin with."""

_ALIGNMENT = 64
"""Numbers: tables begin at multiples of 256 bytes."""


class Tables:
    """Makes int32 tensors on the device. Nothing that a launch may still read is overwritten."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._kept: dict[bytes, Tensor] = {}
        self._used = 0
        self._make_room(_ROOM)

    def constant(self, *values: float) -> Tensor:
        """Numbers of a structure, 32 bits each, integers or floats: kept, so each call gives the same tensor."""
        content = struct.pack("<" + "".join("f" if isinstance(v, float) else "i" for v in values), *values)
        found = self._kept.get(content)
        if found is None:
            found = torch.frombuffer(bytearray(content), dtype=torch.int32).to(self._gpu.device)
            self._kept[content] = found
        return found

    def table(self, numbers: Sequence[int]) -> Tensor:
        """Numbers for launches from now until the next ``waited``."""
        if self._host is None:
            return torch.tensor(numbers, dtype=torch.int32).to(self._gpu.device)
        start, end = self._used, self._used + len(numbers)
        if end > len(self._tensor):
            self._gpu.wait()
            start, end = 0, len(numbers)
            if end > len(self._tensor):
                self._make_room(2 * end)
        self._host[start:end] = numbers
        self._used = align(end, _ALIGNMENT)
        return self._tensor[start:end]

    def waited(self) -> None:
        """All launches have run: no table is in use."""
        self._used = 0

    def _make_room(self, size: int) -> None:
        self._tensor = torch.empty(size, dtype=torch.int32, device=self._gpu.device)
        # What had this memory before may still be in use: torch gives it to others in the order of the device.
        self._gpu.wait()
        host = self._gpu.host(self._tensor)
        self._host = None if host is None else host.numpy()
        self._used = 0
