"""Rounding an expert's matrices for the tokens that chose it (``gptq``).

gate and up see the layer's inputs x, each with the router's weight w: ``H = sum of w^2 x x^T``. down sees what the
rounded gate and up give, y', and is moved first to what makes up for their error: with y of the source's matrices, its
target is the T that gives ``T y'`` nearest to ``down y``.

Few tokens say little. H is mixed with that of all tokens, each scaled to the same mean diagonal, and that mean times
``DAMPING`` is added to the diagonal: both keep the matrix near the source's for inputs that were not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from flashpack.converter.gptq import gptq
from flashpack.converter.quantize import Error, Errors
from flashpack.errors import SourceError
from flashpack.formats.encodings import decode
from flashpack.formats.records import PROJECTIONS, Encoding
from flashpack.kernels import Activation
from flashpack.kernels.cpu.pool import one_thread

if TYPE_CHECKING:
    from flashpack.formats.calibration import LayerTokens

DAMPING = 0.3
"""Of the mean of H's diagonal, added to it. Less is a little better on text like the calibration's, worse on other."""

PRIOR = 0.25
"""Tokens, as a share of the width of H, that the layer's H counts for beside the expert's own."""

FEWEST = 0.125
"""Tokens, as a share of a matrix's width, below which it is not calibrated."""

LAYER_TOKENS = 2**15
"""Tokens, evenly spaced, that a layer's H is made from."""

EXPERT_TOKENS = 2**10
"""Tokens, evenly spaced, that stand for all tokens where an expert did not see them."""

TYPICAL_TOKENS = 2**8
"""An expert's tokens, evenly spaced, that it is judged by."""

CHUNK = 2**11
"""Tokens that are held as float32 at a time."""

_COLUMNS = 2**8
"""Of a moment that are held as float64 at a time."""

Arrays = dict[str, NDArray[Any]]
"""Part -> stored array."""


def expert_bytes(shapes: Mapping[str, tuple[int, int]]) -> int:
    """Memory that an expert with matrices of these ``shapes`` [out, in] takes while it is calibrated, at most: float32
    of Hessians, of copies of the matrices, and of ``CHUNK`` tokens. The factors hold what was measured, with a tenth
    to spare and what the allocator keeps of the experts before."""
    hidden, inner = shapes["up"][1], shapes["down"][1]
    weights = sum(rows * width for rows, width in shapes.values())
    return 4 * (8 * hidden**2 + 14 * inner**2 + 5 * weights + 5 * CHUNK * (hidden + 6 * inner) // 2)


class LayerCalibration:
    """One layer's tokens, for its experts one by one or side by side; ``room`` lets in as many as memory holds.

    ``refined``: see ``gptq``. ``device`` does the work; on a processor results are the same for any number of threads,
    since torch, whose sums are cut by their number, works on the calling thread alone.
    """

    def __init__(
        self,
        tokens: LayerTokens,
        activation: Activation,
        refined: bool,
        device: torch.device | str = "cpu",
        room: AbstractContextManager[object] | None = None,
    ) -> None:
        self.activation, self.refined, self.device = activation, refined, torch.device(device)
        self.room = room or nullcontext()
        self._tokens = tokens
        self._hessian: Tensor | None = None
        self._lock = Lock()

    @torch.inference_mode()
    def encode(
        self,
        expert: int,
        encodings: Mapping[str, Encoding],
        values: Mapping[str, NDArray[np.float32]],
        biases: Mapping[str, NDArray[np.float32]],
    ) -> tuple[dict[str, Arrays], Errors]:
        """The stored parts of the expert's matrices, and their errors, by projection.

        ``encodings``: of the matrices to round, by projection, such as ``gptq`` can; ``values``: float32 [out, in] of
        all; ``biases``: [out] of those that have one. A matrix that saw too few tokens is left out of the parts, and
        its error says only how many. Raises ``SourceError``.
        """
        for name, matrix in values.items():
            if not np.isfinite(matrix).all():
                raise SourceError(f"expert {expert}, {name}: infinite or NaN values cannot be quantized")
        with one_thread():
            work = Expert(self, expert, values, biases)
            work.encode_first(encodings)
            work.encode_down(encodings)
        return work.parts, work.errors

    @torch.inference_mode()
    def hessian(self) -> Tensor:
        """H [in, in] of all tokens, with a mean diagonal of 1."""
        with self._lock, one_thread():
            if self._hessian is None:
                tokens = spaced(len(self._tokens.inputs), LAYER_TOKENS)
                total = moment(self._tokens.inputs.shape[1], self.inputs(tokens), self.device)
                self._hessian = total.div_(_mean_diagonal(total))
            return self._hessian

    def inputs(self, tokens: NDArray[np.intp]) -> Iterator[Tensor]:
        """What these tokens are to the layer's experts: float32 [up to ``CHUNK``, in] after another."""
        for start in range(0, len(tokens), CHUNK):
            stored = np.ascontiguousarray(self._tokens.inputs[tokens[start : start + CHUNK]])
            yield torch.from_numpy(stored.view(np.int16)).to(self.device).view(torch.bfloat16).float()

    def sample(self) -> NDArray[np.intp]:
        """A few of all tokens."""
        return spaced(len(self._tokens.inputs), EXPERT_TOKENS)

    def typical(self, expert: int) -> tuple[Tensor, Tensor]:
        """Inputs [tokens, in] that stand for all of an expert, and shares [tokens]: sums with these of what is added to
        a token, as mean squares, are means over the layer's tokens of the share of all that is behind the layer."""
        own, weights = self.chosen(expert)
        if len(own):
            some = spaced(len(own), TYPICAL_TOKENS)
            tokens, energy = own[some], weights[some].astype(np.float64) ** 2 * len(own)
        else:  # it counts as if one token had chosen it
            tokens = self.sample()
            energy = np.ones(len(tokens))
        behind = self._tokens.residual[tokens, 0].astype(np.float64)
        energy /= np.where(behind > 0, behind, 1) * len(tokens) * len(self._tokens.inputs)
        return torch.cat(list(self.inputs(tokens))), torch.from_numpy(energy).to(self.device)

    def chosen(self, expert: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
        """The tokens that chose ``expert``, and the router's weights of it."""
        tokens, choice = np.nonzero(self._tokens.experts == expert)
        return tokens, np.ascontiguousarray(self._tokens.weights[tokens, choice])


class Expert:
    """One expert while it is encoded: its matrices and tokens.

    ``parts`` and ``errors``: see ``LayerCalibration.encode``. ``first``: gate and up, or up; ``source`` and ``biases``:
    tensors by projection.
    """

    def __init__(
        self,
        layer: LayerCalibration,
        number: int,
        values: Mapping[str, NDArray[np.float32]],
        biases: Mapping[str, NDArray[np.float32]],
    ) -> None:
        self.parts: dict[str, Arrays] = {}
        self.errors: Errors = {}
        self._layer, self._number = layer, number
        self.source = {name: torch.from_numpy(values[name]).to(layer.device) for name in PROJECTIONS if name in values}
        self.biases = {name: torch.from_numpy(bias).to(layer.device) for name, bias in biases.items()}
        self.first = [name for name in self.source if name != "down"]
        self._rounded = dict(self.source)
        self._tokens, weights = layer.chosen(number)
        self._weights = torch.from_numpy(weights).to(layer.device).unsqueeze(-1)
        energy = weights.astype(np.float64) ** 2
        # As many tokens of equal weight would say as much.
        self._count = float(energy.sum() ** 2 / (energy**2).sum()) if energy.any() else 0.0

    def first_hessian(self) -> tuple[Tensor, Tensor]:
        """For gate and up: the sum over the expert's tokens, and the H that is used."""
        shared = self._layer.hessian()
        own = self._moment(len(shared), (x * w for x, w in self._own()))
        return own, damped(self._mixed(own / _mean_diagonal(own), shared))

    def down_hessian(self) -> tuple[Tensor, Tensor, Tensor]:
        """For down: the sum over the expert's tokens of [y, y'] side by side; the H of y' that is used, and what it is
        for the products of y and y'."""
        width = self.source["down"].shape[1]
        own = self._moment(2 * width, (self._intermediate(x) * w for x, w in self._own()))
        some = self._moment(2 * width, map(self._intermediate, self._layer.inputs(self._layer.sample())))
        mixed = self._mixed(*(m / _mean_diagonal(m[width:, width:]) for m in (own, some)))
        hessian = damped(mixed[width:, width:].clone())
        cross = mixed[:width, width:]
        cross.diagonal().add_(hessian.diagonal() - mixed[width:, width:].diagonal())
        return own, hessian, cross

    def encode_first(self, encodings: Mapping[str, Encoding]) -> None:
        """gate and up, those that have an encoding here."""
        names = [name for name in self.first if name in encodings and self._has_enough(name)]
        if not names:
            return
        own, hessian = self.first_hessian()
        for encoding in dict.fromkeys(encodings[name] for name in names):
            same = [name for name in names if encodings[name] == encoding]
            self._round(same, torch.stack([self.source[name] for name in same]), hessian, encoding)
        for name in names:
            lost = self._rounded[name] - self.source[name]
            self._note(name, _energy(lost, own), _energy(self.source[name], own))

    def encode_down(self, encodings: Mapping[str, Encoding]) -> None:
        """down, after the others."""
        if "down" not in encodings or not self._has_enough("down"):
            return
        width, source = self.source["down"].shape[1], self.source["down"]
        own, hessian, cross = self.down_hessian()
        target = torch.linalg.solve(hessian, (source @ cross).T).T
        self._round(["down"], target.unsqueeze(0), hessian, encodings["down"])
        lost = torch.cat([-source, self._rounded["down"]], dim=1)
        self._note("down", _energy(lost, own), _energy(source, own[:width, :width]))

    def _has_enough(self, name: str) -> bool:
        self.errors[name] = Error(tokens=len(self._tokens))
        return self._count >= FEWEST * self.source[name].shape[1]

    def _round(self, names: list[str], target: Tensor, hessian: Tensor, encoding: Encoding) -> None:
        """Store ``target`` [names, out, in]."""
        stacked = gptq(target, hessian, encoding, self._layer.refined)
        for i, name in enumerate(names):
            self.parts[name] = {part: array[i] for part, array in stacked.items()}
            decoded = decode(encoding, self.parts[name], tuple(target.shape[1:]))
            self._rounded[name] = torch.from_numpy(decoded).to(target.device)

    def _note(self, name: str, lost: float, whole: float) -> None:
        """The errors of a matrix: that of its values, and that of what it gives, of which ``lost`` and ``whole`` are
        the squares."""
        error, source = self.errors[name], self.source[name].double()
        error.error = float((self._rounded[name] - source).square().sum())
        error.norm = float(source.square().sum())
        error.weighted = (lost / whole) ** 0.5 if whole else 0.0

    def _own(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The expert's tokens and their weights [tokens, 1]."""
        for number, x in enumerate(self._layer.inputs(self._tokens)):
            yield x, self._weights[number * CHUNK :][: len(x)]

    def _intermediate(self, x: Tensor) -> Tensor:
        """The inputs of down [tokens, 2 * in], of the source's gate and up and then of the rounded ones."""
        both = []
        for matrices in (self.source, self._rounded):
            products = [linear(x, matrices[name], self.biases.get(name)) for name in self.first]
            both.append(self._layer.activation(torch.cat(products, dim=1)))
        return torch.cat(both, dim=1)

    def _moment(self, width: int, inputs: Iterator[Tensor]) -> Tensor:
        """The sum of x x^T over x [width]."""
        total = moment(width, inputs, self._layer.device)
        if not bool(total.isfinite().all()):
            raise SourceError(f"expert {self._number}: what it does with the calibration's tokens is not finite")
        return total

    def _mixed(self, own: Tensor, shared: Tensor) -> Tensor:
        """Moments of one scale, of the expert's tokens and of all, by how much the former can say."""
        share = self._count / (self._count + PRIOR * len(own))
        return (own * share).add_(shared * (1 - share))


def moment(width: int, inputs: Iterable[Tensor], device: torch.device) -> Tensor:
    """The sum of x x^T over ``inputs`` [tokens, width]: float32 [width, width]."""
    total = torch.zeros(width, width, device=device)
    for x in inputs:
        total += x.T @ x
    return total


def damped(hessian: Tensor) -> Tensor:
    """``hessian``, now with ``DAMPING``."""
    hessian.diagonal().add_(DAMPING * _mean_diagonal(hessian))
    return hessian


def _mean_diagonal(moment: Tensor) -> Tensor:
    """Of inputs that are all 0: 1, which scales nothing."""
    mean = moment.diagonal().mean()
    return torch.where(mean > 0, mean, 1.0)


def _energy(matrix: Tensor, moment: Tensor) -> float:
    """The squares of what ``matrix`` gives, summed over the tokens of ``moment``, which is widened piece by piece."""
    wide = matrix.double()
    pieces = zip(torch.split(wide, _COLUMNS, dim=1), torch.split(moment, _COLUMNS, dim=1), strict=True)
    return max(0.0, sum(float((wide @ m.double()).mul_(w).sum()) for w, m in pieces))


def spaced(count: int, most: int) -> NDArray[np.intp]:
    """Up to ``most`` of ``count`` numbers, evenly spaced."""
    return np.arange(min(count, most)) * count // min(count, most)
