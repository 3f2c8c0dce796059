"""GPTQ: rounding a matrix so that what it gives for real inputs changes least.

The error of a matrix is ``trace((V - W) H (V - W)^T)``: V decodes to what is stored, ``H = sum of x x^T`` over the
inputs x. Columns are rounded one after the other, and what a column loses is made up for by those that follow (Frantar
et al., 2023; here without an inverse of H, as Chee et al., 2023, have it). Scales and biases of a group are chosen just
before its columns are rounded. ``refined``: then groups are visited again; each gets the scale, the bias and the codes
that are best while all others stay.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from flashpack.converter.grids import Grid, Quadratic, grid_for
from flashpack.formats.records import Encoding

SWEEPS = 2
"""Visits of all groups by ``refined``: a third gives nothing that could be measured."""


@torch.inference_mode()
def gptq(weights: Tensor, hessian: Tensor, encoding: Encoding, refined: bool) -> dict[str, NDArray[Any]]:
    """The stored parts (``encoding.parts``) of ``weights`` in the encoding, ``affine`` or ``affine_dq``.

    ``weights`` is float32 [..., out, in], finite, on the device that does the work; ``hessian`` float32 [..., in, in],
    positive definite by a margin (see ``calibrated``).
    """
    columns = weights.mT.contiguous()
    grid = grid_for(encoding, columns)
    codes = _round(columns, feedback(hessian), grid)
    if refined:
        error = decode(codes, grid) - columns
        slope = hessian @ error
        for _ in range(SWEEPS):
            _sweep(columns, hessian, grid, codes, error, slope)
    return grid.stored(codes)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """What is stored, by columns."""
    grouped = codes.reshape(*codes.shape[:-2], -1, grid.group, codes.shape[-1]) * grid.scales.unsqueeze(-2)
    return grouped.add_(grid.biases.unsqueeze(-2)).reshape(codes.shape)


def feedback(hessian: Tensor) -> Tensor:
    """How much of what column i lost is added to column j before that is rounded: [..., i, j], of use for i < j.

    It is U of ``H = U D U^T``, whose diagonal is 1.
    """
    # Turned by half a turn, the lower factor of the matrix that was turned so is upper, and H = V V^T.
    lower: Tensor = torch.linalg.cholesky(hessian.flip(-1, -2))
    upper = lower.flip(-1, -2)
    return upper.div_(upper.diagonal(dim1=-2, dim2=-1).clone().unsqueeze(-2))


def _round(source: Tensor, feedback: Tensor, grid: Grid) -> Tensor:
    """Codes [..., in, out] for columns [..., in, out]."""
    columns, codes = source.clone(), torch.empty_like(source)
    for number, first in enumerate(range(0, source.shape[-2], grid.group)):
        end = first + grid.group
        grid.fit(number, columns[..., first:, :])
        scale, bias = grid.scales[..., number, :], grid.biases[..., number, :]
        step = torch.where(scale == 0, 1.0, scale)
        lost = torch.empty_like(source[..., first:end, :])
        for i in range(first, end):
            code = columns[..., i, :].sub(bias).div_(step).round_().clamp_(0, grid.levels)
            codes[..., i, :] = code
            loss = lost[..., i - first : i - first + 1, :]
            loss[..., 0, :] = source[..., i, :] - code.mul_(scale).add_(bias)
            columns[..., i + 1 : end, :] += feedback[..., i, i + 1 : end].unsqueeze(-1) * loss
        columns[..., end:, :] += feedback[..., first:end, end:].mT @ lost
    return codes


def _sweep(columns: Tensor, hessian: Tensor, grid: Grid, codes: Tensor, error: Tensor, slope: Tensor) -> None:
    """Improve one group after the other in place; ``error`` is that of the decoded values, ``slope`` H times it."""
    for number, first in enumerate(range(0, columns.shape[-2], grid.group)):
        at = slice(first, first + grid.group)
        own, code, target = hessian[..., at, at], codes[..., at, :], columns[..., at, :]
        before = error[..., at, :].clone()
        pull = slope[..., at, :].clone()

        weighted = own @ code
        grid.refit(
            number,
            Quadratic(
                (pull * code).sum(-2),
                pull.sum(-2),
                (weighted * code).sum(-2),
                weighted.sum(-2),
                own.sum((-1, -2)).unsqueeze(-1).expand_as(code[..., 0, :]),
            ),
        )
        scale, bias = grid.scales[..., number, :], grid.biases[..., number, :]
        now = (code * scale.unsqueeze(-2)).add_(bias.unsqueeze(-2)).sub_(target)
        pull += own @ (now - before)

        step = torch.where(scale == 0, 1.0, scale)
        for i in range(grid.group):
            # Where this weight would best be while all others stay.
            wanted = target[..., i, :] + now[..., i, :] - pull[..., i, :] / own[..., i, i].unsqueeze(-1)
            new = wanted.sub_(bias).div_(step).round_().clamp_(0, grid.levels)
            change = (new - code[..., i, :]).mul_(scale)
            code[..., i, :] = new
            now[..., i, :] += change
            pull += own[..., i].unsqueeze(-1) * change.unsqueeze(-2)
        slope += hessian[..., at].contiguous() @ (now - before)
        error[..., at, :] = now
