"""The rows of the manifest's tables: files, dense tensors, quantized matrices, layers (SPEC.md sections 3, 5 and 7)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flashpack.errors import FormatError, VersionError
from flashpack.formats import constants as C
from flashpack.formats import fields
from flashpack.formats.dtypes import ITEMSIZE
from flashpack.formats.records import Encoding

ROLES = {"experts": {"header", "tail"}, "dense": {"header"}, "copy": {"file"}}
"""Role of a file -> the digests its entry has."""


@dataclass(frozen=True)
class FileEntry:
    """A file of the pack. ``digests`` by role: ``experts`` header and tail, ``dense`` header, ``copy`` file."""

    path: str
    role: str
    size: int
    digests: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "role": self.role, "size": self.size, "digests": self.digests}

    @classmethod
    def from_json(cls, d: Any) -> FileEntry:
        d = fields.mapping(d, "an entry of files")
        path, role = fields.path(d, "path"), fields.text(d, "role")
        if role not in ROLES:
            raise FormatError(f"{C.MANIFEST}: file {path}: role {role!r} is unknown")
        digests = fields.mapping(d.get("digests"), f"digests of {path}")
        if set(digests) != ROLES[role]:
            raise FormatError(f"{C.MANIFEST}: file {path}: a file of role {role} has digests {sorted(ROLES[role])}")
        return cls(path, role, fields.integer(d, "size"), {k: fields.digest(digests, k) for k in digests})


@dataclass(frozen=True)
class TensorEntry:
    """A dense tensor: bytes [offset, offset + nbytes) of a dense file."""

    name: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    digest: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": self.path,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "offset": self.offset,
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, d: Any) -> TensorEntry:
        d = fields.mapping(d, "an entry of tensors")
        name, dtype = fields.text(d, "name"), fields.text(d, "dtype")
        if dtype not in C.TENSOR_DTYPES:
            raise FormatError(f"{C.MANIFEST}: tensor {name}: type {dtype!r} is not one of {', '.join(C.TENSOR_DTYPES)}")
        return cls(
            name,
            fields.path(d, "path"),
            dtype,
            fields.shape(d),
            fields.integer(d, "offset"),
            fields.digest(d, "digest"),
        )


@dataclass(frozen=True)
class Matrix:
    """A quantized dense matrix: the logical shape [out, in] behind the tensors of its parts."""

    name: str
    shape: tuple[int, int]
    encoding: Encoding

    def tensor_names(self) -> dict[str, str]:
        """Part -> tensor name: ``x.weight`` is stored as ``x.weight``, ``x.scales`` and what else there is."""
        stem = self.name.removesuffix(".weight")
        return {part: f"{stem}.{part}" for part in self.encoding.part_names}

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "encoding": self.encoding.to_json()}

    @classmethod
    def from_json(cls, d: Any) -> Matrix:
        d = fields.mapping(d, "an entry of matrices")
        matrix = cls(fields.text(d, "name"), fields.matrix_shape(d), Encoding.from_json(d.get("encoding")))
        if not matrix.name.endswith(".weight") or not matrix.encoding.quantized:
            raise FormatError(f"{C.MANIFEST}: matrix {matrix.name}: not a quantized .weight")
        return matrix


@dataclass(frozen=True)
class Layer:
    """The routed experts of one MoE layer: ``kinds`` pairs a record kind with its number of records."""

    index: int
    module: str
    path: str
    kinds: tuple[tuple[int, int], ...]
    codec: str = "raw"

    @property
    def experts(self) -> int:
        return sum(count for _, count in self.kinds)

    @property
    def mixed(self) -> bool:
        """Whether experts differ in their record kind, so that the shard has an expert table."""
        return len(self.kinds) > 1

    def to_json(self) -> dict[str, Any]:
        kinds = [{"kind": kind, "count": count} for kind, count in self.kinds]
        row = {"index": self.index, "module": self.module, "path": self.path, "kinds": kinds}
        return row if self.codec == "raw" else row | {"codec": self.codec}

    @classmethod
    def from_json(cls, d: Any) -> Layer:
        d = fields.mapping(d, "an entry of layers")
        codec = fields.text(d, "codec") if "codec" in d else "raw"
        if codec not in C.CODECS:
            raise VersionError(f"codec {codec!r} is unknown")
        index = fields.integer(d, "index")
        pairs = [fields.mapping(k, "an entry of kinds") for k in fields.items(d, "kinds")]
        kinds = tuple((fields.integer(k, "kind"), fields.integer(k, "count")) for k in pairs)
        layer = cls(index, fields.text(d, "module"), fields.path(d, "path"), kinds, codec)
        if not kinds or any(count == 0 for _, count in kinds) or len(dict(kinds)) != len(kinds):
            raise FormatError(f"{C.MANIFEST}: layer {index}: kinds are empty or stand twice")
        if layer.experts > C.MAX_EXPERTS or index >= C.MAX_LAYERS:
            raise FormatError(f"{C.MANIFEST}: layer {index}: {layer.experts} experts or its index are over the cap")
        return layer
