"""Quantizing stored values where it is fastest; the bytes and sums are the same everywhere."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashpack.formats.records import Encoding
from flashpack.kernels.cpu import quantize as cpu

DEVICE_VALUES = 2**20
"""Values from which on a search is worth a device's start and the way there and back. Plain rounding never is: the
processor does it in less time than the way takes."""


def quantize(
    stored: NDArray[np.generic], dtype: str, encoding: Encoding, method: str
) -> tuple[cpu.Parts, float, float]:
    """As ``kernels.cpu.quantize.quantize``, on a CUDA device if there is one and it is worth it."""
    if method == "starts" and stored.size >= DEVICE_VALUES:
        from flashpack.kernels.cuda import quantize as cuda  # imports torch

        if cuda.missing() is None:
            return cuda.quantize(stored, dtype, encoding, method)
    return cpu.quantize(stored, dtype, encoding, method)
