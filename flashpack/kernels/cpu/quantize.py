"""Quantizing stored values: the native routine where it is built, otherwise numpy; the same bits either way."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashpack.formats import affine
from flashpack.formats.dtypes import to_float32
from flashpack.kernels.cpu import native

BLOCK_VALUES = 2**17
"""Values that numpy quantizes at a time: 512 KiB of float32, so that the passes over a block hit the L2 cache."""


def quantize(
    stored: NDArray[np.generic], dtype: str, bits: int, group_size: int, scale_dtype: str
) -> tuple[NDArray[np.uint32], NDArray[np.generic], NDArray[np.generic], float, float]:
    """[rows, I] values as stored (BF16, F16 or F32) -> what ``affine.quantize`` makes of them, and two sums.

    Returns words uint32 [rows, I*bits/32], scales and biases [rows, I/group_size] as stored, the sum of squared errors,
    which is infinite or NaN exactly if a value or what it decodes to is, and the sum of squared values.
    """
    if native.available():
        return native.quantize(stored, dtype, bits, group_size, scale_dtype)
    words, scales, biases = [], [], []
    error = norm = 0.0
    step = max(1, BLOCK_VALUES // stored.shape[1])
    for start in range(0, len(stored), step):
        values = to_float32(stored[start : start + step], dtype)
        block = affine.quantize(values, bits, group_size, scale_dtype)
        words.append(block[0])
        scales.append(block[1])
        biases.append(block[2])
        with np.errstate(invalid="ignore"):  # infinity - infinity: seen by the caller in the sum
            difference = block[3] - values
        # In double precision, where no square of a float32 is infinite.
        error += float(np.square(difference, dtype=np.float64).sum())
        norm += float(np.square(values, dtype=np.float64).sum())
    return np.concatenate(words), np.concatenate(scales), np.concatenate(biases), error, norm
