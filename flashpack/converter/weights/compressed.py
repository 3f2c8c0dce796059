"""compressed-tensors integers: packed into words (4 bits and others), or one to a byte (int8).

``X.weight_packed`` is I32 [rows, columns * bits / 32], lowest bits first, ``X.weight`` I8 [rows, columns]. Both are
signed; words hold them with half the range added, and zero points likewise, packed along the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from flashpack.converter.tensor import Arrays, Extent, SourceTensor
from flashpack.converter.weights.declared import Declared
from flashpack.converter.weights.integers import Codes, Integers, affine_target
from flashpack.converter.weights.parts import Parts, check_dtype, check_shape
from flashpack.errors import SourceError, UnsupportedError
from flashpack.formats import affine
from flashpack.formats.dtypes import to_float32

_BITS = (2, 4, 8)
"""Widths of which a word holds a whole number; others are packed in more than one way."""


@dataclass(frozen=True)
class CompressedIntegers(Integers):
    """``packed``: whether weights are words, or bytes; ``packed_zeros``: the same of zero points."""

    packed: bool
    packed_zeros: bool

    @property
    def align(self) -> int:
        return 32 // self.bits if self.packed_zeros else 1

    def cut(self, parts: dict[str, Extent], start: int, count: int) -> dict[str, Extent]:
        cut = {}
        for name, part in parts.items():
            first, last = start, start + count
            if name == "zeros" and self.packed_zeros:
                first, last = first * self.bits // 32, -(-last * self.bits // 32)
            shared = name == "order" or (name in ("scales", "zeros") and part.shape == (1, 1))
            cut[name] = part if shared else part.take(first, last - first)
        return cut

    def codes(self, arrays: Arrays) -> Codes:
        weight = np.ascontiguousarray(arrays["weight"])
        half = 2 ** (self.bits - 1)
        words = weight.view("<u4") if self.packed else (weight.view(np.uint8) ^ np.uint8(half)).view("<u4")
        rows = len(words)
        zeros = np.full((1, 1), half, dtype=np.float32)
        if self.packed_zeros:
            columns = np.ascontiguousarray(arrays["zeros"].T).view("<u4")
            zeros = affine.unpack_bits(columns, self.bits)[:, :rows].T.astype(np.float32)
        elif "zeros" in arrays:
            zeros = arrays["zeros"].astype(np.float32) + half
        order = None
        if "order" in arrays:
            order = arrays["order"].astype(np.intp)
            if (order < 0).any():  # written, but never set
                order = None
            elif (order >= arrays["scales"].shape[1]).any():
                raise SourceError(
                    f"weight_g_idx names a group that is not there; there are {arrays['scales'].shape[1]}"
                )
        return Codes(words, to_float32(arrays["scales"], self.dtype), zeros, order)


def read_packed(stem: str, weight: Extent, parts: Parts, declared: Declared) -> SourceTensor:
    """``stem.weight_packed`` of integers."""
    stored = f"{stem}.weight_packed"
    bits = declared.weights(stem).get("num_bits")
    if bits not in _BITS:
        raise UnsupportedError(f"tensor {stored}: packed integers of {bits} bits are not supported; 2, 4 and 8 are")
    parts.take(f"{stem}.weight_shape")  # follows from the others
    return _read(stem, stored, weight, bits, weight.shape[-1] * 32 // bits, parts, declared)


def read_bytes(stem: str, weight: Extent, parts: Parts, declared: Declared) -> SourceTensor:
    """``stem.weight`` of I8."""
    return _read(stem, f"{stem}.weight", weight, 8, weight.shape[-1], parts, declared)


def _read(
    stem: str, stored: str, weight: Extent, bits: int, width: int, parts: Parts, declared: Declared
) -> SourceTensor:
    if len(weight.shape) != 2 or width % 4:
        raise UnsupportedError(f"tensor {stored} has shape {list(weight.shape)}; a matrix of whole words is needed")
    rows = weight.shape[0]
    scale_name, zero_name = f"{stem}.weight_scale", f"{stem}.weight_zero_point"
    scales = parts.need(scale_name, stored, "BF16", "F16", "F32")
    if math.prod(scales.shape) == 1:
        scales = scales.reshape(1, 1)
    elif scales.shape == (rows,):
        scales = scales.reshape(rows, 1)
    said = declared.weights(stem).get("group_size")
    group = said if type(said) is int and said > 0 else width
    groups = -(-width // group)
    if scales.shape != (1, 1):
        check_shape(scale_name, scales, (rows, groups), f"{bits} bits in groups of {group}, as config.json says,")
    elif groups != 1:
        raise SourceError(f"tensor {scale_name} is a single value, but config.json says groups of {group}")
    found = {"weight": weight, "scales": scales}
    zeros = parts.take(zero_name)
    packed_zeros = False
    if zeros is not None:
        packed_zeros = check_dtype(zero_name, zeros, "I32", "I8").dtype == "I32"
        shape = (-(-rows * bits // 32), groups) if packed_zeros else scales.shape
        if math.prod(zeros.shape) == math.prod(shape):
            zeros = zeros.reshape(*shape)
        found["zeros"] = check_shape(zero_name, zeros, shape, stored)
    order = parts.take(f"{stem}.weight_g_idx")
    if order is not None:
        check_dtype(f"{stem}.weight_g_idx", order, "I32", "I64")
        found["order"] = check_shape(f"{stem}.weight_g_idx", order, (width,), stored)
    zero = 2 ** (bits - 1) if zeros is None else None
    target = affine_target(bits, width, group, scales.dtype, zero) if order is None else None
    packed = weight.dtype == "I32"
    format = CompressedIntegers(f"ct-int{bits}", bits, group, scales.dtype, zero, target, packed, packed_zeros)
    return SourceTensor(f"{stem}.weight", (rows, width), format, found)
