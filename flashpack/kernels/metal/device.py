"""The little of Metal that kernels need, over ``torch.mps``. Tests put an emulator in its place."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from flashpack.errors import DeviceError


class Gpu(Protocol):
    """A GPU that shares its memory with the processor, and runs what is launched in the order in which it is.

    ``device``: where its tensors live. torch's own operations on them run in the same order.
    """

    device: torch.device

    def compile(self, source: str) -> Any:
        """Kernels by name, called as those of ``torch.mps.compile_shader``; ``SyntaxError`` if it is no such source."""
        ...

    def host(self, tensor: Tensor) -> Tensor | None:
        """The memory of a tensor on ``device`` as one on the processor; None where that is not possible.

        What the processor writes there before a launch, the launch sees; what kernels write is there after ``wait``.
        """
        ...

    def commit(self) -> None:
        """What has been launched begins to run; does not wait."""
        ...

    def wait(self) -> None:
        """Until everything launched has run."""
        ...


class Mps:
    """``Gpu`` of an Apple machine. Never run by the project: see docs/metal.md."""

    def __init__(self) -> None:
        missing = unavailable()
        if missing:
            raise DeviceError(f"device 'mps': {missing}")
        self.device = torch.device("mps")
        self._event = torch.mps.Event()

    def compile(self, source: str) -> Any:
        return torch.mps.compile_shader(source)

    def host(self, tensor: Tensor) -> Tensor | None:
        alias = getattr(torch.mps, "_host_alias_storage", None)  # from torch 2.13 on, and not a public name yet
        if alias is None:
            return None
        try:
            storage = alias(tensor.untyped_storage())
        except RuntimeError:  # memory that the processor cannot see
            return None
        return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())

    def commit(self) -> None:
        # Recording an event commits what has been encoded; nothing ever waits for this one.
        self._event.record()

    def wait(self) -> None:
        torch.mps.synchronize()


def unavailable() -> str | None:
    """Why this machine or this torch has no Metal; None if it has."""
    if not torch.backends.mps.is_built():
        return "this torch was built without Metal; Metal needs macOS 14 or newer on Apple silicon"
    if not torch.backends.mps.is_available():
        return "Metal is not available here; it needs macOS 14 or newer on Apple silicon"
    if not hasattr(torch.mps, "compile_shader"):
        return f"torch {torch.__version__} cannot compile Metal kernels; install torch 2.9 or newer"
    return None
