"""``Gpu`` of flashpack.kernels.metal.device on the processor: its tensors are CPU tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .library import ORDERS, Library


class FakeMps:
    """Runs launches at once, or lazily: as late as an Apple GPU might.

    ``schedule``: in which order groups and threads run: "forward", "reversed" or "random".
    ``guarded``: each argument is copied for a launch so that what lies beside it cannot be read or written.
    ``launches``, ``commits``, ``waits`` count calls. A kernel that does wrong is a ``RuntimeError`` that names it.
    """

    device = torch.device("cpu")

    def __init__(self, lazy: bool = False, schedule: str = "forward", seed: int = 0, guarded: bool = True) -> None:
        self.lazy = lazy
        self.schedule = schedule
        self.seed = seed
        self.guarded = guarded
        self.launches = self.commits = self.waits = 0

    def compile(self, source: str) -> Library:
        return Library(source, self._submit)

    def host(self, tensor: Tensor) -> Tensor | None:
        return tensor.detach()

    def commit(self) -> None:
        self.commits += 1

    def wait(self) -> None:
        self.waits += 1

    def _submit(self, run: Callable[[int, int, int], None], tensors: list[Tensor]) -> None:
        self.launches += 1
        # Ends are what kernels overrun most; starts are looked at when the threads run in reverse.
        guard = {"forward": 1, "reversed": 2, "random": 1 + self.launches % 2}[self.schedule] if self.guarded else 0
        run(ORDERS[self.schedule], guard, self.seed + self.launches)
