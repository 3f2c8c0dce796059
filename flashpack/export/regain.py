"""Finding the integers, scales and biases again that float32 values were decoded from.

A pack keeps routers as plain values, also where an MLX checkpoint had them quantized. Decoding rounds too little to
lose any of the integers, so they can be had back.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashpack.formats.affine import dequantize, pack_bits
from flashpack.formats.dtypes import from_float32, to_float32
from flashpack.formats.records import Encoding

Parts = dict[str, NDArray[np.generic]]


def regain(values: NDArray[np.float32], encoding: Encoding) -> Parts | None:
    """The parts of ``values`` [R, I] in the ``affine`` ``encoding`` that decode to the very same values, or None.

    The bias must be an extreme of its group, as that of MLX's quantizer is (``mlx/backend/cpu/quantized.cpp``). Where
    several parts would do, those are preferred that it more likely made: the bias is the extreme of the larger
    magnitude, the other extreme has the largest code. In one of 16,000 groups of 4 bits it made others.
    """
    if values.shape[-1] % encoding.group_size:
        return None
    for rows in (values[:1], values):  # of values that were never quantized, one row says so
        parts = _search(rows, encoding)
        if not np.array_equal(dequantize(*parts, encoding.bits, encoding.group_size, encoding.dtype), rows):
            return None
    return dict(zip(encoding.part_names, parts, strict=True))


def _search(
    values: NDArray[np.float32], encoding: Encoding
) -> tuple[NDArray[np.uint32], NDArray[np.generic], NDArray[np.generic]]:
    """Words, scales and biases; any for groups that have none."""
    groups = values.reshape(-1, encoding.group_size)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    below = np.abs(low) > np.abs(high)
    extremes = np.where(below, low, high), np.where(below, high, low)
    scales, biases = np.zeros(len(groups), np.float32), extremes[0].copy()
    codes = np.zeros(groups.shape, np.uint8)
    left = np.flatnonzero(low < high)
    for bias, other in (extremes, extremes[::-1]):
        tried = left[_rounded(bias[left], encoding.dtype) == bias[left]]
        for most in range(2**encoding.bits - 1, 0, -1):
            if not len(tried):
                break
            group, start = groups[tried], bias[tried, None]
            scale = _rounded((other[tried] - bias[tried]) / np.float32(most), encoding.dtype)[:, None]
            with np.errstate(all="ignore"):
                found = np.rint((group - start) / scale)
                hit = (found * scale + start == group).all(axis=-1)
                hit &= (found.min(axis=-1) >= 0) & (found.max(axis=-1) < 2**encoding.bits)
            which = tried[hit]
            scales[which], biases[which], codes[which] = scale[hit, 0], bias[which], found[hit]
            tried = tried[~hit]
            left = np.setdiff1d(left, which, assume_unique=True)
    shape = (values.shape[0], -1)
    stored = [from_float32(array.reshape(shape), encoding.dtype) for array in (scales, biases)]
    return pack_bits(codes.reshape(values.shape), encoding.bits), stored[0], stored[1]


def _rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    return to_float32(from_float32(values, dtype), dtype)
