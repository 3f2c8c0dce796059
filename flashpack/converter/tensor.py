"""A tensor of the model as a source stores it: arrays in files, how they become values, and which rows are meant.

Nothing is read until ``values`` or ``stored`` is called, so a fused tensor of gigabytes is taken apart expert by
expert and row by row.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flashpack.converter.folder import Reader
from flashpack.errors import SourceError, UnsupportedError
from flashpack.formats import constants as C
from flashpack.formats.dtypes import ITEMSIZE, NUMPY, from_float32
from flashpack.formats.encodings import decode
from flashpack.formats.records import Encoding

_RAW = (*C.RAW_DTYPES, "I32", "I64")

Arrays = dict[str, NDArray[np.generic]]
"""Stored arrays of a matrix by part, as ``NUMPY[dtype]``."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A stored array of a source file, row-major, without gaps."""

    path: str
    dtype: str
    offset: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    def take(self, start: int, count: int) -> Extent:
        """[start, start + count) of the first dimension."""
        row = self.nbytes // self.shape[0] if self.shape[0] else 0
        return replace(self, offset=self.offset + start * row, shape=(count, *self.shape[1:]))

    def at(self, index: int) -> Extent:
        """One element of the first dimension, which is dropped."""
        return replace(self.take(index, 1), shape=self.shape[1:])

    def reshape(self, *shape: int) -> Extent:
        """The same bytes seen as ``shape``."""
        return replace(self, shape=shape)

    def view(self, dtype: str, *shape: int) -> Extent:
        """The same bytes seen as another type and shape."""
        return replace(self, dtype=dtype, shape=shape)

    def read(self, folder: Reader) -> NDArray[np.generic]:
        """The stored values, as ``NUMPY[dtype]``."""
        data = np.empty(self.nbytes, dtype=np.uint8)
        folder.read_into(self.path, self.offset, data.data)
        return data.view(NUMPY[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class WeightFormat:
    """How the stored arrays of a matrix become values. One object for all matrices of the same format.

    A subclass has ``values``, or ``stored`` and an ``encoding``; arrays carry the shape. Both raise ``SourceError`` for
    stored values that make no sense, without the tensor's name, which the caller adds.
    """

    @property
    def label(self) -> str:
        """The format's name: for messages, and for the recipe in the manifest."""
        return "plain"

    @property
    def encoding(self) -> Encoding | None:
        """The encoding of the pack that holds these values exactly, if one does."""
        return None

    @property
    def verbatim(self) -> bool:
        """Whether the parts are byte for byte those of ``encoding``."""
        return False

    @property
    def rounds_to(self) -> str:
        """The least width ("q6") for values that no encoding of the pack holds; empty: any."""
        return ""

    @property
    def align(self) -> int:
        """Rows can be cut at multiples of this; 0: nowhere."""
        return 1

    def cut(self, parts: dict[str, Extent], start: int, count: int) -> dict[str, Extent]:
        """Parts of rows [start, start + count) of a matrix; ``start`` is a multiple of ``align``."""
        return {name: part.take(start, count) for name, part in parts.items()}

    def stored(self, arrays: Arrays) -> Arrays:
        """The arrays in ``encoding``."""
        return arrays

    def values(self, arrays: Arrays) -> NDArray[np.float32]:
        """The values in float32, [rows, width]."""
        encoding = self.encoding
        assert encoding is not None
        stored = self.stored(arrays)
        return decode(encoding, stored, stored_shape(encoding, stored["weight"].shape))

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Whole(WeightFormat):
    """Values that can only be had all together, such as those that are computed. A subclass has ``values``."""

    @property
    def align(self) -> int:
        return 0

    def stored(self, arrays: Arrays) -> Arrays:
        encoding = self.encoding
        assert encoding is not None
        return {"weight": from_float32(self.values(arrays), encoding.dtype)}


@dataclass(frozen=True)
class Plain(WeightFormat):
    """Values as they are, in ``dtype`` (a safetensors name)."""

    dtype: str

    @property
    def encoding(self) -> Encoding | None:
        return Encoding("raw", self.dtype) if self.dtype in _RAW else None

    @property
    def verbatim(self) -> bool:
        return True


@dataclass(frozen=True)
class Packed(WeightFormat):
    """The arrays of an encoding of the pack, byte for byte, in its types and shapes. ``name`` is the format's."""

    name: str
    exact: Encoding

    @property
    def label(self) -> str:
        return self.name

    @property
    def encoding(self) -> Encoding | None:
        return self.exact

    @property
    def verbatim(self) -> bool:
        return True

    @property
    def align(self) -> int:
        return max(1, self.exact.block[0])

    def cut(self, parts: dict[str, Extent], start: int, count: int) -> dict[str, Extent]:
        width = math.prod(parts["weight"].shape[1:])
        rows = {name: self.exact.part_rows(name, start, start + count, width) for name in parts}
        return {name: part.take(rows[name].start, rows[name].stop - rows[name].start) for name, part in parts.items()}


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the model: its shape, its stored parts and what is done with them after reading.

    ``transposed``: the stored matrices are those of ``shape`` with the last two dimensions exchanged. ``pick``: rows
    of the matrix that ``parts`` hold, where they are not all. ``add`` is added to the values: MLX stores some norm
    weights with 1 added.
    """

    name: str
    shape: tuple[int, ...]
    format: WeightFormat
    parts: dict[str, Extent]
    add: float = 0.0
    transposed: bool = False
    pick: slice | None = None

    @property
    def nbytes(self) -> int:
        """Stored bytes that are read."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def encoding(self) -> Encoding | None:
        """The encoding of the pack that holds these values exactly, if one does."""
        encoding = self.format.encoding
        if encoding is None or self.add:
            return None
        if (self.transposed and encoding.quantized) or (self.pick is not None and encoding.block[0] > 1):
            return None
        return encoding

    @property
    def block(self) -> int:
        """Rows can be read at multiples of this without reading others; 0: only all together."""
        return 0 if self.transposed or self.pick is not None else self.format.align

    @property
    def verbatim(self) -> bool:
        """Whether the parts are byte for byte those of ``encoding``."""
        return self.format.verbatim and not self.transposed and self.pick is None

    def check(self) -> None:
        """Raise ``UnsupportedError`` for a stored type whose values cannot be read."""
        if isinstance(self.format, Plain) and self.format.encoding is None:
            raise UnsupportedError(f"tensor {self.name}: stored type {self.format.dtype} is not supported")

    def expert(self, index: int) -> SourceTensor:
        """One matrix of a stack [E, rows, width]. Parts that do not have E elements are shared by all."""
        parts = {k: p.at(index) if p.shape[:1] == self.shape[:1] else p for k, p in self.parts.items()}
        return replace(self, shape=self.shape[1:], parts=parts)

    def rows(self, start: int, count: int, step: int = 1) -> SourceTensor:
        """``count`` rows from ``start``, each ``step`` behind the one before."""
        shape = (count, *self.shape[1:])
        if (start, count, step) == (0, self.shape[0], 1):
            return self
        if self.block == 0:
            chosen = range(self.shape[0]) if self.pick is None else _range(self.pick)
            chosen = chosen[start : start + (count - 1) * step + 1 : step]
            return replace(self, shape=shape, pick=slice(chosen.start, chosen.stop, chosen.step))
        first = start - start % self.block
        last = min(-(-(start + (count - 1) * step + 1) // self.block) * self.block, self.shape[0])
        parts = self.format.cut(self.parts, first, last - first)
        if (first, last, step) == (start, start + count, 1):
            return replace(self, shape=shape, parts=parts)
        begin = start - first
        return replace(self, shape=shape, parts=parts, pick=slice(begin, begin + (count - 1) * step + 1, step))

    def transpose(self) -> SourceTensor:
        """The last two dimensions exchanged."""
        assert self.pick is None
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return replace(self, shape=shape, transposed=not self.transposed)

    def flat(self) -> SourceTensor:
        """The same values as one matrix [all leading dimensions, width]."""
        if len(self.shape) == 2:
            return self
        rows_apart = self.format.encoding is None or self.format.encoding.name not in ("nvfp4", "fp8_e4m3")
        if self.transposed or not rows_apart:
            raise UnsupportedError(f"tensor {self.name}: stored as {self.format}, but no matrix; not supported")
        parts = {k: p.reshape(math.prod(p.shape[:-1]), *(p.shape[-1:] or (1,))) for k, p in self.parts.items()}
        return replace(self, shape=(math.prod(self.shape[:-1]), *(self.shape[-1:] or (1,))), parts=parts)

    def values(self, folder: Reader) -> NDArray[np.float32]:
        """The values in float32, in this shape."""
        return self.decoded(self._read(folder))

    def decoded(self, arrays: Arrays) -> NDArray[np.float32]:
        """The values of the stored ``arrays``."""
        with self._named():
            values = self.format.values(arrays)
        if self.transposed:
            values = values.T
        if self.pick is not None:
            values = values[self.pick]
        values = np.ascontiguousarray(values).reshape(self.shape)
        return values + np.float32(self.add) if self.add else values

    def stored(self, folder: Reader) -> Arrays:
        """The arrays of a matrix in ``encoding``."""
        encoding, arrays = self.format.encoding, self._read(folder)
        assert encoding is not None
        with self._named():
            stored = self.format.stored(arrays)
        if self.transposed:
            stored = {part: array.T for part, array in stored.items()}
        if self.pick is not None:
            # What all rows share has one row for whichever of them.
            own = {part for part in stored if encoding.part_rows(part, 1, 2, self.shape[-1]).start == 1}
            stored = {part: array[self.pick] if part in own else array for part, array in stored.items()}
        return stored

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except SourceError as e:
            raise type(e)(f"tensor {self.name}: {e}") from e

    def _read(self, folder: Reader) -> Arrays:
        return {part: extent.read(folder) for part, extent in self.parts.items()}


def plain_tensor(name: str, extent: Extent) -> SourceTensor:
    """An unquantized tensor."""
    return SourceTensor(name, extent.shape, _plain(extent.dtype), {"weight": extent})


_plain = functools.cache(Plain)


def stored_shape(encoding: Encoding, weight: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor whose stored ``weight`` has this shape."""
    if encoding.name in ("raw", "fp8_e4m3"):
        return weight
    return (*weight[:-1], weight[-1] * 32 // encoding.bits)


def _range(pick: slice) -> range:
    return range(pick.start, pick.stop, pick.step or 1)
