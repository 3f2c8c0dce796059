"""Quantizing stored values: the native routine where it is built, otherwise numpy; the same bits either way."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashpack.formats import affine, affine_dq_starts
from flashpack.formats.dtypes import to_float32
from flashpack.formats.records import Encoding
from flashpack.formats.starts import group_squares
from flashpack.kernels.cpu import native

BLOCK_VALUES = 2**17
"""Values that numpy quantizes at a time: 512 KiB of float32, so that the passes over a block hit the L2 cache."""

Parts = dict[str, NDArray[np.generic]]
"""Stored arrays of a matrix, by the names of ``Encoding.part_names``."""


def quantize(stored: NDArray[np.generic], dtype: str, encoding: Encoding, method: str) -> tuple[Parts, float, float]:
    """Round [rows, I] values as stored (BF16, F16 or F32) to ``encoding``, by ``method`` "minmax" or "starts".

    Returns the stored arrays, the sum of squared errors, which is infinite or NaN exactly if a value or what it decodes
    to is, and the sum of squared values; both are sums of ``starts.group_squares`` in the order of the groups.
    """
    if native.available():
        return native.quantize(stored, dtype, encoding, method)
    return numpy_quantize(stored, dtype, encoding, method)


def numpy_quantize(
    stored: NDArray[np.generic], dtype: str, encoding: Encoding, method: str
) -> tuple[Parts, float, float]:
    """``quantize`` without the native routine."""
    blocks = []
    error = norm = 0.0
    step = encoding.whole_rows(stored.shape[1])
    step *= max(1, BLOCK_VALUES // (step * stored.shape[1]))
    for start in range(0, len(stored), step):
        values = to_float32(stored[start : start + step], dtype)
        *arrays, decoded = _quantize(values, encoding, method)
        blocks.append(arrays)
        with np.errstate(invalid="ignore"):  # infinity - infinity: seen by the caller in the sum
            error = _add(error, decoded - values, encoding.group_size)
        norm = _add(norm, values, encoding.group_size)
    parts = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    return dict(zip(encoding.part_names, parts, strict=True)), error, norm


def _quantize(values: NDArray[np.float32], encoding: Encoding, method: str) -> tuple[NDArray[Any], ...]:
    """The stored arrays, in the order of ``part_names``, and the decoded values."""
    if encoding.name == "affine_dq":
        double = affine_dq_starts.quantize if method == "minmax" else affine_dq_starts.quantize_starts
        return double(values, encoding.bits)
    single = affine.quantize if method == "minmax" else affine.quantize_starts
    return single(values, encoding.bits, encoding.group_size, encoding.dtype)


def _add(sum_: float, values: NDArray[np.float32], group_size: int) -> float:
    """Adds the squares of groups one after the other."""
    squares = group_squares(values.reshape(-1, group_size))
    return float(np.add.accumulate([sum_, *squares])[-1])
