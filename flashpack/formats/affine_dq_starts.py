"""The quantizers of the ``affine_dq`` encoding: plain rounding ("minmax") and the search "starts" (normative).

Elementwise float32 operations (float64 where written) that are exactly rounded, and sums in one written order
(``starts.lane_sum``, over a group's values and over a block's groups): any processor gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashpack.formats import affine, affine_dq, starts
from flashpack.formats import constants as C
from flashpack.formats.dtypes import from_float32, to_float32
from flashpack.formats.starts import Floats, lane_sum

FIT_ROUNDS = (1, 2)
"""Of ``starts.fits``: fewer than for ``affine``; what they gain is lost when the fit is rounded to codes."""

ROUNDS = 2
"""How often codes and then a block's three numbers are refined."""

STEPS = tuple((s, b) for s in (-1, 0, 1) for b in (-1, 0, 1) if (s, b) != (0, 0))
"""What is tried around a group's codes of scale and bias, in this order."""

Quantized = tuple[NDArray[np.uint32], NDArray[np.uint8], NDArray[np.generic], Floats]
"""Words uint32 [out, in*bits/32], codes uint8 [out, in/32], blocks [n, 3] as stored; decoded float32 [out, in]."""


def quantize(values: Floats, bits: int) -> Quantized:
    """Round float32 [out, in], out * in a multiple of 256, near the scales and biases of ``affine.quantize``."""
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = affine.extremes(values.reshape(len(values), -1, C.DQ_GROUP))
        return affine_dq.quantize(values, (high - low) / np.float32(2**bits - 1), low, bits)


def quantize_starts(values: Floats, bits: int) -> Quantized:
    """As ``quantize``, with the codes and numbers of each block that a search finds, if they make its error smaller.

    The search begins with the first of each group's two ``starts.fits`` (where its scale is positive; otherwise with
    minimum and maximum), as ``affine_dq.encode_groups`` rounds them. ``ROUNDS`` times, each group takes the best of its
    codes and those around them (``STEPS``, within 0 to 15; of equal ones the first), and each block the numbers (d, c,
    m) of ``_refit``, if they make its error smaller. Errors are sums of squares of decoded minus source.
    """
    plain = quantize(values, bits)
    x = values.reshape(-1, affine_dq.GROUPS, C.DQ_GROUP)
    levels = np.float32(2**bits - 1)
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        low, high = affine.extremes(x)
        middle = low * np.float32(0.5) + high * np.float32(0.5)
        y = x - middle[..., None]
        fit = starts.fits(y, lane_sum(y), low - middle, high - middle, bits, FIT_ROUNDS)[0]
        good = fit.scale > 0
        scales = np.where(good, fit.scale, (high - low) / levels)
        biases = np.where(good, fit.bias + middle, low)
        both, blocks = affine_dq.encode_groups(scales, biases, bits)
        codes = ((both & np.uint8(15)).astype(np.float32), (both >> np.uint8(4)).astype(np.float32))
        numbers = to_float32(blocks, C.DQ_DTYPE)
        for _ in range(ROUNDS):
            codes, trial = _neighbours(x, codes, numbers, levels)
            moved = _refit(trial, codes, numbers)
            smaller = lane_sum(_Trial(x, codes, moved, levels).error) < lane_sum(trial.error)
            numbers = np.where(smaller[:, None], moved, numbers)
        s, b = (code.astype(np.uint8) for code in codes)
        shape = plain[1].shape
        found = affine_dq.round_values(
            values, (s | (b << np.uint8(4))).reshape(shape), from_float32(numbers, C.DQ_DTYPE), bits
        )
        errors = (lane_sum(lane_sum(np.square(q[3] - values).reshape(x.shape))) for q in (found, plain))
        take = np.less(*errors)
    return (
        _choose(take, found[0], plain[0]),
        _choose(take, found[1], plain[1]),
        _choose(take, found[2], plain[2]),
        _choose(take, found[3], plain[3]),
    )


def _choose(take: NDArray[np.bool_], found: NDArray[Any], plain: NDArray[Any]) -> NDArray[Any]:
    """The blocks of ``found`` where ``take`` [blocks], else those of ``plain``; in their shape."""
    n = len(take)
    return np.where(take[:, None], found.reshape(n, -1), plain.reshape(n, -1)).reshape(found.shape)


Codes = tuple[Floats, Floats]
"""The codes of scales and of biases, whole numbers in float32, each [blocks, 8]."""


@dataclass(init=False)
class _Trial:
    """What blocks [blocks, 8, 32] decode to with some codes and numbers: the integers q and the ``error`` of groups.

    ``q = rint(clip((x - bias) * (1 / scale)))``, where NaN counts as 0, and 0 if the scale is 0.
    """

    def __init__(self, x: Floats, codes: Codes, numbers: Floats, levels: np.float32) -> None:
        d, c, m = (numbers[:, i, None] for i in range(3))
        scale = (d * codes[0])[..., None]
        bias = (c + m * codes[1])[..., None]
        q = (x - bias) * np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        self.q = np.rint(np.fmin(np.fmax(q, np.float32(0)), levels))
        self.wrong = self.q * scale + bias - x
        self.error = lane_sum(self.wrong * self.wrong)


def _neighbours(x: Floats, codes: Codes, numbers: Floats, levels: np.float32) -> tuple[Codes, _Trial]:
    """The codes with the least error among ``codes`` and those around them, and what they give."""
    best, error = codes, _Trial(x, codes, numbers, levels).error
    for step in STEPS:
        near = tuple(
            np.fmin(np.fmax(code + np.float32(by), np.float32(0)), np.float32(15))
            for code, by in zip(codes, step, strict=True)
        )
        found = _Trial(x, (near[0], near[1]), numbers, levels).error
        smaller = found < error
        error = np.where(smaller, found, error)
        best = (np.where(smaller, near[0], best[0]), np.where(smaller, near[1], best[1]))
    return best, _Trial(x, best, numbers, levels)


def _refit(trial: _Trial, codes: Codes, numbers: Floats) -> Floats:
    """The least squares of (d, c, m) for the integers of a trial, rounded as stored; float32 [blocks, 3].

    In float64, by cofactors; the matrix consists of integers that float64 holds exactly. Where it is singular, the
    numbers are not finite.
    """
    n = float(trial.q.shape[-1])
    s, b = (code.astype(np.float64) for code in codes)
    q, qq, r, qr = (
        lane_sum(terms).astype(np.float64) for terms in (trial.q, trial.q * trial.q, trial.wrong, trial.q * trial.wrong)
    )
    a11, a12, a13 = lane_sum(s * s * qq), lane_sum(s * q), lane_sum(s * b * q)
    a22, a23, a33 = n * s.shape[-1], n * lane_sum(b), n * lane_sum(b * b)
    g1, g2, g3 = lane_sum(s * qr), lane_sum(r), lane_sum(b * r)
    c11, c12, c13 = a22 * a33 - a23 * a23, a13 * a23 - a12 * a33, a12 * a23 - a13 * a22
    c22, c23, c33 = a11 * a33 - a13 * a13, a12 * a13 - a11 * a23, a11 * a22 - a12 * a12
    determinant = a11 * c11 + a12 * c12 + a13 * c13
    steps = (c11 * g1 + c12 * g2 + c13 * g3, c12 * g1 + c22 * g2 + c23 * g3, c13 * g1 + c23 * g2 + c33 * g3)
    moved = np.stack([numbers[:, i] - step / determinant for i, step in enumerate(steps)], axis=-1)
    return to_float32(from_float32(moved.astype(np.float32), C.DQ_DTYPE), C.DQ_DTYPE)
