"""What the self-test computes with Metal's kernels, and with torch on the processor to compare."""

from __future__ import annotations

from collections.abc import Iterator

from flashpack.kernels.interface import Kernels
from flashpack.kernels.metal.cases import experts, products, steps
from flashpack.kernels.metal.cases.case import Case


def cases(kernels: Kernels) -> Iterator[Case]:
    """All that ``kernels`` can do: steps only where they have them."""
    yield from products.cases()
    yield from experts.cases()
    if kernels.steps() is not None:
        yield from steps.step_cases()
        yield from experts.step_cases()
