"""Products, rows and sums in torch operations, on whatever device: in place of kernels that cannot be used.

A matrix is decoded to float32 a block of rows at a time. Slow; results may depend on how many tokens there are.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashpack.formats.floats import E2M1, E4M3, E8M0
from flashpack.kernels.cpu.widen import cut, group_numbers
from flashpack.kernels.interface import Activation, RecordView, StoredMatrix

BLOCK_VALUES = 2**22
"""Most values decoded at a time: 16 MiB of float32."""


def product(x: Tensor, weight: Tensor | StoredMatrix, bias: Tensor | None = None) -> Tensor:
    """float32 x [tokens, in] times the transpose of ``weight`` [out, in], plus ``bias`` [out]."""
    step = max(BLOCK_VALUES // weight.shape[1], 1)
    y = torch.cat([x @ decode(block).t() for block in cut(weight, step)], dim=-1)
    return y if bias is None else y + bias.float()


def expert(x: Tensor, record: RecordView, activation: Activation) -> Tensor:
    """One expert's network: float32 x [tokens, hidden] -> [tokens, hidden]."""
    parts = [product(x, matrix, bias) for matrix, bias in zip(record.first, record.first_bias, strict=True)]
    hidden = activation(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))
    return product(hidden, record.down, record.down_bias)


def rows(ids: Tensor, weight: Tensor | StoredMatrix) -> Tensor:
    """float32 rows of ``weight``: ids [n] -> [n, in]."""
    if isinstance(weight, Tensor):
        return weight[ids].float()
    e, scale_rows = weight.encoding, ids
    if e.name == "fp8_e4m3":
        scale_rows = (ids + weight.first) // e.block[0] if e.block[0] else torch.zeros_like(ids)
        e = replace(e, block=(1, e.block[1]))
    if e.name == "affine_dq":
        return decode(_affine(weight, ids))
    biases = None if weight.biases is None else weight.biases[ids]
    return decode(StoredMatrix(e, weight.weight[ids], weight.scales[scale_rows], biases, weight.global_scale))


def combine(outputs: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The sums over k, in order, of rows places [tokens, top_k] of float32 outputs times weights; negative: zeros."""
    total = outputs.new_zeros(len(places), outputs.shape[1])
    for place, weight in zip(places.unbind(1), weights.float().unbind(1), strict=True):
        here = (outputs[place.clamp(min=0).long()] * weight.unsqueeze(1)).masked_fill_((place < 0).unsqueeze(1), 0)
        total += here
    return total


def decode(weight: Tensor | StoredMatrix) -> Tensor:
    """The float32 values, as ``formats.encodings.decode`` has them."""
    if isinstance(weight, Tensor):
        return weight.float()
    e, (rows, width) = weight.encoding, weight.shape
    device = weight.weight.device
    if e.name == "affine_dq":
        return decode(_affine(weight, torch.arange(rows, device=device)))
    if e.name == "affine":
        assert weight.biases is not None
        grouped = unpack_bits(weight.weight, e.bits).float().view(rows, -1, e.group_size)
        return (grouped * weight.scales.float().unsqueeze(-1) + weight.biases.float().unsqueeze(-1)).view(rows, width)
    if e.name == "fp8_e4m3":
        wide = _table("e8m0", device)[weight.scales.long()] if e.dtype == "E8M0" else weight.scales.float()
        down, across = (torch.arange(n, device=device) for n in (rows, width))
        down = (down + weight.first) // e.block[0] if e.block[0] else torch.zeros_like(down)
        across = across // e.block[1] if e.block[1] else torch.zeros_like(across)
        return _table("e4m3", device)[weight.weight.long()] * wide[down][:, across]
    wide = _table("e8m0" if e.name == "mxfp4" else "e4m3", device)[weight.scales.long()]
    # The scale is rounded to float32 first, then the product with it.
    if weight.global_scale is not None:
        wide = wide * weight.global_scale if e.global_scale == "multiply" else wide / weight.global_scale
    values = _table("e2m1", device)[unpack_bits(weight.weight, 4).long()]
    return (values.view(rows, -1, e.group_size) * wide.unsqueeze(-1)).view(rows, width)


def _affine(weight: StoredMatrix, ids: Tensor) -> StoredMatrix:
    """Rows ``ids`` [n] of an ``affine_dq`` matrix, with float32 scales and biases."""
    encoding = replace(weight.encoding, name="affine", dtype="F32")
    return StoredMatrix(encoding, weight.weight[ids], *group_numbers(weight, ids))


def unpack_bits(words: Tensor, bits: int) -> Tensor:
    """The codes in int32 [rows, W] as int32 [rows, W * 32 / bits]."""
    chunks = words.contiguous().view(torch.uint8).view(len(words), -1, bits).to(torch.int32)  # 8 codes in `bits` bytes
    codes = []
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = chunks[..., byte] >> shift
        if shift + bits > 8:
            code = code | chunks[..., byte + 1] << (8 - shift)
        codes.append(code & ((1 << bits) - 1))
    return torch.stack(codes, dim=-1).view(len(words), -1)


_FLOATS: dict[str, NDArray[np.float32]] = {"e2m1": E2M1, "e4m3": E4M3, "e8m0": E8M0}


@cache
def _table(name: str, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # of use in both modes
        return torch.from_numpy(_FLOATS[name].copy()).to(device)
