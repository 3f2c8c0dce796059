"""Finding the integers, scales and biases again that float32 values were decoded from.

A pack keeps routers as plain values, also where an MLX checkpoint had them quantized. They were decoded from 8-bit
integers without a rounding that loses any of them, so they can be had back.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashpack.formats.affine import dequantize, pack_bits
from flashpack.formats.dtypes import from_float32, to_float32
from flashpack.formats.records import Encoding


def regain(values: NDArray[np.float32], encoding: Encoding) -> dict[str, NDArray[np.generic]] | None:
    """The parts of ``values`` [R, I] in the ``affine`` ``encoding`` if they decode to the very same values, else None.

    Where several do, those of MLX's quantizer are preferred: the bias is the group's extreme of the larger magnitude,
    and the other extreme has the largest code.
    """
    if values.shape[-1] % encoding.group_size:
        return None
    groups = values.reshape(-1, encoding.group_size)
    scales = np.zeros(len(groups), np.float32)
    codes = np.zeros(groups.shape, np.uint8)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    first = np.where(np.abs(low) > np.abs(high), low, high)
    biases = first.copy()
    left = np.arange(len(groups))
    for start, end in ((first, low + high - first), (low + high - first, first)):
        for code in range(2**encoding.bits - 1, 0, -1):
            if not len(left):
                break
            near = from_float32((end[left] - start[left]) / np.float32(code), encoding.dtype)
            scale = to_float32(near, encoding.dtype)[:, None]
            whole = np.rint((groups[left] - start[left, None]) / np.where(scale == 0, np.float32(1), scale))
            hit = (whole * scale + start[left, None] == groups[left]).all(axis=-1)
            hit &= (whole >= 0).all(axis=-1) & (whole <= 2**encoding.bits - 1).all(axis=-1)
            found = left[hit]
            scales[found], biases[found], codes[found] = scale[hit, 0], start[found], whole[hit]
            left = left[~hit]
    shape = (*values.shape[:-1], -1)
    words = pack_bits(codes.reshape(values.shape), encoding.bits)
    stored = [from_float32(a.reshape(shape), encoding.dtype) for a in (scales, biases)]
    decoded = dequantize(words, *stored, encoding.bits, encoding.group_size, encoding.dtype)
    if not np.array_equal(decoded, values):
        return None
    return dict(zip(encoding.part_names, (words, *stored), strict=True))
