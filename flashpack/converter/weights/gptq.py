"""GPTQ: integers packed along the input, a scale and a zero point for each group, columns in any order of groups.

``X.qweight`` is I32 [columns * bits / 32, rows], lowest bits first: transposed, the words of the affine encoding.
``X.qzeros`` is I32 [groups, rows * bits / 32], ``X.scales`` [groups, rows], ``X.g_idx`` the group of each column. The
first format of GPTQ stores zero points less one, ``gptq_v2`` as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashpack.converter.tensor import Arrays, Extent, SourceTensor
from flashpack.converter.weights.declared import Declared
from flashpack.converter.weights.integers import Codes, Integers, affine_target
from flashpack.converter.weights.parts import Parts, check_dtype, check_shape
from flashpack.errors import SourceError, UnsupportedError
from flashpack.formats import affine
from flashpack.formats.dtypes import to_float32

_BITS = (2, 3, 4, 8)
_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""What is added to stored zero points, by ``checkpoint_format``."""


@dataclass(frozen=True)
class Gptq(Integers):
    """``offset`` is added to stored zero points. Rows lie across the file: a matrix is read whole."""

    offset: int

    @property
    def align(self) -> int:
        return 0

    def codes(self, arrays: Arrays) -> Codes:
        words = transposed(arrays["qweight"])
        scales = to_float32(np.ascontiguousarray(arrays["scales"].T), self.dtype)
        zeros = self._zeros(arrays["qzeros"])[:, : len(words)].T
        order = None
        if "g_idx" in arrays:
            order = arrays["g_idx"].astype(np.intp)
            if not ((order >= 0) & (order < scales.shape[1])).all():
                raise SourceError(f"g_idx names a group that is not there; there are {scales.shape[1]}")
            if np.array_equal(order, np.arange(len(order)) // self.group):
                order = None
        return Codes(words, scales, zeros.astype(np.float32), order)

    def _zeros(self, words: NDArray[np.generic]) -> NDArray[np.int32]:
        """Zero points [groups, rows or more]."""
        if not self.offset or self.bits == 3:
            zeros: NDArray[np.int32] = (unpacked(words, self.bits) + self.offset) % 2**self.bits
            return zeros
        # Writers subtract 1 from whole words, so that a zero point of 0 borrows from the next: add likewise.
        ones = np.uint32(sum(1 << shift for shift in range(0, 32, self.bits)))
        return unpacked(words.view("<u4") + ones, self.bits)

    def stored(self, arrays: Arrays) -> Arrays:
        codes = self.codes(arrays)
        if codes.order is not None:
            raise SourceError("g_idx is not in order, although config.json says desc_act false; set it to true there")
        if self.zero is not None and not (codes.zeros == self.zero).all():
            raise SourceError(
                f"zero points are not all {self.zero}, although config.json says sym true; set it to false there"
            )
        return super().stored(arrays)


def transposed(words: NDArray[np.generic]) -> NDArray[np.uint32]:
    """I32 [n, rows] -> uint32 [rows, n]."""
    return np.ascontiguousarray(words.T).view("<u4")


def unpacked(words: NDArray[np.generic], bits: int) -> NDArray[np.int32]:
    """I32 [groups, n] -> integers [groups, n * 32 / bits]."""
    return affine.unpack_bits(np.ascontiguousarray(words).view("<u4"), bits).astype(np.int32)


def read_gptq(stem: str, weight: Extent, parts: Parts, declared: Declared) -> SourceTensor:
    """The matrix ``stem.weight`` of ``stem.qweight``."""
    name = f"{stem}.qweight"
    checkpoint_format = declared.config.get("checkpoint_format", "gptq")
    if checkpoint_format not in _OFFSETS:
        raise UnsupportedError(
            f"tensor {name}: checkpoint_format {checkpoint_format!r} is not supported; gptq and gptq_v2 are"
        )
    check_dtype(name, weight, "I32")
    found = {
        "qweight": weight,
        "qzeros": parts.need(f"{stem}.qzeros", name, "I32"),
        "scales": parts.need(f"{stem}.scales", name, "F16", "BF16", "F32"),
    }
    order = parts.take(f"{stem}.g_idx")
    if order is not None and order.shape != (0,):
        found["g_idx"] = check_dtype(f"{stem}.g_idx", order, "I32")
    bits, group, symmetric, act_order = _parameters(name, found, declared)
    rows, width = weight.shape[1], weight.shape[0] * 32 // bits
    group = group if group > 0 else width
    groups = -(-width // group)
    why = f"{name} of {bits} bits in groups of {group}, as config.json says,"
    check_shape(f"{stem}.scales", found["scales"], (groups, rows), why)
    check_shape(f"{stem}.qzeros", found["qzeros"], (groups, -(-rows * bits // 32)), why)
    if "g_idx" in found:
        check_shape(f"{stem}.g_idx", found["g_idx"], (width,), why)
    if bits == 3 and rows % 32:
        raise UnsupportedError(f"tensor {name}: 3 bits of {rows} rows, no multiple of 32, are not supported")
    dtype = found["scales"].dtype
    zero = 2 ** (bits - 1) if symmetric else None
    target = None if act_order and "g_idx" in found else affine_target(bits, width, group, dtype, zero)
    if target is None:
        zero = None
    format = Gptq("gptq", bits, group, dtype, zero, target, _OFFSETS[checkpoint_format])
    return SourceTensor(f"{stem}.weight", (rows, width), format, found)


def _parameters(name: str, found: dict[str, Extent], declared: Declared) -> tuple[int, int, bool, bool]:
    """(bits, group size, symmetric, in another order). Where modules differ, the shapes say what can be said."""
    weight, scales, order = found["qweight"], found["scales"], found.get("g_idx")
    if len(weight.shape) != 2 or len(scales.shape) != 2:
        raise UnsupportedError(f"tensor {name} has shape {list(weight.shape)}, scales {list(scales.shape)}: no matrix")
    bits, group = declared.integer("bits", name), declared.integer("group_size", name)
    symmetric = declared.config.get("sym") is True
    if any(declared.config.get(key) for key in ("dynamic", "extra_config")) and order is not None and order.shape[0]:
        bits = weight.shape[0] * 32 // order.shape[0]
        group = -(-order.shape[0] // scales.shape[0])
        symmetric = False
    if bits not in _BITS or weight.shape[0] * 32 % bits:
        raise UnsupportedError(f"tensor {name}: {bits} bits are not supported; {', '.join(map(str, _BITS))} are")
    return bits, group, symmetric, declared.config.get("desc_act") is not False
