"""The values that codes of a group can stand for, and choosing them: scales and biases, in torch.

Matrices are held by columns here, float32 [..., in, out] ("by columns"), so that what is done to one column of weights
is done to values side by side. Everything is elementwise along the last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashpack.formats import constants as C
from flashpack.formats.affine import pack_bits
from flashpack.formats.dtypes import from_float32
from flashpack.formats.records import Encoding

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

STARTS = (1.0, 0.85, 0.7)
"""Shares of a group's range that are tried as the range of the codes, before scale and bias are fitted."""

ITERATIONS = 5
"""Alternations of rounding the codes and fitting scale and bias to them."""

MOST = 15
"""The largest code of a scale or bias of ``affine_dq``."""


@dataclass
class Quadratic:
    """How the weighted error of one group changes with its scale and bias, all [..., out]:
    ``scale * ds + bias * db + (scale2 * ds**2 + 2 * both * ds * db + bias2 * db**2) / 2``."""

    scale: Tensor
    bias: Tensor
    scale2: Tensor
    both: Tensor
    bias2: Tensor

    def change(self, ds: Tensor, db: Tensor) -> Tensor:
        return ds * (self.scale + self.scale2 * ds / 2 + self.both * db) + db * (self.bias + self.bias2 * db / 2)

    def best_bias(self, ds: Tensor) -> Tensor:
        """The best change of the bias, if the scale changes by ``ds``."""
        return -(self.bias + self.both * ds) / self.bias2


class Grid(Protocol):
    """Scales and biases of a matrix, both [..., groups, out], as they decode, and how they are stored."""

    group: int
    levels: int
    scales: Tensor
    biases: Tensor

    def fit(self, number: int, weights: Tensor) -> None:
        """Choose those of group ``number``; ``weights`` [..., in - first, out] are all from the group's first on."""

    def refit(self, number: int, error: Quadratic) -> None:
        """Improve those of group ``number`` while all codes stay, or leave them."""

    def stored(self, codes: Tensor) -> dict[str, NDArray[Any]]:
        """The stored arrays (``Encoding.parts``) for ``codes`` [..., in, out]."""


def grid_for(encoding: Encoding, weights: Tensor) -> Grid:
    """The grid of ``encoding`` for ``weights`` by columns; nothing is chosen yet."""
    return (AffineGrid if encoding.name == "affine" else DoubleGrid)(encoding, weights)


def round_codes(weights: Tensor, scale: Tensor, bias: Tensor, levels: int) -> Tensor:
    """The nearest codes of ``weights`` [..., group, out] for scales and biases [..., out]."""
    # Without a scale all codes decode to the bias.
    step = torch.where(scale == 0, 1.0, scale).unsqueeze(-2)
    return weights.sub(bias.unsqueeze(-2)).div_(step).round_().clamp_(0, levels)


def squared_error(weights: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Of each group [..., out]."""
    return (codes * scale.unsqueeze(-2)).add_(bias.unsqueeze(-2)).sub_(weights).square_().sum(-2)


class _Best:
    """Keeps, for each group, the candidate with the smallest error."""

    def __init__(self) -> None:
        self.error: Tensor | None = None
        self.found: tuple[Tensor, ...] = ()

    def offer(self, error: Tensor, *found: Tensor) -> None:
        if self.error is None:
            self.error, self.found = error, tuple(tensor.clone() for tensor in found)
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.found = tuple(torch.where(better, new, old) for new, old in zip(found, self.found, strict=True))


def fit_groups(weights: Tensor, levels: int, rounded: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Tensor, ...]:
    """Scale and bias [..., out] of each group of ``weights`` [..., group, out] with a small squared error.

    Several ranges of the codes, each refined by alternating least squares. ``rounded`` makes of a number what is
    stored of it.
    """
    low, high = weights.amin(-2), weights.amax(-2)
    middle, mean = (low + high) / 2, weights.mean(-2)
    best = _Best()
    for share in STARTS:
        scale = rounded((high - low) * (share / levels))
        bias = rounded(middle - (high - low) * (share / 2))
        for _ in range(ITERATIONS):
            codes = round_codes(weights, scale, bias, levels)
            best.offer(squared_error(weights, codes, scale, bias), scale, bias)
            center = codes.mean(-2)
            codes -= center.unsqueeze(-2)
            spread = codes.square().sum(-2)
            # Equal codes say nothing about the scale.
            scale = rounded(torch.where(spread > 0, codes.mul_(weights).sum(-2) / spread, scale))
            bias = rounded(mean - scale * center)
        codes = round_codes(weights, scale, bias, levels)
        best.offer(squared_error(weights, codes, scale, bias), scale, bias)
    return best.found


class AffineGrid:
    """Of the encoding ``affine``."""

    def __init__(self, encoding: Encoding, weights: Tensor) -> None:
        *lead, width, rows = weights.shape
        self._encoding, self._dtype = encoding, DTYPES[encoding.dtype]
        self.group, self.levels = encoding.group_size, 2**encoding.bits - 1
        self.scales = weights.new_zeros(*lead, width // self.group, rows)
        self.biases = self.scales.clone()

    def fit(self, number: int, weights: Tensor) -> None:
        found = fit_groups(weights[..., : self.group, :], self.levels, self._rounded)
        self.scales[..., number, :], self.biases[..., number, :] = found

    def refit(self, number: int, error: Quadratic) -> None:
        old_scale, old_bias = self.scales[..., number, :], self.biases[..., number, :]
        determinant = error.scale2 * error.bias2 - error.both.square()
        # With nearly equal codes scale and bias are the same thing.
        free = determinant > 1e-6 * error.scale2 * error.bias2
        wanted = (error.both * error.bias - error.bias2 * error.scale) / torch.where(free, determinant, 1.0)
        scale = self._rounded(old_scale + torch.where(free, wanted, 0.0))
        bias = self._rounded(old_bias + error.best_bias(scale - old_scale))
        better = error.change(scale - old_scale, bias - old_bias) < 0
        self.scales[..., number, :] = torch.where(better, scale, old_scale)
        self.biases[..., number, :] = torch.where(better, bias, old_bias)

    def stored(self, codes: Tensor) -> dict[str, NDArray[Any]]:
        dtype = self._encoding.dtype
        scales, biases = (from_float32(_rows(numbers), dtype) for numbers in (self.scales, self.biases))
        return {"weight": _words(codes, self._encoding.bits), "scales": scales, "biases": biases}

    def _rounded(self, numbers: Tensor) -> Tensor:
        return numbers.to(self._dtype).float()


class DoubleGrid:
    """Of the encoding ``affine_dq``: ``scale = d * s`` and ``bias = c + m * b``, with d, c, m of a block.

    Where each block lies in one row, its numbers are chosen when its first group is; else all of them at once, for the
    weights as they are at first.
    """

    def __init__(self, encoding: Encoding, weights: Tensor) -> None:
        *lead, width, rows = weights.shape
        self._bits, self.group, self.levels = encoding.bits, C.DQ_GROUP, 2**encoding.bits - 1
        self.scales = weights.new_zeros(*lead, width // self.group, rows)
        self.biases = self.scales.clone()
        self._scale_codes, self._bias_codes = self.scales.clone(), self.scales.clone()
        self._in_rows = width % C.DQ_BLOCK == 0
        # d, c and m of each group.
        self._numbers = [self.scales.clone() for _ in range(3)]
        if not self._in_rows:
            blocks = weights.mT.reshape(*lead, -1, C.DQ_BLOCK // self.group, self.group).movedim(-3, -1)
            for own, found in zip(self._numbers, fit_blocks(blocks, self.levels), strict=True):
                spread = found.repeat_interleave(C.DQ_BLOCK // self.group, dim=-1)
                own.copy_(spread.reshape(*lead, rows, -1).mT)

    def fit(self, number: int, weights: Tensor) -> None:
        groups = C.DQ_BLOCK // self.group
        if self._in_rows and number % groups == 0:
            block = weights[..., : C.DQ_BLOCK, :].reshape(*weights.shape[:-2], groups, self.group, -1)
            for own, found in zip(self._numbers, fit_blocks(block, self.levels), strict=True):
                own[..., number : number + groups, :] = found.unsqueeze(-2)
        group = weights[..., : self.group, :]
        self._set(number, fit_codes(group, fit_groups(group, self.levels), self._of_group(number), self.levels))

    def refit(self, number: int, error: Quadratic) -> None:
        d, c, m = self._of_group(number)
        old_scale, old_bias = self.scales[..., number, :], self.biases[..., number, :]
        best = _Best()
        best.offer(torch.zeros_like(d), self._scale_codes[..., number, :], self._bias_codes[..., number, :])
        for code in range(MOST + 1):
            ds = d * code - old_scale
            bias_code = _code(old_bias + error.best_bias(ds) - c, m)
            db = c + m * bias_code - old_bias
            best.offer(error.change(ds, db), torch.full_like(d, code), bias_code)
        self._set(number, best.found)

    def stored(self, codes: Tensor) -> dict[str, NDArray[Any]]:
        pairs = _rows(self._scale_codes + 16 * self._bias_codes).astype(np.uint8)
        numbers = np.stack([_rows(own).reshape(*pairs.shape[:-2], -1) for own in self._numbers], axis=-1)
        blocks = from_float32(np.ascontiguousarray(numbers[..., :: C.DQ_BLOCK // C.DQ_GROUP, :]), C.DQ_DTYPE)
        return {"weight": _words(codes, self._bits), "scales": pairs, "blocks": blocks}

    def _of_group(self, number: int) -> tuple[Tensor, ...]:
        return tuple(own[..., number, :] for own in self._numbers)

    def _set(self, number: int, codes: tuple[Tensor, ...]) -> None:
        d, c, m = self._of_group(number)
        self._scale_codes[..., number, :], self._bias_codes[..., number, :] = codes
        self.scales[..., number, :] = d * codes[0]
        self.biases[..., number, :] = c + m * codes[1]


def fit_blocks(weights: Tensor, levels: int) -> tuple[Tensor, ...]:
    """d, c and m [..., blocks] for ``weights`` [..., 8, 32, blocks], as bfloat16 has them.

    Those that span the scales and biases that the groups would like, and a least squares fit to the codes that follow
    from these; the better of both.
    """
    scale, bias = fit_groups(weights, levels)
    low = _bfloat(bias.amin(-2))
    numbers = [_bfloat(scale.amax(-2) / MOST), low, _bfloat((bias.amax(-2) - low) / MOST)]
    best = _Best()
    for fitted in (False, True):
        d, c, m = (number.unsqueeze(-2).expand_as(scale) for number in numbers)
        scale_codes, bias_codes = fit_codes(weights, (scale, bias), (d, c, m), levels)
        s, b = d * scale_codes, c + m * bias_codes
        codes = round_codes(weights, s, b, levels)
        best.offer(squared_error(weights, codes, s, b).sum(-2), *numbers)
        if not fitted:
            numbers = _least_squares(weights, codes * scale_codes.unsqueeze(-2), bias_codes, numbers)
    return best.found


def _least_squares(weights: Tensor, steps: Tensor, bias_codes: Tensor, numbers: list[Tensor]) -> list[Tensor]:
    """d, c and m with the smallest squared error of ``d * steps + c + m * bias_codes``."""
    ones = torch.ones_like(steps)
    columns = [x.flatten(-3, -2).movedim(-1, -2) for x in (steps, ones, ones * bias_codes.unsqueeze(-2))]
    features = torch.stack(columns, dim=-2).double()  # [..., blocks, 3, 256]
    normal = features @ features.mT
    # Blocks of equal groups have no m, and those of equal values no d; the ridge leaves both as they were.
    ridge = 1e-6 * normal.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None] * torch.eye(3).to(normal)
    before = torch.stack(numbers, dim=-1).double().unsqueeze(-1)
    target = weights.flatten(-3, -2).movedim(-1, -2).double().unsqueeze(-1)
    found = torch.linalg.solve(normal + ridge, features @ target + ridge @ before).squeeze(-1).float()
    # A scale is never negative.
    return [_bfloat(found[..., 0].clamp(min=0)), _bfloat(found[..., 1]), _bfloat(found[..., 2])]


def fit_codes(
    weights: Tensor, wanted: tuple[Tensor, ...], numbers: tuple[Tensor, ...], levels: int
) -> tuple[Tensor, ...]:
    """Codes of scale and bias [..., out] near a ``wanted`` scale and bias of each group, given its d, c and m."""
    (scale, bias), (d, c, m) = wanted, numbers
    nearest, mean = _code(scale, d), weights.mean(-2)
    best = _Best()
    for offset in (-1, 0, 1):
        scale_codes = (nearest + offset).clamp_(0, MOST)
        own = d * scale_codes
        middle = bias + (scale - own) * (levels / 2)  # of the range: it stays
        for _ in range(2):
            bias_codes = _code(middle - c, m)
            at = c + m * bias_codes
            codes = round_codes(weights, own, at, levels)
            best.offer(squared_error(weights, codes, own, at), scale_codes, bias_codes)
            middle = mean - own * codes.mean(-2)
    return best.found


def _code(numbers: Tensor, step: Tensor) -> Tensor:
    """The whole multiple of ``step``, from 0 to ``MOST``, nearest to each number; 0 where ``step`` is 0."""
    return torch.where(step == 0, 0.0, numbers / torch.where(step == 0, 1.0, step)).round_().clamp_(0, MOST)


def _bfloat(numbers: Tensor) -> Tensor:
    return numbers.to(torch.bfloat16).float()


def _rows(numbers: Tensor) -> NDArray[np.float32]:
    """By columns on any device -> [..., out, groups] in memory."""
    return np.ascontiguousarray(numbers.mT.cpu().numpy())


def _words(codes: Tensor, bits: int) -> NDArray[np.uint32]:
    return pack_bits(np.ascontiguousarray(codes.mT.to(torch.uint8).cpu().numpy()), bits)
