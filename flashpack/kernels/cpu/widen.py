"""Stored values to float32, bit for bit as ``formats.encodings.decode`` has them."""

from __future__ import annotations

import threading
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashpack.formats.affine_dq import GROUPS
from flashpack.formats.floats import E2M1, E4M3, E8M0
from flashpack.kernels.interface import StoredMatrix

ALIGNMENT = 64
"""Bytes. torch allocates at multiples of it."""


class _Scratch(threading.local):
    """Buffers of a thread, kept: the system's allocator would give such sizes back and fetch them again each time."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._views: dict[tuple[torch.dtype, int, int], Tensor] = {}

    def take(self, dtype: torch.dtype, rows: int, width: int) -> Tensor:
        """[rows, width], contiguous and aligned; valid until this thread asks for the type again."""
        view = self._views.get((dtype, rows, width))
        if view is None:
            buffer = self._buffers.get(dtype)
            with torch.inference_mode(False):  # of use in both modes
                if buffer is None or len(buffer) < rows * width:
                    buffer = self._buffers[dtype] = torch.empty(rows * width, dtype=dtype)
                    # Views of the old buffer would keep it.
                    self._views = {key: v for key, v in self._views.items() if key[0] != dtype}
                view = self._views[dtype, rows, width] = buffer[: rows * width].view(rows, width)
        return view


_scratch = _Scratch()


def block(weight: Tensor | StoredMatrix) -> Tensor:
    """A block of rows in float32, contiguous and aligned; valid until the thread's next call."""
    if isinstance(weight, Tensor) and weight.dtype == torch.float32:
        return aligned(weight)
    out = _scratch.take(torch.float32, *weight.shape)
    widen(weight, out)
    return out


def aligned(x: Tensor) -> Tensor:
    """``x`` itself or a copy that is contiguous and aligned."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def cut(weight: Tensor | StoredMatrix, step: int) -> list[Tensor | StoredMatrix]:
    """The matrix in blocks of ``step`` rows, the last may have fewer."""
    if isinstance(weight, Tensor):
        return list(torch.split(weight, step))
    e, w = weight.encoding, weight
    words = torch.split(w.weight, step)
    if e.name == "fp8_e4m3" and e.block[0] != 1:
        starts = [w.first + i * step for i in range(len(words))]
        rows = [e.part_rows("scales", at, at + len(part), 0) for at, part in zip(starts, words, strict=True)]
        firsts = [at % e.block[0] if e.block[0] else 0 for at in starts]
        return [
            StoredMatrix(e, part, w.scales[r], first=first) for part, r, first in zip(words, rows, firsts, strict=True)
        ]
    scales = torch.split(w.scales, step)
    if w.blocks is not None:
        cuts: list[Tensor | StoredMatrix] = []
        for i, (part, codes) in enumerate(zip(words, scales, strict=True)):
            start = w.first + i * step * w.scales.shape[1]
            blocks = w.blocks[start // GROUPS : -(-(start + codes.numel()) // GROUPS)]
            cuts.append(StoredMatrix(e, part, codes, first=start % GROUPS, blocks=blocks))
        return cuts
    biases = torch.split(w.biases, step) if w.biases is not None else [None] * len(words)
    return [StoredMatrix(e, *parts, w.global_scale) for parts in zip(words, scales, biases, strict=True)]


def widen(weight: Tensor | StoredMatrix, out: Tensor) -> None:
    """Write the values of ``weight`` to ``out`` (float32, contiguous, of its shape)."""
    if isinstance(weight, Tensor):
        out.copy_(weight)
        return
    e = weight.encoding
    if e.name == "fp8_e4m3":
        _fp8(weight, out)
        return
    grouped = out.view(*weight.scales.shape, e.group_size)
    if weight.biases is not None or weight.blocks is not None:
        scales, biases = weight.scales, weight.biases
        if biases is None:
            scales, biases = group_numbers(weight, torch.arange(len(scales)))
        unpack_bits(weight.weight, e.bits, out)
        grouped.mul_(scales.unsqueeze(-1))
        grouped.add_(biases.unsqueeze(-1))
        return
    _look_up(_pairs("e2m1"), weight.weight.view(torch.uint8), out)
    scales = _table("e8m0" if e.name == "mxfp4" else "e4m3")[weight.scales.int()]
    # The scale is rounded to float32 first, then the product with it.
    if weight.global_scale is not None:
        scales = scales * weight.global_scale if e.global_scale == "multiply" else scales / weight.global_scale
    grouped.mul_(scales.unsqueeze(-1))


def group_numbers(weight: StoredMatrix, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and biases, float32 [rows, groups], of these rows of an ``affine_dq`` matrix."""
    assert weight.blocks is not None
    codes = weight.scales[rows]
    groups = weight.first + rows.unsqueeze(1) * codes.shape[1] + torch.arange(codes.shape[1], device=rows.device)
    d, c, m = weight.blocks[groups // GROUPS].float().unbind(-1)
    return d * (codes & 15), c + m * (codes >> 4)


def unpack_bits(words: Tensor, bits: int, out: Tensor) -> None:
    """Write the codes in int32 [rows, W] (contiguous) to ``out``, float32 [rows, W*32/bits] (contiguous)."""
    rows, width = out.shape
    stream = words.view(torch.uint8)
    if bits == 8:
        out.copy_(stream)
    elif bits == 4:
        # One byte of two codes becomes two bytes of one: 0xba -> 0x0b0a.
        pairs = _scratch.take(torch.int16, rows, stream.shape[1]).copy_(stream)
        pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F)
        out.copy_(pairs.view(torch.uint8))
    elif bits == 2:
        codes = out.view(rows, width // 4, 4)
        for i in range(4):
            codes[..., i] = (stream >> (2 * i)) & 3
    else:
        # 8 values in `bits` bytes, as in formats.affine
        chunks = stream.view(rows, width // 8, bits).to(torch.int64)
        word = chunks[..., 0]
        for i in range(1, bits):
            word = word | (chunks[..., i] << (8 * i))
        codes = out.view(rows, width // 8, 8)
        for i in range(8):
            codes[..., i] = (word >> (bits * i)) & ((1 << bits) - 1)


def _fp8(weight: StoredMatrix, out: Tensor) -> None:
    e, (rows, width) = weight.encoding, out.shape
    if width % 2:
        torch.index_select(_table("e4m3"), 0, weight.weight.reshape(-1).int(), out=out.view(-1))
    else:
        _look_up(_pairs("e4m3"), weight.weight.view(torch.uint16), out)
    scales = _table("e8m0")[weight.scales.int()] if e.dtype == "E8M0" else weight.scales
    if e.block[0] > 1:
        scales = scales[(weight.first + torch.arange(rows)) // e.block[0]]
    whole = width // e.block[1] if e.block[1] else 0
    end = whole * e.block[1]
    if whole:
        out[:, :end].view(rows, whole, e.block[1]).mul_(scales[:, :whole].unsqueeze(-1))
    if end < width:  # the rest of the last block, or the only one
        out[:, end:].mul_(scales[:, whole:])


def _look_up(pairs: Tensor, codes: Tensor, out: Tensor) -> None:
    """Write the two float32 values behind each code in ``codes`` to ``out``: one copy of 8 bytes for each."""
    torch.index_select(pairs, 0, codes.reshape(-1).int(), out=out.view(torch.int64).view(-1))


_FLOATS: dict[str, NDArray[np.float32]] = {"e2m1": E2M1, "e4m3": E4M3, "e8m0": E8M0}


@cache
def _table(name: str) -> Tensor:
    with torch.inference_mode(False):  # of use in both modes
        return torch.from_numpy(_FLOATS[name].copy())


@cache
def _pairs(name: str) -> Tensor:
    """Two neighbouring codes, the first in the low bits -> the bits of their two float32 values, as int64."""
    table = _FLOATS[name]
    both = np.stack([np.tile(table, len(table)), np.repeat(table, len(table))], axis=-1)
    with torch.inference_mode(False):
        return torch.from_numpy(both).view(torch.int64).view(-1)
