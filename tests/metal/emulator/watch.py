"""torch's own operations take their turn among queued launches, as on the one stream of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

Touch = Callable[[set[int], bool], None]


def storages(values: Any) -> set[int]:
    """Addresses of the memory of all tensors in nested arguments."""
    return {t.untyped_storage().data_ptr() for t in tree_leaves(values) if isinstance(t, Tensor)} - {0}


class Operations(TorchDispatchMode):
    """``touch(storages, reads)`` before each operation of this thread on memory; ``reads``: a number is asked for."""

    def __init__(self, touch: Touch) -> None:
        super().__init__()
        self._touch = touch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Composite operations (reshape, contiguous, to) say that they are views, and copy where they must.
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        if composite or not func.is_view:
            self._touch(storages((args, kwargs)), func is torch.ops.aten._local_scalar_dense.default)
        return func(*args, **(kwargs or {}))


class Moves(TorchFunctionMode):
    """The same for ``cpu()``, which does nothing to a CPU tensor and waits on a GPU."""

    def __init__(self, touch: Touch) -> None:
        super().__init__()
        self._touch = touch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cpu:
            self._touch(storages(args), True)
        return func(*args, **(kwargs or {}))


class Watch:
    """Both modes of one thread, entered and left together."""

    def __init__(self, touch: Touch) -> None:
        self._operations = Operations(touch)
        self._moves = Moves(touch)

    def enter(self) -> None:
        self._operations.__enter__()
        self._moves.__enter__()

    def leave(self) -> None:
        if _get_current_dispatch_mode() is not self._operations:
            raise RuntimeError("a lazy gpu must wait() where no other dispatch mode was entered after its first launch")
        self._moves.__exit__(None, None, None)
        self._operations.__exit__(None, None, None)
