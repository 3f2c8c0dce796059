"""The header of a GGUF file: metadata, and which tensors lie where.

Read by position through a ``SourceFolder``, like every other source, so that a file on a server needs no copy. The
gguf package's own reader maps a local file, and follows the lengths that a damaged one claims.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashpack.converter.folder import SourceFolder
from flashpack.errors import SourceError, UnsupportedError
from flashpack.formats.checksums import hexdigest

TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
}  # fmt: skip
"""ggml's number of a type -> its name, values per block, bytes per block."""

MAX_HEADER = 2**28
"""Bytes; real headers, vocabulary included, have about 20 MB."""

_SCALARS = {
    0: ("<B", "u1"), 1: ("<b", "i1"), 2: ("<H", "<u2"), 3: ("<h", "<i2"), 4: ("<I", "<u4"), 5: ("<i", "<i4"),
    6: ("<f", "<f4"), 7: ("<?", "?"), 10: ("<Q", "<u8"), 11: ("<q", "<i8"), 12: ("<d", "<f8"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_FIRST_READ = 2**20


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A stored tensor: ``shape`` in the order of torch, ``type`` a name of ``TYPES``, ``offset`` from the start of the
    file, ``nbytes`` stored bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        """The shape of the stored bytes: the last dimension holds those of a row."""
        return (*self.shape[:-1], self.nbytes // math.prod(self.shape[:-1]))


@dataclass(frozen=True)
class GgufHeader:
    """``digest``: BLAKE3 of the bytes of the header, hexadecimal."""

    metadata: dict[str, Any]
    tensors: list[GgufTensor]
    digest: str


def read_gguf(folder: SourceFolder, file: str, size: int) -> GgufHeader:
    """The header of a file of ``size`` bytes, whose tensors all lie within it.

    Raises ``SourceError`` for a damaged or cut-off file, ``UnsupportedError`` for a kind of file that is not read.
    """
    cursor = _Cursor(folder, file, size)
    if cursor.take(4) != b"GGUF":
        raise SourceError(f"{cursor.where}: not a GGUF file; its first bytes are not GGUF")
    version = cursor.number("<I")
    if version & 0xFFFF == 0:
        raise UnsupportedError(f"{cursor.where}: a big-endian GGUF file; get the little-endian one")
    if version not in (2, 3):
        raise UnsupportedError(f"{cursor.where}: GGUF version {version} is not supported; versions 2 and 3 are")
    tensor_count, field_count = cursor.number("<Q"), cursor.number("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count(field_count, 13)):
        key = cursor.text()
        if key in metadata:
            raise SourceError(f"{cursor.where}: damaged: {key[:99]!r} is there twice")
        metadata[key] = cursor.value(cursor.number("<I"))
    found = [_Info.read(cursor) for _ in range(cursor.count(tensor_count, 24))]
    digest = hexdigest(bytes(cursor.data[: cursor.position]))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise SourceError(f"{cursor.where}: damaged: general.alignment {alignment!r} is no power of two")
    start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for info in found:
        if info.name in tensors:
            raise SourceError(f"{cursor.where}: damaged: tensor {info.name[:99]!r} is there twice")
        if info.offset % alignment:
            raise SourceError(
                f"{cursor.where}: damaged: tensor {info.name[:99]!r} starts at no multiple of {alignment}"
            )
        tensors[info.name] = tensor = info.tensor(cursor.where, start)
        if tensor.offset + tensor.nbytes > size:
            raise SourceError(
                f"{cursor.where}: has {size} bytes, but tensor {info.name[:99]!r} ends at "
                f"{tensor.offset + tensor.nbytes}; the file is cut off: download it again"
            )
    return GgufHeader(metadata, list(tensors.values()), digest)


@dataclass(frozen=True, slots=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @classmethod
    def read(cls, cursor: _Cursor) -> _Info:
        name = cursor.text()
        dimensions = cursor.number("<I")
        if not 1 <= dimensions <= 4:
            raise SourceError(f"{cursor.where}: damaged: tensor {name[:99]!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
        return cls(name, shape, cursor.number("<I"), cursor.number("<Q"))

    def tensor(self, where: str, start: int) -> GgufTensor:
        if self.type not in TYPES:
            raise UnsupportedError(f"{where}: tensor {self.name[:99]!r} has ggml type {self.type}, which is not known")
        kind, block, size = TYPES[self.type]
        values = math.prod(self.shape)
        if not 0 < values < 2**60 or self.shape[-1] % block:
            raise SourceError(
                f"{where}: damaged: tensor {self.name[:99]!r} of shape {list(self.shape)} does not consist of blocks "
                f"of {block} values, as {kind} does"
            )
        return GgufTensor(self.name, self.shape, kind, start + self.offset, values // block * size)


class _Cursor:
    """Reads a file from its start, a growing piece of which is held."""

    def __init__(self, folder: SourceFolder, file: str, size: int) -> None:
        self.folder, self.file, self.size = folder, file, size
        self.where = folder.where(file)
        self.data = bytearray()
        self.position = 0

    def _hold(self, end: int) -> None:
        if end > self.size:
            raise SourceError(f"{self.where}: ends in the middle of its header; the file is cut off or damaged")
        if end > MAX_HEADER:
            raise SourceError(f"{self.where}: damaged: its header claims more than {MAX_HEADER >> 20} MiB")
        have = len(self.data)
        if end > have:
            piece = bytearray(min(max(end, 2 * have, _FIRST_READ), self.size) - have)
            self.folder.read_into(self.file, have, memoryview(piece))
            self.data += piece

    def take(self, count: int) -> bytes:
        end = self.position + count
        self._hold(end)
        found = bytes(self.data[self.position : end])
        self.position = end
        return found

    def number(self, layout: str) -> Any:
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        return value

    def count(self, number: int, least: int) -> int:
        """``number``, if the file has room for as many things of at least ``least`` bytes."""
        if number * least > min(self.size, MAX_HEADER) - self.position:
            raise SourceError(f"{self.where}: damaged: counts {number} entries, for which it is too short")
        return number

    def text(self) -> str:
        length = self.number("<Q")
        try:
            return self.take(self.count(length, 1)).decode()
        except UnicodeDecodeError as e:
            raise SourceError(f"{self.where}: damaged: a text before byte {self.position} is not UTF-8") from e

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind][0])
        if kind != _ARRAY:
            raise SourceError(f"{self.where}: damaged: a value of type {kind} before byte {self.position}")
        inner, length = self.number("<I"), self.number("<Q")
        if inner == _STRING:
            return [self.text() for _ in range(self.count(length, 8))]
        if inner not in _SCALARS:
            raise UnsupportedError(f"{self.where}: an array of values of type {inner} is not supported")
        dtype = np.dtype(_SCALARS[inner][1])
        return np.frombuffer(self.take(self.count(length, dtype.itemsize) * dtype.itemsize), dtype).tolist()
