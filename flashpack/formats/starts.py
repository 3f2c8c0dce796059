"""The search behind the quantizer ``starts``: several clipped ranges of a group, refined by least squares (normative).

Every operation is elementwise on float32 and exactly rounded, and every sum has one written order, so any processor
gives the same bits. In each group of n values, with ``levels = 2**bits - 1``:

- ``middle = low * 0.5 + high * 0.5`` of its minimum and maximum (-0 counts as +0), ``y = w - middle``.
- Each pair (p, q) of ``STARTS[bits]``, q the faster, gives a start: the range from ``(low - middle) * p`` to
  ``(high - middle) * q``, as the scale ``(to - from) / levels`` and the bias ``from``.
- Each start goes through some rounds of ``refit``. The two that explain most are kept (of equal ones the earlier, which
  comes first), go through some more rounds each, and are what ``fits`` returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

STARTS = {
    2: (0.5, 0.65, 0.8, 0.95),
    3: (0.65, 0.77, 0.88, 1.0),
    4: (0.75, 0.84, 0.92, 1.0),
    5: (0.85, 0.9, 0.95, 1.0),
    6: (0.92, 0.95, 0.98, 1.0),
    8: (0.97, 0.98, 0.99, 1.0),
}
"""Bits -> how much of the way from a group's middle to its minimum, and to its maximum, a start covers."""

AFFINE_ROUNDS = (2, 3)
"""Refits of every start, and further ones of the two that are kept, for the encoding ``affine``."""

LANES = 8


def lane_sum(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """[..., n] -> [...]: sums in the written order. n is a multiple of 8.

    Lane j adds to +0 the values j, j + 8, j + 16, ...; then ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)).
    """
    lanes = values[..., :LANES] + values.dtype.type(0)
    for i in range(LANES, values.shape[-1], LANES):
        lanes = lanes + values[..., i : i + LANES]
    for half in (4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def group_squares(values: Floats) -> NDArray[np.float64]:
    """[..., n] -> [...]: sums of squares of float32 values, by ``lane_sum``.

    In single precision where the sum lies between 1e-20 and 1e30, otherwise in double precision, where no square of a
    float32 is infinite or 0.
    """
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        sums = lane_sum(values * values).astype(np.float64)
        outside = ~((sums > np.float32(1e-20)) & (sums < np.float32(1e30)))
        wide = values[outside].astype(np.float64)
        sums[outside] = lane_sum(wide * wide)
    return sums


@dataclass
class Fit:
    """Of each group: the least squares of ``y ~ scale * q + bias``, all [...]."""

    scale: Floats
    bias: Floats
    gain: Floats
    """How much of the sum of squares is explained, times n."""
    codes: Floats
    """The sum of the codes q that it was fitted to."""

    def take(self, mask: NDArray[np.bool_], other: Fit) -> None:
        """Become ``other`` where ``mask``."""
        for name in ("scale", "bias", "gain", "codes"):
            setattr(self, name, np.where(mask, getattr(other, name), getattr(self, name)))


def refit(y: Floats, total: Floats, scale: Floats, bias: Floats, levels: int) -> Fit:
    """A round of alternating least squares: the codes of ``y`` [..., n] at scale and bias [...], and the fit to them.

    ``total`` is ``lane_sum(y)``. ``q = rint(clip((y - bias) * (1 / scale)))``, where NaN counts as 0. Where all codes
    are the same, scale, bias and gain are NaN.
    """
    n = np.float32(y.shape[-1])
    q = (y - bias[..., None]) * (np.float32(1) / scale)[..., None]
    q = np.rint(np.fmin(np.fmax(q, np.float32(0)), np.float32(levels)))
    codes, squares, products = lane_sum(q), lane_sum(q * q), lane_sum(q * y)
    covariance = n * products - codes * total
    variance = n * squares - codes * codes
    scale = covariance / variance
    return Fit(scale, (total - scale * codes) / n, covariance * scale, codes)


def fits(y: Floats, total: Floats, low: Floats, high: Floats, bits: int, rounds: tuple[int, int]) -> list[Fit]:
    """The two best fits of groups ``y`` [..., n], after so many rounds before the choice and after it.

    ``low`` and ``high`` [...] are their minimum and maximum, ``total`` their ``lane_sum``.
    """
    levels = 2**bits - 1
    kept = [Fit(*(np.zeros_like(low) for _ in range(4))) for _ in range(2)]
    for down in STARTS[bits]:
        for up in STARTS[bits]:
            bias = low * np.float32(down)
            scale: Any = (high * np.float32(up) - bias) / np.float32(levels)
            fit = Fit(scale, bias, bias, bias)
            for _ in range(rounds[0]):
                fit = refit(y, total, fit.scale, fit.bias, levels)
            first = fit.gain > kept[0].gain
            second = ~first & (fit.gain > kept[1].gain)
            kept[1].take(first, kept[0])
            kept[0].take(first, fit)
            kept[1].take(second, fit)
    for _ in range(rounds[1]):
        kept = [refit(y, total, fit.scale, fit.bias, levels) for fit in kept]
    return kept
