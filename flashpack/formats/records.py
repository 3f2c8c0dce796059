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

PARTS = ("weight", "scales", "biases", "blocks", "global")
"""Stored arrays of encoded matrices, in the order of a record; raw matrices have ``weight`` only."""


def align(value: int, alignment: int) -> int:
    """``value`` rounded up to a multiple of ``alignment``."""
    return -(-value // alignment) * alignment


@dataclass(frozen=True)
class Encoding:
    """How the values of a matrix are stored (SPEC.md section 6).

    ``raw``: ``dtype`` is the type of the values; integers are for plain dense tensors only. ``affine``: integers of
    ``bits`` bits in groups of ``group_size`` along the input dimension; ``dtype`` is the type of scales and biases.
    ``MXFP4``, ``nvfp4()``, ``fp8()`` and ``affine_dq()`` make the others.
    """

    name: str
    dtype: str
    bits: int = 0
    group_size: int = 0
    block: tuple[int, int] = (0, 0)
    global_scale: str = ""

    def __post_init__(self) -> None:
        numbers = (self.dtype, self.bits, self.group_size)
        match self.name:
            case "raw":
                good = self.dtype in C.TENSOR_DTYPES and numbers[1:] == (0, 0)
            case "affine":
                good = self.dtype in C.SCALE_DTYPES and self.bits in C.AFFINE_BITS and self.group_size in C.GROUP_SIZES
            case "affine_dq":
                good = self.dtype == C.DQ_DTYPE and self.bits in C.DQ_BITS and self.group_size == C.DQ_GROUP
            case "mxfp4":
                good = numbers == ("E8M0", 4, C.MXFP4_GROUP)
            case "nvfp4":
                good = numbers == ("E4M3", 4, C.NVFP4_GROUP) and self.global_scale in C.GLOBAL_SCALES
            case "fp8_e4m3":
                good = self.dtype in C.FP8_SCALE_DTYPES and numbers[1:] == (8, 0)
                good = good and len(self.block) == 2 and all(0 <= n <= C.MAX_BLOCK for n in self.block)
            case _:
                raise VersionError(f"encoding {self.name!r} is unknown")
        others = (self.block == (0, 0) or self.name == "fp8_e4m3") and (not self.global_scale or self.name == "nvfp4")
        if not good or not others:
            raise FormatError(f"encoding {self!r} has a parameter out of range")

    @property
    def quantized(self) -> bool:
        return self.name != "raw"

    @property
    def part_names(self) -> tuple[str, ...]:
        """The stored arrays of a matrix, in the order of ``PARTS``."""
        if self.name == "raw":
            return PARTS[:1]
        if self.name == "affine":
            return PARTS[:3]
        if self.name == "affine_dq":
            return ("weight", "scales", "blocks")
        return ("weight", "scales", "global") if self.global_scale in ("multiply", "divide") else PARTS[:2]

    def parts(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored arrays of a matrix [..., out, in] of this ``shape``: part -> (dtype, shape)."""
        if not self.quantized:
            return {"weight": (self.dtype, shape)}
        *lead, width = shape
        if self.name == "fp8_e4m3":
            if not lead:
                raise FormatError(f"{self}: shape {list(shape)} is not that of a matrix")
            blocks = [-(-size // (step or size)) for size, step in zip(shape[-2:], self.block, strict=True)]
            scales = "U8" if self.dtype == "E8M0" else self.dtype
            return {"weight": ("U8", shape), "scales": (scales, (*lead[:-1], *blocks))}
        if width % self.group_size:
            raise FormatError(f"{self}: {width} input values are not a multiple of {self.group_size}")
        groups = (*lead, width // self.group_size)
        found = {"weight": ("U32", (*lead, width * self.bits // 32))}
        if self.name == "affine":
            return found | {"scales": (self.dtype, groups), "biases": (self.dtype, groups)}
        found["scales"] = ("U8", groups)
        if self.name == "affine_dq":
            if not lead or lead[-1] * width % C.DQ_BLOCK:
                raise FormatError(f"{self}: the values of a matrix {list(shape)} are not in blocks of {C.DQ_BLOCK}")
            return found | {"blocks": (self.dtype, (*lead[:-1], lead[-1] * width // C.DQ_BLOCK, 3))}
        return found | {"global": ("F32", (*lead[:-1], 1))} if "global" in self.part_names else found

    def part_rows(self, part: str, start: int, stop: int, width: int) -> slice:
        """Rows of a stored part that rows [start, stop) of a matrix of ``width`` input values need.

        Where rows share scales, row ``start`` may be in the middle of a block: see ``first_in_block``.
        """
        if part == "global":
            return slice(0, 1)
        if part == "scales" and self.name == "fp8_e4m3":
            rows = self.block[0]
            return slice(start // rows, -(-stop // rows)) if rows else slice(0, 1)
        if part == "blocks":
            return slice(start * width // C.DQ_BLOCK, -(-stop * width // C.DQ_BLOCK))
        return slice(start, stop)

    def first_in_block(self, start: int, width: int) -> int:
        """Where in its block of shared scales row ``start`` begins: as a number of rows for ``fp8_e4m3``, of groups
        for ``affine_dq``; 0 for others."""
        if self.name == "affine_dq":
            return start * width % C.DQ_BLOCK // C.DQ_GROUP
        return start % self.block[0] if self.block[0] else 0

    def whole_rows(self, width: int) -> int:
        """Rows that hold whole blocks of shared scales: a matrix can be cut at every multiple of this; 0: nowhere."""
        if self.name == "affine_dq":
            return C.DQ_BLOCK // math.gcd(width, C.DQ_BLOCK)
        return self.block[0] if self.name == "fp8_e4m3" else 1

    def stackable(self, rows: int) -> bool:
        """Whether two matrices of ``rows`` rows, each part of one right before the other's, are one matrix."""
        if self.name == "fp8_e4m3":
            return self.block[0] > 0 and rows % self.block[0] == 0
        return "global" not in self.part_names

    def bits_per_weight(self) -> float:
        """Stored bits per value, scales and biases included, but for scales of whole rows, columns or matrices."""
        if not self.quantized:
            return 8.0 * ITEMSIZE[self.dtype]
        scale = 8 * ITEMSIZE.get(self.dtype, 1)
        if self.name == "affine_dq":
            return self.bits + 8 / self.group_size + 3 * scale / C.DQ_BLOCK
        if self.name == "fp8_e4m3":
            return 8 + (scale / math.prod(self.block) if all(self.block) else 0)
        return self.bits + (2 if self.name == "affine" else 1) * scale / self.group_size

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"name": self.name}
        if self.name == "raw":
            data["dtype"] = self.dtype
        elif self.name in ("affine", "affine_dq"):
            data |= {"bits": self.bits, "group_size": self.group_size, "scale_dtype": self.dtype}
        elif self.name == "nvfp4":
            data["global_scale"] = self.global_scale
        elif self.name == "fp8_e4m3":
            data |= {"block": list(self.block), "scale_dtype": self.dtype}
        return data

    @classmethod
    def from_json(cls, data: Any) -> Encoding:
        data = fields.mapping(data, "an encoding")
        name = fields.text(data, "name")
        match name:
            case "raw":
                return cls(name, fields.text(data, "dtype"))
            case "affine" | "affine_dq":
                bits, group_size = fields.integer(data, "bits"), fields.integer(data, "group_size")
                return cls(name, fields.text(data, "scale_dtype"), bits, group_size)
            case "mxfp4":
                return MXFP4
            case "nvfp4":
                return nvfp4(fields.text(data, "global_scale"))
            case "fp8_e4m3":
                return fp8(fields.text(data, "scale_dtype"), fields.pair(data, "block"))
        return cls(name, "")

    def __str__(self) -> str:
        if self.name == "affine":
            return f"{self.bits}-bit g{self.group_size}"
        if self.name == "affine_dq":
            return f"{self.bits}-bit dq"
        if self.name == "fp8_e4m3":
            return f"fp8 {self.block[0]}x{self.block[1]} {self.dtype.lower()}"
        return self.name if self.quantized else self.dtype.lower()


MXFP4 = Encoding("mxfp4", "E8M0", 4, C.MXFP4_GROUP)
"""4-bit floats in groups of 32 with a power of two each."""


def nvfp4(global_scale: str) -> Encoding:
    """4-bit floats in groups of 16 with an 8-bit float each; one of ``GLOBAL_SCALES`` for the matrix."""
    return Encoding("nvfp4", "E4M3", 4, C.NVFP4_GROUP, global_scale=global_scale)


def fp8(scale_dtype: str, block: tuple[int, int]) -> Encoding:
    """8-bit floats; one scale per ``block`` of rows and columns, 0 for all of them."""
    return Encoding("fp8_e4m3", scale_dtype, 8, block=block)


def affine_dq(bits: int) -> Encoding:
    """Integers of ``bits`` bits in groups of 32 whose scales and biases are integers of 4 bits themselves."""
    return Encoding("affine_dq", C.DQ_DTYPE, bits, C.DQ_GROUP)


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
    """One matrix of an expert: [out features, in features] and its encoding; the type of its bias [out], if any."""

    name: str
    shape: tuple[int, int]
    encoding: Encoding
    bias: str = ""

    def to_json(self) -> dict[str, Any]:
        row = {"name": self.name, "shape": list(self.shape), "encoding": self.encoding.to_json()}
        return row | {"bias": self.bias} if self.bias else row

    @classmethod
    def from_json(cls, data: Any) -> Projection:
        data = fields.mapping(data, "an entry of projections")
        bias = fields.text(data, "bias") if "bias" in data else ""
        encoding = Encoding.from_json(data.get("encoding"))
        return cls(fields.text(data, "name"), fields.matrix_shape(data), encoding, bias)


@dataclass(frozen=True)
class RecordKind:
    """The layout that all records of one kind share."""

    projections: tuple[Projection, ...]

    def __post_init__(self) -> None:
        names = tuple(p.name for p in self.projections)
        if names not in (PROJECTIONS, PROJECTIONS[1:]):
            raise FormatError(f"a record holds gate, up, down or up, down; not {', '.join(names[:4])}")
        for p in self.projections:
            if not p.encoding.quantized and p.encoding.dtype not in C.RAW_DTYPES:
                raise FormatError(f"encoding {p.encoding!r} has a parameter out of range")
            if p.bias not in ("", *C.BIAS_DTYPES):
                raise FormatError(f"the bias of {p.name} is of type {p.bias}, not {', '.join(C.BIAS_DTYPES)}")

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """Sections in record order: first those of gate and up, part by part, then those of down, then the biases.

        Equal encodings of gate and up thus lie side by side and can be used as one matrix.
        """
        first = [p for p in self.projections if p.name != "down"]
        down = [p for p in self.projections if p.name == "down"]
        arrays = [
            (f"{p.name}.{part}", *p.encoding.parts(p.shape)[part])
            for projections in (first, down)
            for part in PARTS
            for p in projections
            if part in p.encoding.part_names
        ]
        arrays += [(f"{p.name}.bias", p.bias, p.shape[:1]) for p in self.projections if p.bias]
        sections = []
        offset = 0
        for name, dtype, shape in arrays:
            sections.append(Section(name, dtype, shape, offset))
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
            "projections": [p.to_json() for p in self.projections],
            "sections": [
                {"name": s.name, "dtype": s.dtype, "shape": list(s.shape), "offset": s.offset} for s in self.sections
            ],
            "nbytes": self.nbytes,
            "stride": self.stride,
        }

    @classmethod
    def from_json(cls, data: Any) -> RecordKind:
        data = fields.mapping(data, "an entry of record_kinds")
        kind = cls(tuple(Projection.from_json(p) for p in fields.items(data, "projections")))
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
