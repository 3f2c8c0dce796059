"""Encodings of matrices, and the layout of an expert record (SPEC.md sections 5 and 6)."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flashpack.errors import FormatError, VersionError
from flashpack.formats import constants as C
from flashpack.formats import fields
from flashpack.formats.dtypes import ITEMSIZE

PROJECTIONS = ("gate", "up", "down")
"""Roles of an expert's matrices, in record order; experts without a gate have ``up`` and ``down`` only."""

PARTS = ("weight", "scales", "biases")
"""Stored arrays of an encoded matrix; raw matrices have ``weight`` only."""


def align(value: int, alignment: int) -> int:
    """``value`` rounded up to a multiple of ``alignment``."""
    return -(-value // alignment) * alignment


@dataclass(frozen=True)
class Encoding:
    """How the values of a matrix are stored.

    ``raw``: ``dtype`` is the type of the values. ``affine``: integers of ``bits`` bits in groups of
    ``group_size`` along the input dimension; ``dtype`` is the type of scales and biases.
    """

    name: str
    dtype: str
    bits: int = 0
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.name == "raw":
            good = self.dtype in C.RAW_DTYPES and self.bits == 0 and self.group_size == 0
        elif self.name == "affine":
            good = self.dtype in C.SCALE_DTYPES and self.bits in C.AFFINE_BITS and self.group_size in C.GROUP_SIZES
        else:
            raise VersionError(f"encoding {self.name!r} is unknown")
        if not good:
            raise FormatError(f"encoding {self!r} has a parameter out of range")

    @property
    def quantized(self) -> bool:
        return self.name != "raw"

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored arrays of a matrix [..., I] of this ``shape``: part -> (dtype, shape)."""
        if not self.quantized:
            return {"weight": (self.dtype, shape)}
        *lead, width = shape
        if width % self.group_size:
            raise FormatError(f"{self}: {width} input values are not a multiple of {self.group_size}")
        groups = (*lead, width // self.group_size)
        words = (*lead, width * self.bits // 32)
        return {"weight": ("U32", words), "scales": (self.dtype, groups), "biases": (self.dtype, groups)}

    def bits_per_weight(self) -> float:
        """Stored bits per value, scales and biases included."""
        if not self.quantized:
            return 8.0 * ITEMSIZE[self.dtype]
        return self.bits + 2 * 8 * ITEMSIZE[self.dtype] / self.group_size

    def to_json(self) -> dict[str, Any]:
        if not self.quantized:
            return {"name": self.name, "dtype": self.dtype}
        return {
            "name": self.name,
            "bits": self.bits,
            "group_size": self.group_size,
            "scale_dtype": self.dtype,
        }

    @classmethod
    def from_json(cls, data: Any) -> Encoding:
        data = fields.mapping(data, "an encoding")
        name = fields.text(data, "name")
        if name == "affine":
            bits, group_size = fields.integer(data, "bits"), fields.integer(data, "group_size")
            return cls(name, fields.text(data, "scale_dtype"), bits, group_size)
        return cls(name, fields.text(data, "dtype") if name == "raw" else "")

    def __str__(self) -> str:
        return f"{self.bits}-bit g{self.group_size}" if self.quantized else self.dtype.lower()


@dataclass(frozen=True)
class Section:
    """One stored array inside a record: bytes [offset, offset + nbytes)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Projection:
    """One matrix of an expert: [out features, in features] and its encoding."""

    name: str
    shape: tuple[int, int]
    encoding: Encoding


@dataclass(frozen=True)
class RecordKind:
    """The layout that all records of one kind share."""

    projections: tuple[Projection, ...]

    def __post_init__(self) -> None:
        names = tuple(p.name for p in self.projections)
        if names not in (PROJECTIONS, PROJECTIONS[1:]):
            raise FormatError(f"a record holds gate, up, down or up, down; not {', '.join(names[:4])}")

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """Sections in record order: first those of gate and up, part by part, then those of down.

        Equal encodings of gate and up thus lie side by side and can be used as one matrix.
        """
        first = [p for p in self.projections if p.name != "down"]
        down = [p for p in self.projections if p.name == "down"]
        sections = []
        offset = 0
        for projections in (first, down):
            for part in PARTS:
                for p in projections:
                    arrays = p.encoding.parts(p.shape)
                    if part in arrays:
                        dtype, shape = arrays[part]
                        sections.append(Section(f"{p.name}.{part}", dtype, shape, offset))
                        offset = align(offset + sections[-1].nbytes, C.SECTION_ALIGNMENT)
        return tuple(sections)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a record without the padding at its end."""
        return self.sections[-1].offset + self.sections[-1].nbytes

    @cached_property
    def stride(self) -> int:
        """Bytes from one record to the next: a multiple of 16 KiB."""
        return align(self.nbytes, C.PAGE)

    @property
    def weights(self) -> int:
        """Number of values in a record's matrices."""
        return sum(math.prod(p.shape) for p in self.projections)

    def to_json(self) -> dict[str, Any]:
        return {
            "projections": [
                {"name": p.name, "shape": list(p.shape), "encoding": p.encoding.to_json()} for p in self.projections
            ],
            "sections": [
                {"name": s.name, "dtype": s.dtype, "shape": list(s.shape), "offset": s.offset} for s in self.sections
            ],
            "nbytes": self.nbytes,
            "stride": self.stride,
        }

    @classmethod
    def from_json(cls, data: Any) -> RecordKind:
        data = fields.mapping(data, "an entry of record_kinds")
        rows = [fields.mapping(p, "an entry of projections") for p in fields.items(data, "projections")]
        kind = cls(
            tuple(
                Projection(fields.text(p, "name"), fields.matrix_shape(p), Encoding.from_json(p.get("encoding")))
                for p in rows
            )
        )
        if kind.stride > C.MAX_RECORD_BYTES:
            raise FormatError(f"record kind: stride {kind.stride} is over the cap {C.MAX_RECORD_BYTES}")
        known = kind.to_json()
        rows = [fields.mapping(row, "an entry of sections") for row in fields.items(data, "sections")]
        given = {
            "sections": [{field: row.get(field) for field in ("name", "dtype", "shape", "offset")} for row in rows],
            "nbytes": data.get("nbytes"),
            "stride": data.get("stride"),
        }
        for key, value in given.items():
            # As JSON, in which true is not 1.
            if json.dumps(value, sort_keys=True) != json.dumps(known[key], sort_keys=True):
                raise FormatError(f"record kind: {key} do not follow from the projections")
        return kind
