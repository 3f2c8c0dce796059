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

    Where several do, those of MLX's quantizer are preferred (``mlx/ops.cpp``): the bias is the group's extreme of the
    larger magnitude, and the other extreme has the largest code.
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
        for most in range(2**encoding.bits - 1, 0, -1):
            if not len(left):
                break
            group, start = groups[left], bias[left, None]
            rounded = from_float32((other[left] - bias[left]) / np.float32(most), encoding.dtype)
            scale = to_float32(rounded, encoding.dtype)[:, None]
            with np.errstate(divide="ignore", invalid="ignore"):
                found = np.rint((group - start) / scale)
            hit = (found * scale + start == group).all(axis=-1)
            hit &= (found.min(axis=-1) >= 0) & (found.max(axis=-1) < 2**encoding.bits)
            which = left[hit]
            scales[which], biases[which], codes[which] = scale[hit, 0], bias[which], found[hit]
            left = left[~hit]
    shape = (values.shape[0], -1)
    stored = [from_float32(array.reshape(shape), encoding.dtype) for array in (scales, biases)]
    return pack_bits(codes.reshape(values.shape), encoding.bits), stored[0], stored[1]
