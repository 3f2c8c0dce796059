"""Which matrices get more bits: what rounding each of them costs, and the choice that a budget allows.

What counts is how far a layer's experts move each token, as a share of what it then is: an error in a token that is
large is felt less. Some tokens are a hundred times as large as most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from flashpack.converter.calibrated import Expert, LayerCalibration, spaced
from flashpack.converter.gptq import gptq
from flashpack.errors import SourceError
from flashpack.formats.encodings import decode
from flashpack.formats.records import Encoding
from flashpack.kernels.cpu.pool import one_thread
from flashpack.kernels.quantize import quantize

ROWS = 128
"""Rows of a matrix, evenly spaced, that are rounded to see what it costs with ``gptq``."""

Matrices = Mapping[str, NDArray[np.float32]]


def sensitivities(
    values: Matrices,
    biases: Matrices,
    candidates: Mapping[str, Sequence[Encoding]],
    layer: LayerCalibration | None,
    expert: int,
) -> dict[str, NDArray[np.float64]]:
    """What it costs to round a matrix of one expert to each of its candidates: float64 [candidates], by projection of
    those that have any.

    ``values``: float32 [out, in] of all projections, ``biases``: [out] of those that have one. With the ``layer``'s
    tokens: the squares by which the expert's outputs move if ``gptq`` rounds this matrix, over those of the token
    behind the layer, as a mean over all tokens. Without: the squared error that "starts" leaves. Raises
    ``SourceError``.
    """
    for name, matrix in values.items():
        if not np.isfinite(matrix).all():
            raise SourceError(f"expert {expert}, {name}: infinite or NaN values cannot be quantized")
    if layer is None:
        return {
            name: np.array([quantize(values[name], "F32", encoding, "starts")[1] for encoding in encodings])
            for name, encodings in candidates.items()
        }
    with torch.inference_mode(), one_thread():
        return _Judge(layer, expert, values, biases).costs(candidates)


class _Judge:
    """How far the outputs of one expert move for some of its tokens."""

    def __init__(self, layer: LayerCalibration, expert: int, values: Matrices, biases: Matrices) -> None:
        self._expert = Expert(layer, expert, values, biases)
        self._x, self._shares = layer.typical(expert)
        self._activation = layer.activation
        self._products = {
            name: linear(self._x, self._expert.source[name], self._expert.biases.get(name))
            for name in self._expert.first
        }
        self._y = self._activated(self._products)

    def costs(self, candidates: Mapping[str, Sequence[Encoding]]) -> dict[str, NDArray[np.float64]]:
        """By projection: [candidates]."""
        hessians = dict.fromkeys(self._expert.first, self._expert.first_hessian()[1])
        hessians["down"] = self._expert.down_hessian()[1]
        return {
            name: np.array([self._cost(name, hessian, encoding) for encoding in candidates[name]])
            for name, hessian in hessians.items()
            if name in candidates
        }

    def _cost(self, name: str, hessian: Tensor, encoding: Encoding) -> float:
        """Of one matrix, from ``ROWS`` of its rows: what they lose does not depend on the others."""
        whole = self._expert.source[name]
        rows = spaced(len(whole), ROWS)
        some = whole[rows]
        parts = gptq(some, hessian, encoding, refined=False)
        lost = torch.from_numpy(decode(encoding, parts, tuple(some.shape))).to(some) - some
        if name == "down":
            return self._share(linear(self._y, lost))
        products = self._products[name].clone()
        products[:, rows] += linear(self._x, lost)
        moved = linear(self._activated(self._products | {name: products}) - self._y, self._expert.source["down"])
        return self._share(moved) * len(whole) / len(rows)

    def _activated(self, products: Mapping[str, Tensor]) -> Tensor:
        return self._activation(torch.cat(list(products.values()), dim=1))

    def _share(self, moved: Tensor) -> float:
        return float(moved.double().square().mean(dim=1) @ self._shares)


def choose(costs: NDArray[np.float64], bits: NDArray[np.float64], budget: float) -> NDArray[np.intp]:
    """For each row, the candidate it gets: [rows] of [rows, candidates] ``costs`` and ``bits``, for ``budget`` bits.

    The bits are spent where they save most of the costs each, as long as the next step fits; so with more bits no row
    gets fewer. A row's candidates that are worse than a mean of two others are never chosen. If even the cheapest
    choice is over the budget, it is that choice.
    """
    steps: list[tuple[float, int, int, float]] = []
    chosen = np.empty(len(costs), dtype=np.intp)
    for row in range(len(costs)):
        hull = _hull(costs[row], bits[row])
        chosen[row] = hull[0]
        for before, after in pairwise(hull):
            more = float(bits[row, after] - bits[row, before])
            steps.append((-_saved(costs[row], bits[row], before, after), row, after, more))
    spent = float(bits[np.arange(len(bits)), chosen].sum())
    # A row's own steps are in order: along the hull each saves less per bit. Rows decide among equals.
    for _, row, after, more in sorted(steps, key=lambda step: step[:2]):
        if spent + more > budget:
            break
        chosen[row] = after
        spent += more
    return chosen


def _hull(costs: NDArray[np.float64], bits: NDArray[np.float64]) -> list[int]:
    """The candidates on the lower convex hull, from the fewest bits to the smallest cost."""
    hull: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (bits[i], costs[i])):
        if hull and costs[i] >= costs[hull[-1]]:
            continue
        while len(hull) > 1 and _saved(costs, bits, *hull[-2:]) <= _saved(costs, bits, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _saved(costs: NDArray[np.float64], bits: NDArray[np.float64], before: int, after: int) -> float:
    """Of the costs, by each bit more."""
    return float((costs[before] - costs[after]) / (bits[after] - bits[before]))
