"""The numpy meaning of the ``affine_dq`` encoding (normative, SPEC.md section 6): affine with twice rounded groups.

The integers are those of ``affine`` in groups of 32. A group's byte holds the code ``s`` of its scale in the low half,
that of its bias, ``b``, in the high half; the values of a whole matrix, row by row, are cut into blocks of 8 groups,
each with three numbers (d, c, m): ``scale = d * s`` and ``bias = c + m * b``. A block may begin within a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashpack.formats import affine
from flashpack.formats import constants as C
from flashpack.formats.dtypes import from_float32, to_float32

GROUPS = C.DQ_BLOCK // C.DQ_GROUP
"""Groups of a block."""

_MOST = np.float32(15)
"""The largest code of a scale or a bias."""


def group_numbers(
    codes: NDArray[np.uint8], blocks: NDArray[np.generic], first: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and biases, float32 [..., out, in/32], of ``codes`` of that shape and ``blocks`` [..., n, 3] as stored.

    ``first``: the number of the first group in the first block. The products are exact; a bias is rounded once.
    """
    *lead, rows, groups = codes.shape
    numbers = to_float32(blocks, C.DQ_DTYPE)
    own = np.take(numbers, (first + np.arange(rows * groups)) // GROUPS, axis=-2).reshape(*lead, rows, groups, 3)
    scales: NDArray[np.float32] = own[..., 0] * (codes & np.uint8(15))
    biases: NDArray[np.float32] = own[..., 1] + own[..., 2] * (codes >> np.uint8(4))
    return scales, biases


def dequantize(
    words: NDArray[np.uint32], codes: NDArray[np.uint8], blocks: NDArray[np.generic], bits: int, first: int = 0
) -> NDArray[np.float32]:
    """Stored arrays (uint32 [..., out, in*bits/32]; the others as for ``group_numbers``) -> float32 [..., out, in]."""
    return affine.dequantize(words, *group_numbers(codes, blocks, first), bits, C.DQ_GROUP, "F32")


def encode_groups(
    scales: NDArray[np.float32], biases: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.generic]]:
    """Scales (not negative) and biases, float32 [out, in/32] -> uint8 codes of that shape and blocks [n, 3] as stored.

    Per block, ``d`` is the largest scale over 15, ``c`` the smallest bias, ``m`` the biases' range over 15. A group
    whose scale was rounded keeps the middle of its range: its bias moves by half of what that range has lost. Only
    exactly rounded elementwise float32 operations, minima and maxima are used.
    """
    wanted = scales.reshape(-1, GROUPS)
    with np.errstate(invalid="ignore", over="ignore"):
        d, step = _rounded(wanted.max(axis=-1) / _MOST)
        low_codes = _codes(wanted, step)
        lost = wanted - low_codes * step
        moved: Any = biases.reshape(-1, GROUPS) + lost * np.float32((2**bits - 1) / 2)
        low, high = affine.extremes(moved)
        c, base = _rounded(low)
        m, step = _rounded((high - base[:, 0]) / _MOST)
        high_codes = _codes(moved - base, step)
        codes = low_codes.astype(np.uint8) | (high_codes.astype(np.uint8) << np.uint8(4))
    return codes.reshape(scales.shape), np.stack([d, c, m], axis=-1)


def quantize(
    values: NDArray[np.float32], scales: NDArray[np.float32], biases: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint8], NDArray[np.generic], NDArray[np.float32]]:
    """Round ``values`` [out, in] in groups near ``scales`` and ``biases`` (as for ``encode_groups``).

    Returns words uint32 [out, in*bits/32], codes [out, in/32], blocks [n, 3] as stored, and the decoded values float32
    [out, in].
    """
    return round_values(values, *encode_groups(scales, biases, bits), bits)


def round_values(
    values: NDArray[np.float32], codes: NDArray[np.uint8], blocks: NDArray[np.generic], bits: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint8], NDArray[np.generic], NDArray[np.float32]]:
    """Round ``values`` [out, in] with the scales and biases of ``codes`` and ``blocks``; returns as ``quantize``.

    ``q = clip(rint((w - bias) / scale))``, where NaN counts as 0. With a scale of 0 every code is 0, and the group
    decodes to its bias.
    """
    levels = np.float32(2**bits - 1)
    scale, bias = (numbers[..., None] for numbers in group_numbers(codes, blocks))
    # The caller sees input that is not finite, or too large, by the infinity or NaN it decodes to.
    with np.errstate(invalid="ignore", over="ignore"):
        wide = values.reshape(*codes.shape, C.DQ_GROUP) - bias
        wide *= scale != 0
        wide /= np.where(scale == 0, np.float32(1), scale)
        np.rint(np.fmin(np.fmax(wide, np.float32(0)), levels), out=wide)
        words = affine.pack_bits(wide.astype(np.uint8).reshape(values.shape), bits)
        wide *= scale
        wide += bias
    return words, codes, blocks, wide.reshape(values.shape)


def _rounded(numbers: NDArray[np.float32]) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """Float32 [n] as stored, and what that is worth [n, 1]."""
    stored = from_float32(numbers, C.DQ_DTYPE)
    return stored, to_float32(stored, C.DQ_DTYPE)[:, None]


def _codes(numbers: NDArray[np.float32], step: NDArray[np.float32]) -> NDArray[np.float32]:
    """The whole multiples 0 to 15 of ``step`` that are nearest to ``numbers``; 0 where ``step`` is 0."""
    nearest: NDArray[np.float32] = np.clip(np.rint(numbers / np.where(step == 0, np.float32(1), step)), 0, _MOST)
    return np.where(step == 0, np.float32(0), nearest)
