"""What a case of the self-test is."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from flashpack.kernels.cpu.reference import ReferenceKernels
from flashpack.kernels.interface import Kernels, Steps

PRODUCT = 1e-5
"""Largest error: the largest difference, relative to the largest value expected. Sums in another order and fused
multiplications differ by a few roundings of float32, 6e-8 each; what is wrong differs by far more than this."""

EXPERT = 3e-5
"""Of two products and an activation, whose exponential Metal may have 4 roundings off."""

DECODED = 1e-6
"""Of single values: a fused multiplication and addition is not rounded in between."""

SAME = 0.0

REFERENCE = ReferenceKernels(1)

Pairs = list[tuple[Tensor, Tensor]]
"""What was found and what was expected, on the processor."""


class Case(Protocol):
    """``run`` computes with ``kernels``; the error may be up to ``tolerance``.

    ``alone``: a wrong result speaks against the kernels that were launched. Otherwise against what they have in common.
    """

    tolerance: ClassVar[float]
    alone: ClassVar[bool]

    @property
    def name(self) -> str: ...

    def run(self, kernels: Kernels) -> Pairs: ...


def steps_of(kernels: Kernels) -> Steps:
    steps = kernels.steps()
    assert steps is not None, "steps are tested where no kernel is refused yet"
    return steps
