"""Which matrices get more bits: what rounding each of them costs, and the choice that a budget allows.

What counts is how far the output of a layer's experts moves, as a share of what it is added to: where the residual
stream is large, an error is felt less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from flashpack.converter.calibrated import LayerCalibration, one_thread
from flashpack.errors import SourceError
from flashpack.formats.encodings import decode
from flashpack.formats.records import PROJECTIONS, Encoding
from flashpack.kernels.cpu.quantize import quantize

Matrices = Mapping[str, NDArray[np.float32]]


def sensitivities(
    values: Matrices,
    biases: Matrices,
    candidates: Mapping[str, Sequence[Encoding]],
    layer: LayerCalibration | None,
    expert: int,
) -> dict[str, NDArray[np.float64]]:
    """What it costs to round a matrix of one expert to each of its candidates, by projection: float64 [candidates].

    ``values``: float32 [out, in] by projection, ``biases``: [out] of those that have one. With the ``layer``'s tokens:
    the squares by which the expert's outputs move, over the squares of the residual stream, as a mean over all tokens;
    without: the squared error. They are measured as "starts" rounds; ``gptq`` leaves less, but about the same share
    of it. Raises ``SourceError``.
    """
    names = [name for name in PROJECTIONS if name in values]
    costs = {name: np.zeros(len(candidates[name])) for name in names}
    outputs = None if layer is None else _Outputs(layer, expert, values, biases)
    for name in names:
        for i, encoding in enumerate(candidates[name]):
            parts, squared, _ = quantize(values[name], "F32", encoding, "starts")
            if not np.isfinite(squared):
                raise SourceError(f"expert {expert}, {name}: infinite or NaN values cannot be quantized")
            costs[name][i] = squared
            if outputs is not None:
                decoded = decode(encoding, parts, values[name].shape)
                costs[name][i] = outputs.moved(name, decoded)
    return costs


class _Outputs:
    """What an expert gives for some of its tokens."""

    def __init__(self, layer: LayerCalibration, expert: int, values: Matrices, biases: Matrices) -> None:
        self._activation, self._device = layer.activation, layer.device
        self._source = {name: self._tensor(values[name]) for name in PROJECTIONS if name in values}
        self._biases = {name: self._tensor(bias) for name, bias in biases.items()}
        self._first = [name for name in self._source if name != "down"]
        self._x, weights = layer.typical(expert)
        with torch.inference_mode(), one_thread():
            self._before = {name: self._product(name, self._source[name]) for name in self._first}
            self._y = self._activation(torch.cat(list(self._before.values()), dim=1))
        # Of each token, its share of the mean over all tokens.
        self._shares = weights.double().square() / (layer.residual * values["down"].shape[0])

    @torch.inference_mode()
    def moved(self, name: str, decoded: NDArray[np.float32]) -> float:
        """By how much, if this matrix alone is rounded."""
        rounded = self._tensor(decoded)
        with one_thread():
            if name == "down":
                change = linear(self._y, rounded - self._source["down"])
            else:
                before = self._before | {name: self._product(name, rounded)}
                y = self._activation(torch.cat(list(before.values()), dim=1))
                change = linear(y - self._y, self._source["down"])
            return float(change.double().square().sum(1) @ self._shares)

    def _tensor(self, array: NDArray[np.float32]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _product(self, name: str, matrix: Tensor) -> Tensor:
        return linear(self._x, matrix, self._biases.get(name))


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
