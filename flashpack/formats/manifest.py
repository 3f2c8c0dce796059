"""The manifest: what a pack is made of. Canonical JSON whose own digest is the pack's identity (SPEC.md section 3)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

from flashpack.errors import FormatError, VersionError
from flashpack.formats import constants as C
from flashpack.formats import fields
from flashpack.formats.checksums import hexdigest
from flashpack.formats.entries import FileEntry, Layer, Matrix, TensorEntry
from flashpack.formats.header import Header, parse_json
from flashpack.formats.layout import ShardLayout, dense_layout
from flashpack.formats.records import RecordKind
from flashpack.version import __version__

_MODEL = ("architecture", "model_type", "name_schema", "transformers")


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
    optional_features: tuple[str, ...] = ()

    @property
    def required_features(self) -> list[str]:
        """What a reader must understand beyond the first version of the format, sorted."""
        projections = [p for kind in self.record_kinds for p in kind.projections]
        used = {layer.codec for layer in self.layers}
        used |= {p.encoding.name for p in projections} | {m.encoding.name for m in self.matrices}
        if any(p.bias for p in projections):
            used.add("expert_bias")
        if any(t.dtype in ("I32", "I64") for t in self.tensors):
            used.add("int_tensors")
        return sorted(used & C.FEATURES.keys())

    def to_bytes(self) -> bytes:
        """Canonical bytes: sorted keys, one space of indentation, ASCII, a newline at the end."""
        readers = [C.FIRST_READER, *(C.FEATURES[f] for f in self.required_features)]
        data = {
            "format": C.FORMAT,
            "version": C.VERSION,
            "min_reader": max(readers, key=lambda v: [int(n) for n in v.split(".")]),
            "required_features": self.required_features,
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

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """Parse and check; raises ``VersionError`` for a newer pack, ``FormatError`` for a wrong one."""
        data = parse_json(raw, C.MANIFEST, floats=False)
        if not isinstance(data, dict) or data.get("format") != C.FORMAT:
            raise FormatError(f"{C.MANIFEST}: not a flashpack manifest")
        if type(data.get("version")) is not int or data["version"] < 1:
            raise FormatError(f"{C.MANIFEST}: version is not a format version")
        needs = _min_reader(data)
        try:
            if data["version"] > C.VERSION:
                raise VersionError(f"format version {data['version']} is unknown, {C.VERSION} is the newest known")
            features = _features(data, "required_features")
            for unknown in (f for f in features if f not in C.FEATURES):
                raise VersionError(f"the required feature {unknown!r} is unknown")
            manifest = cls(
                model=_model(data),
                recipe=fields.mapping(data.get("recipe"), "recipe"),
                record_kinds=tuple(RecordKind.from_json(k) for k in fields.items(data, "record_kinds")),
                layers=tuple(Layer.from_json(d) for d in fields.items(data, "layers")),
                matrices=tuple(Matrix.from_json(m) for m in fields.items(data, "matrices")),
                tensors=tuple(TensorEntry.from_json(t) for t in fields.items(data, "tensors")),
                files=tuple(FileEntry.from_json(f) for f in fields.items(data, "files")),
                optional_features=tuple(_features(data, "optional_features")),
            )
        except VersionError as e:
            raise VersionError(f"{e} to flashpack {__version__}; the pack needs flashpack {needs} or newer") from e
        if manifest.required_features != features:
            raise FormatError(f"{C.MANIFEST}: required_features are not the features that are used")
        manifest.validate()
        if canonical(data) != raw:
            raise FormatError(f"{C.MANIFEST}: not in canonical form")
        return manifest

    def validate(self) -> None:
        """The rules that tie the tables together."""
        if len(self.record_kinds) > C.MAX_KINDS or len(self.layers) > C.MAX_LAYERS:
            raise FormatError(f"{C.MANIFEST}: too many record kinds or layers")
        _check_paths([f.path for f in self.files])
        _ordered("files", [f.path for f in self.files])
        _ordered("tensors", [t.name for t in self.tensors])
        _ordered("matrices", [m.name for m in self.matrices])
        _unique("layer", [layer.index for layer in self.layers])
        _unique("module", [layer.module for layer in self.layers])
        for layer in self.layers:
            if any(kind >= len(self.record_kinds) for kind, _ in layer.kinds):
                raise FormatError(f"{C.MANIFEST}: layer {layer.index}: a record kind does not exist")
        self._check_files()
        tensors = {t.name: t for t in self.tensors}
        for m in self.matrices:
            for part, (dtype, shape) in m.encoding.parts(m.shape).items():
                stored = tensors.get(m.tensor_names()[part])
                if stored is None or (stored.dtype, stored.shape) != (dtype, shape):
                    raise FormatError(f"{C.MANIFEST}: matrix {m.name}: {part} is missing or has another shape")

    def _check_files(self) -> None:
        """Every large file is described completely: its size and its header follow from the description."""
        roles = {role: {f.path: f for f in self.files if f.role == role} for role in ("experts", "dense")}
        if sorted(layer.path for layer in self.layers) != sorted(roles["experts"]):
            raise FormatError(f"{C.MANIFEST}: layers and files of experts do not match one to one")
        for path, tensors in self.dense_tensors.items():
            if path not in roles["dense"]:
                raise FormatError(f"{C.MANIFEST}: tensor {tensors[0].name} lies in no dense file")
        # One header at a time: all of a hostile manifest's would take a hundred times its own size.
        shards = ((layer.path, self.shard_layout(layer).built) for layer in self.layers)
        for path, (raw, header) in chain(shards, ((path, self.dense_layout(path)) for path in roles["dense"])):
            entry = self.by_path[path]
            if entry.size != header.size:
                raise FormatError(f"{C.MANIFEST}: {path}: {entry.size} bytes, what it holds needs {header.size}")
            if entry.digests["header"] != hexdigest(raw):
                raise FormatError(f"{C.MANIFEST}: {path}: the header's digest is not that of what it holds")

    @cached_property
    def dense_tensors(self) -> dict[str, list[TensorEntry]]:
        """Dense file -> its tensors in the order of their offsets; a file may hold none."""
        found: dict[str, list[TensorEntry]] = {f.path: [] for f in self.files if f.role == "dense"}
        for t in sorted(self.tensors, key=lambda t: t.offset):
            found.setdefault(t.path, []).append(t)
        return found

    @cached_property
    def by_path(self) -> dict[str, FileEntry]:
        """The files by path."""
        return {f.path: f for f in self.files}

    @cached_property
    def _layers_by_path(self) -> dict[str, Layer]:
        return {layer.path: layer for layer in self.layers}

    def layer_of(self, path: str) -> Layer:
        """The layer whose shard this file is."""
        return self._layers_by_path[path]

    def dense_layout(self, path: str) -> tuple[bytes, Header]:
        """The header of a dense file: its bytes and its parsed form."""
        return dense_layout(self.dense_tensors.get(path, []), path)

    def shard_layout(self, layer: Layer) -> ShardLayout:
        """The layout of a layer's shard."""
        return ShardLayout.of_size(layer, self.record_kinds, self.by_path[layer.path].size)


def canonical(data: Any) -> bytes:
    """The one byte form of a JSON value: equal content has equal bytes and an equal digest."""
    try:
        return json.dumps(data, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n"
    except RecursionError as e:  # Python 3.12 parses more nesting than it writes
        raise FormatError(f"{C.MANIFEST}: nested too deep") from e


def _min_reader(data: dict[str, Any]) -> str:
    """The version of flashpack that a newer pack asks for; readable in every version of the format."""
    version = data.get("min_reader")
    if not isinstance(version, str) or not re.fullmatch(r"\d{1,9}(\.\d{1,9}){1,3}", version, re.ASCII):
        raise FormatError(f"{C.MANIFEST}: min_reader is not a version")
    return version


def _features(data: dict[str, Any], key: str) -> list[str]:
    names = [fields.text({key: name}, key) for name in fields.items(data, key)]
    if names != sorted(set(names)):
        raise FormatError(f"{C.MANIFEST}: {key} are not sorted, or one stands twice")
    return names


def _model(data: dict[str, Any]) -> dict[str, Any]:
    model = fields.mapping(data.get("model"), "model")
    schema = {key: fields.text(model, key) for key in _MODEL}["name_schema"]
    if schema != C.NAME_SCHEMA:
        raise VersionError(f"the schema of tensor names {schema!r} is unknown")
    return model


def _check_paths(paths: list[str]) -> None:
    """Unique also where a file system ignores case; no file is another's folder."""
    # Character by character: the lower case of a whole word has another sigma at its end.
    lower = ["".join(map(str.lower, path)) for path in paths]
    _unique("file", lower)
    # In this order, what lies below a file comes next after it.
    for path, following in pairwise(sorted(lower, key=lambda p: p.replace("/", "\0"))):
        if following.startswith(f"{path}/"):
            raise FormatError(f"{C.MANIFEST}: {following} lies below a file")


def _ordered(what: str, names: list[str]) -> None:
    _unique(f"{what}:", names)
    if names != sorted(names):
        raise FormatError(f"{C.MANIFEST}: {what} are not sorted")


def _unique(what: str, names: Iterable[Any]) -> None:
    name, count = next(iter(Counter(names).most_common(1)), ("", 1))
    if count > 1:
        raise FormatError(f"{C.MANIFEST}: {what} {name} stands twice")
