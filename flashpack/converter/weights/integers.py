"""Integers with a scale and a zero point for each group of a row: what GPTQ, AWQ and compressed-tensors have in common.

A value is ``(q - zero) * scale``. Scales of BF16 or F16 have so few bits that the product is exact in float32, and so
are ``q * scale`` and ``-zero * scale``: the affine encoding, ``q * scale + bias``, gives the very same values. Its
biases need float32 unless the zero point is a power of two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashpack.converter.tensor import Arrays, WeightFormat
from flashpack.errors import SourceError
from flashpack.formats import affine
from flashpack.formats import constants as C
from flashpack.formats.dtypes import from_float32, to_float32
from flashpack.formats.records import Encoding


class Codes(NamedTuple):
    """Stored arrays put in the order of the model.

    ``words``: the integers of each row, packed as in the affine encoding. ``scales`` and ``zeros``: float32
    [rows, groups], or [1, 1] for all. ``order``: the group of each column, where not one after the other.
    """

    words: NDArray[np.uint32]
    scales: NDArray[np.float32]
    zeros: NDArray[np.float32]
    order: NDArray[np.intp] | None = None


@dataclass(frozen=True)
class Integers(WeightFormat, ABC):
    """Integers of ``bits`` bits in groups of ``group`` columns, with scales of type ``dtype``.

    ``zero``: the zero point of all values; None if they are stored. ``target``: the encoding that holds the values.
    """

    name: str
    bits: int
    group: int
    dtype: str
    zero: int | None
    target: Encoding | None

    @property
    def label(self) -> str:
        return self.name

    @property
    def encoding(self) -> Encoding | None:
        return self.target

    @abstractmethod
    def codes(self, arrays: Arrays) -> Codes:
        """The stored arrays in the model's order."""

    def values(self, arrays: Arrays) -> NDArray[np.float32]:
        words, scales, zeros, order = self.codes(arrays)
        values = affine.unpack_bits(words, self.bits).astype(np.float32)
        groups = np.arange(values.shape[1]) // self.group if order is None else order
        with np.errstate(all="ignore"):
            for array, apply in ((zeros, np.subtract), (scales, np.multiply)):
                apply(values, array[:, groups] if array.shape[1] > 1 else array, out=values)
            values += 0  # there is no -0 in the affine encoding
        return values

    def stored(self, arrays: Arrays) -> Arrays:
        words, scales, zeros, order = self.codes(arrays)
        encoding = self.target
        assert encoding is not None
        assert order is None
        with np.errstate(all="ignore"):
            biases = -(zeros * scales)
            kept = from_float32(biases, encoding.dtype)
            largest = scales * np.float32(2**self.bits - 1)
        if not (np.isfinite(largest).all() and np.array_equal(to_float32(kept, encoding.dtype), biases)):
            worst = np.max(np.abs(scales))
            raise SourceError(
                f"a scale of {worst:g} with zero point {np.max(zeros):g} is too large for {encoding.dtype}; "
                f"choose a width instead of carrying the values over, such as --experts q8 --dense q8"
            )
        groups = words.shape[1] * 32 // (self.bits * encoding.group_size)
        spread = {"scales": from_float32(scales, encoding.dtype), "biases": kept}
        for part, array in spread.items():
            each = np.repeat(array, groups // array.shape[1], axis=1)
            spread[part] = np.broadcast_to(each, (words.shape[0], groups))
        return {"weight": words, **spread}


def affine_target(bits: int, width: int, group: int, dtype: str, zero: int | None) -> Encoding | None:
    """The affine encoding that holds such values exactly, if there is one.

    Groups of other sizes are split; a scale of float32 has too many bits for exact products.
    """
    sizes = [size for size in C.GROUP_SIZES if group % size == 0]
    if bits not in C.AFFINE_BITS or dtype not in ("BF16", "F16") or width % group or not sizes:
        return None
    power_of_two = zero is not None and zero & (zero - 1) == 0
    return Encoding("affine", dtype if power_of_two else "F32", bits, max(sizes))
