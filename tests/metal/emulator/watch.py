"""torch's own operations take their turn among queued launches, as on the one stream of a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves

# Arguments of an operation, and whether it hands a number to the processor.
Touch = Callable[[Any, bool], None]


def storages(values: Any) -> set[int]:
    """Addresses of the memory of all tensors in nested arguments."""
    return {t.untyped_storage().data_ptr() for t in tree_leaves(values) if isinstance(t, Tensor)} - {0}


@functools.cache
def uses_memory(operation: Any) -> bool:
    """Composite operations (reshape, contiguous, to) say that they are views, and copy where they must."""
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd")
    return composite or not operation.is_view


class Watch(TorchDispatchMode):
    """Calls ``touch`` before each operation of this thread on memory, from ``enter`` to ``leave``."""

    def __init__(self, touch: Touch) -> None:
        super().__init__()
        self.touch = touch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if uses_memory(func):
            self.touch((args, kwargs), func is torch.ops.aten._local_scalar_dense.default)
        return func(*args, **(kwargs or {}))

    def enter(self) -> None:
        self.__enter__()

    def leave(self) -> None:
        if _get_current_dispatch_mode() is not self:
            raise RuntimeError("a lazy gpu must wait() where no other dispatch mode was entered after its first launch")
        self.__exit__(None, None, None)


def cpu(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """``Tensor.cpu``: nothing for a CPU tensor, so no operation; of a GPU's it waits."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Watch):
            mode.touch(tensor, True)
    return plain_cpu(tensor, *arguments, **options)


plain_cpu = Tensor.cpu
Tensor.cpu = cpu  # type: ignore[method-assign]
