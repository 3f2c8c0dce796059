"""What tests of the steps on Metal share."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from flashpack.kernels.metal.device import Gpu
from flashpack.kernels.metal.kernels import MetalKernels
from flashpack.kernels.metal.steps import MetalSteps


def steps_on(gpu: Gpu) -> MetalSteps:
    return MetalSteps(MetalKernels(gpu))


def assert_close(found: Tensor, expected: Any, tolerance: float) -> None:
    """Within ``tolerance`` of the largest of ``expected``."""
    found, expected = found.double().numpy(), np.asarray(expected)
    assert found.shape == expected.shape
    worst = np.abs(found - expected).max()
    assert worst <= tolerance * np.abs(expected).max(), f"off by {worst / np.abs(expected).max():.1e}"
