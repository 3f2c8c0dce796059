"""The manifest: what a pack is made of. Canonical JSON whose own digest is the pack's identity (SPEC.md section 3)."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from flashpack.errors import FormatError, VersionError
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.dtypes import ITEMSIZE
from flashpack.formats.header import parse_json
from flashpack.formats.records import PARTS, Encoding, RecordKind

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """A file of the pack. ``digests`` by role: ``experts`` header and tail, ``dense`` header, ``copy`` file."""

    path: str
    role: str
    size: int
    digests: dict[str, str]

    ROLES = {"experts": {"header", "tail"}, "dense": {"header"}, "copy": {"file"}}  # noqa: RUF012

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.path).parts
        if (
            not parts
            or self.path != "/".join(parts)
            or any(p in ("/", "..", ".") or "\\" in p or "\0" in p for p in parts)
        ):
            raise FormatError(f"manifest: {self.path!r} is not a path inside the pack")
        if set(self.digests) != self.ROLES.get(self.role) or type(self.size) is not int or self.size < 0:
            raise FormatError(f"manifest: file {self.path}: role, size or digests are wrong")
        for value in self.digests.values():
            _check_digest(value, self.path)

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "role": self.role, "size": self.size, "digests": self.digests}


@dataclass(frozen=True)
class TensorEntry:
    """A dense tensor: bytes [offset, offset + nbytes) of a dense file."""

    name: str
    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    digest: str

    def __post_init__(self) -> None:
        numbers = (*self.shape, self.offset)
        if self.dtype not in ITEMSIZE or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise FormatError(f"manifest: tensor {self.name}: dtype, shape or offset is wrong")
        _check_digest(self.digest, self.name)

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
    def from_json(cls, t: dict[str, Any]) -> TensorEntry:
        return cls(t["name"], t["path"], t["dtype"], tuple(t["shape"]), t["offset"], t["digest"])


@dataclass(frozen=True)
class Matrix:
    """A quantized dense matrix: the logical shape [out, in] behind the tensors .weight, .scales and .biases."""

    name: str
    shape: tuple[int, int]
    encoding: Encoding

    def tensor_names(self) -> dict[str, str]:
        """Part -> tensor name: ``x.weight`` is stored as ``x.weight``, ``x.scales``, ``x.biases``."""
        stem = self.name.removesuffix(".weight")
        return {part: f"{stem}.{part}" for part in PARTS}

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "encoding": self.encoding.to_json()}


@dataclass(frozen=True)
class Layer:
    """The routed experts of one MoE layer: ``kinds`` pairs a record kind with its number of records."""

    index: int
    module: str
    path: str
    kinds: tuple[tuple[int, int], ...]

    @property
    def experts(self) -> int:
        return sum(count for _, count in self.kinds)

    def to_json(self) -> dict[str, Any]:
        kinds = [{"kind": kind, "count": count} for kind, count in self.kinds]
        return {"index": self.index, "module": self.module, "path": self.path, "kinds": kinds}

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Layer:
        return cls(d["index"], d["module"], d["path"], tuple((k["kind"], k["count"]) for k in d["kinds"]))


@dataclass(frozen=True)
class Manifest:
    """All that a reader needs to know before it opens another file."""

    model: dict[str, Any]
    recipe: dict[str, Any]
    record_kinds: tuple[RecordKind, ...]
    layers: tuple[Layer, ...]
    matrices: tuple[Matrix, ...]
    tensors: tuple[TensorEntry, ...]
    files: tuple[FileEntry, ...]
    required_features: tuple[str, ...] = ()
    optional_features: tuple[str, ...] = field(default=())

    def to_bytes(self) -> bytes:
        """Canonical bytes: sorted keys, one space of indentation, ASCII, a newline at the end."""
        data = {
            "format": C.FORMAT,
            "version": C.VERSION,
            "required_features": sorted(self.required_features),
            "optional_features": sorted(self.optional_features),
            "model": self.model,
            "recipe": self.recipe,
            "record_kinds": [k.to_json() for k in self.record_kinds],
            "layers": [layer.to_json() for layer in self.layers],
            "matrices": [m.to_json() for m in sorted(self.matrices, key=lambda m: m.name)],
            "tensors": [t.to_json() for t in sorted(self.tensors, key=lambda t: t.name)],
            "files": [f.to_json() for f in sorted(self.files, key=lambda f: f.path)],
        }
        return canonical(data)

    @property
    def identity(self) -> str:
        """The pack's identity: BLAKE3 of the manifest, 64 hexadecimal digits."""
        return hexdigest(self.to_bytes())

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """Parse and check; raises ``VersionError`` for a newer pack, ``FormatError`` for a wrong one."""
        data = parse_json(raw, C.MANIFEST)
        if not isinstance(data, dict) or data.get("format") != C.FORMAT:
            raise FormatError(f"{C.MANIFEST}: not a flashpack manifest")
        version = data.get("version")
        if type(version) is not int or version < 1:
            raise FormatError(f"{C.MANIFEST}: version {version!r} is not a format version")
        if version > C.VERSION:
            raise VersionError(
                f"the pack has format version {version}, this flashpack reads up to {C.VERSION}; update flashpack"
            )
        unknown = set(data.get("required_features", ())) - C.KNOWN_FEATURES
        if unknown:
            raise VersionError(f"the pack requires {', '.join(sorted(unknown))}; update flashpack")
        try:
            manifest = cls(
                model=data["model"],
                recipe=data["recipe"],
                record_kinds=tuple(RecordKind.from_json(k) for k in data["record_kinds"]),
                layers=tuple(Layer.from_json(d) for d in data["layers"]),
                matrices=tuple(
                    Matrix(m["name"], (m["shape"][0], m["shape"][1]), Encoding.from_json(m["encoding"]))
                    for m in data["matrices"]
                ),
                tensors=tuple(TensorEntry.from_json(t) for t in data["tensors"]),
                files=tuple(FileEntry(f["path"], f["role"], f["size"], f["digests"]) for f in data["files"]),
                required_features=tuple(data["required_features"]),
                optional_features=tuple(data.get("optional_features", ())),
            )
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as e:
            raise FormatError(f"{C.MANIFEST}: a field is missing or has the wrong type: {e!r}") from e
        manifest.validate()
        if canonical(data) != raw:
            raise FormatError(f"{C.MANIFEST}: not in canonical form")
        return manifest

    def validate(self) -> None:
        """The rules that tie the tables together; the writer calls it before the first byte, the reader on opening."""
        schema = self.model.get("name_schema")
        if schema != C.NAME_SCHEMA:
            raise VersionError(f"the pack's tensor names follow {schema!r}, unknown to this version; update flashpack")
        if not all(isinstance(self.model.get(k), str) for k in ("architecture", "model_type", "transformers")):
            raise FormatError(f"{C.MANIFEST}: model lacks architecture, model_type or transformers")
        files = {f.path: f for f in self.files}
        _unique("file", [f.path for f in self.files])
        if {C.MANIFEST, C.MANIFEST_DIGEST} & set(files):
            raise FormatError(f"{C.MANIFEST}: lists itself")
        if len(self.record_kinds) > C.MAX_KINDS or len(self.layers) > C.MAX_LAYERS:
            raise FormatError(f"{C.MANIFEST}: too many record kinds or layers")
        _unique("layer", [layer.index for layer in self.layers])
        _unique("module", [layer.module for layer in self.layers])
        for layer in self.layers:
            _check_layer(layer, len(self.record_kinds))
        expert_files = sorted(f.path for f in self.files if f.role == "experts")
        if sorted(layer.path for layer in self.layers) != expert_files:
            raise FormatError(f"{C.MANIFEST}: layers and expert files do not match one to one")
        _unique("tensor", [t.name for t in self.tensors])
        for t in self.tensors:
            if t.path not in files or files[t.path].role != "dense":
                raise FormatError(f"{C.MANIFEST}: tensor {t.name} lies in no dense file")
            if t.offset + t.nbytes > files[t.path].size:
                raise FormatError(f"{C.MANIFEST}: tensor {t.name} ends past its file")
        tensors = {t.name: t for t in self.tensors}
        _unique("matrix", [m.name for m in self.matrices])
        for m in self.matrices:
            for part, (dtype, shape) in m.encoding.parts(m.shape).items():
                stored = tensors.get(m.tensor_names()[part])
                if stored is None or (stored.dtype, stored.shape) != (dtype, shape):
                    raise FormatError(f"{C.MANIFEST}: matrix {m.name}: {part} is missing or has another shape")


def canonical(data: Any) -> bytes:
    """The one byte form of a JSON value: equal content has equal bytes and an equal digest."""
    return json.dumps(data, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def _check_layer(layer: Layer, kinds: int) -> None:
    numbers = (layer.index, *(n for pair in layer.kinds for n in pair))
    good = all(type(n) is int and n >= 0 for n in numbers) and layer.kinds
    if not good or any(kind >= kinds or count == 0 for kind, count in layer.kinds):
        raise FormatError(f"{C.MANIFEST}: layer {layer.index}: kinds are wrong")
    _unique(f"layer {layer.index}: kind", [kind for kind, _ in layer.kinds])
    if layer.experts > C.MAX_EXPERTS or layer.index >= C.MAX_LAYERS:
        raise FormatError(f"{C.MANIFEST}: layer {layer.index}: {layer.experts} experts are over the cap")


def _unique(what: str, names: list[Any]) -> None:
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise FormatError(f"{C.MANIFEST}: {what} {twice} stands twice")


def _check_digest(value: Any, what: str) -> None:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise FormatError(f"{C.MANIFEST}: {what}: digest is not 64 hexadecimal digits")
