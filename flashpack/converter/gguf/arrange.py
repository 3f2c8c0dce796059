"""Undoing what llama.cpp's converter does to the order of rows and columns.

Whole groups of a block format move along, so quantized values keep their bits. A matrix is read in pieces; only
small tensors are read at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from flashpack.converter.tensor import Arrays, Extent, SourceTensor, WeightFormat, Whole
from flashpack.formats.records import Encoding


@dataclass(frozen=True)
class _Wrapped(WeightFormat):
    """The format of rows or columns that are stored in another order."""

    inner: WeightFormat

    @property
    def label(self) -> str:
        return self.inner.label

    @property
    def encoding(self) -> Encoding | None:
        return self.inner.encoding

    @property
    def rounds_to(self) -> str:
        return self.inner.rounds_to

    def _joined(self, arrays: Arrays) -> Arrays:
        """The arrays that ``inner`` understands."""
        return arrays

    def _order(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        """The array in the model's order."""
        return array

    def stored(self, arrays: Arrays) -> Arrays:
        return {part: self._order(array) for part, array in self.inner.stored(self._joined(arrays)).items()}

    def values(self, arrays: Arrays) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self._order(self.inner.values(self._joined(arrays)))  # type: ignore[assignment]
        return values


@dataclass(frozen=True)
class Halved(_Wrapped):
    """Rows of a head of ``head`` rows: the first half of the model's rows is stored on even places, the other on odd
    ones."""

    head: int

    @property
    def align(self) -> int:
        return self.head

    def _order(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        return array.reshape(-1, self.head // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


@dataclass(frozen=True)
class Pieces(_Wrapped):
    """Parts are pieces of ``size`` rows each, in the model's order."""

    size: int

    @property
    def align(self) -> int:
        return self.size

    def cut(self, parts: dict[str, Extent], start: int, count: int) -> dict[str, Extent]:
        return dict(islice(parts.items(), start // self.size, -(-(start + count) // self.size)))

    def _joined(self, arrays: Arrays) -> Arrays:
        return {"weight": np.concatenate(list(arrays.values()))}


@dataclass(frozen=True)
class Columns(_Wrapped):
    """Columns in pieces of equal width: the model's i-th piece is stored in place ``order[i]``; ``width`` columns in
    all."""

    order: tuple[int, ...]
    width: int

    @property
    def encoding(self) -> Encoding | None:
        encoding = self.inner.encoding
        piece = self.width // len(self.order)
        whole = encoding is not None and piece % (encoding.group_size or 1) == 0
        return encoding if whole else None

    def _order(self, array: NDArray[np.generic]) -> NDArray[np.generic]:
        return array.reshape(len(array), len(self.order), -1)[:, list(self.order)].reshape(array.shape)


@dataclass(frozen=True, eq=False)
class Applied(Whole):
    """``apply`` of all values of ``source``, which are read at once. ``moves``: it changes no value, only places."""

    source: SourceTensor
    apply: Callable[[NDArray[np.float32]], NDArray[np.float32]] = field(repr=False)
    moves: bool

    @property
    def label(self) -> str:
        return self.source.format.label

    @property
    def encoding(self) -> Encoding | None:
        encoding = self.source.encoding
        return encoding if self.moves and encoding is not None and not encoding.quantized else None

    def values(self, arrays: Arrays) -> NDArray[np.float32]:
        own = {part: arrays[part].reshape(extent.shape) for part, extent in self.source.parts.items()}
        values = self.apply(self.source.decoded(own))
        return np.ascontiguousarray(values).reshape(-1, values.shape[-1])


def in_pieces(tensor: SourceTensor, order: list[int]) -> SourceTensor:
    """Rows in ``len(order)`` pieces of equal size: the model's i-th piece is stored in place ``order[i]``."""
    size = tensor.shape[0] // len(order)
    (stored,) = tensor.parts.values()
    parts = {str(i): stored.take(place * size, size) for i, place in enumerate(order)}
    return replace(tensor, format=Pieces(tensor.format, size), parts=parts)


def columns(tensor: SourceTensor, order: list[int]) -> SourceTensor:
    """Columns in pieces, as ``in_pieces`` has rows."""
    return replace(tensor, format=Columns(tensor.format, tuple(order), tensor.shape[-1]))


def halved(tensor: SourceTensor, heads: int) -> SourceTensor:
    """Rows of ``heads`` heads, whose rotated pairs are stored side by side."""
    return replace(tensor, format=Halved(tensor.format, tensor.shape[0] // heads))


def computed(
    tensor: SourceTensor,
    shape: tuple[int, ...],
    apply: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    moves: bool = True,
) -> SourceTensor:
    """The tensor of ``shape`` that ``apply`` makes of the values; see ``Applied``."""
    return SourceTensor(tensor.name, shape, Applied(tensor, apply, moves), tensor.parts)


def reshaped(tensor: SourceTensor, *shape: int) -> SourceTensor:
    """The same values in another shape, with the same rows of a block format."""
    parts = {}
    for part, extent in tensor.parts.items():
        rows = math.prod(shape[:-1])
        parts[part] = extent.reshape(*shape[:-1], math.prod(extent.shape) // rows)
    return replace(tensor, shape=shape, parts=parts)


def grouped_from_tiled(groups: int, each: int) -> list[int]:
    """Where the i-th of ``groups * each`` heads is stored, if those of all groups alternate."""
    return [member * groups + group for group in range(groups) for member in range(each)]
