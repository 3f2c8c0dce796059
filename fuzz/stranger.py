"""A whole pack as one piece of bytes, and the stranger who makes its checksums right.

The bytes are: one byte that says what the stranger leaves as it is, the manifest as JSON, a zero byte, then patches:
file (its place in the manifest's list, 1 byte), offset (4 bytes), length (2 bytes), bytes. Files are zero elsewhere.
Derived things (headers, sizes, offsets, digests) are filled in, so that a fuzzer gets past them to what they protect.
A patch with 128 added to its file is laid over the derived header, before digests are made.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashpack.errors import FlashpackError
from flashpack.formats import constants as C
from flashpack.formats import fields
from flashpack.formats.checksums import digest, hexdigest
from flashpack.formats.entries import Layer, Matrix, TensorEntry
from flashpack.formats.header import parse_json
from flashpack.formats.layout import ShardLayout, dense_header, dense_spec
from flashpack.formats.manifest import Manifest, canonical
from flashpack.formats.records import Projection, RecordKind

LEAVE_HEADERS, LEAVE_TAILS, LEAVE_RECORDS, LEAVE_TENSORS, LEAVE_COPIES, LEAVE_IDENTITY, LEAVE_KINDS = (
    1 << i for i in range(7)
)

LATE = 128
PATCH = struct.Struct("<BIH")
_MOST_BYTES = 2**20
_MOST_FILES = 16


@dataclass
class _Patch:
    file: int
    offset: int
    data: bytes


def pack_to_bytes(folder: Path) -> bytes:
    """A pack in the form that ``bytes_to_pack`` reads."""
    raw = (folder / C.MANIFEST).read_bytes()
    patches = []
    for number, entry in enumerate(Manifest.from_bytes(raw).files):
        content = (folder / entry.path).read_bytes()
        start = 0 if entry.role == "copy" else 8 + int.from_bytes(content[:8], "little")
        for at in range(start, len(content), 4096):
            piece = content[at : at + 4096].rstrip(b"\0")
            if piece:
                patches.append(PATCH.pack(number, at, len(piece)) + piece)
    return b"\0" + raw + b"\0" + b"".join(patches)


def bytes_to_pack(data: bytes, folder: Path) -> None:
    """Make the pack that ``data`` describes in an empty ``folder``, as far as it can be made."""
    leave, (raw, _, patches) = data[0] if data else 0, data[1:].partition(b"\0")
    try:
        manifest = parse_json(raw, C.MANIFEST)
    except FlashpackError:
        _write(folder, raw, {}, leave)
        return
    found = _patches(patches)
    contents = _contents(manifest, found)
    late: dict[str, list[_Patch]] = {}
    for patch, path in ((p, path) for p in found for i, path in enumerate(contents) if p.file == i + LATE):
        late.setdefault(path, []).append(patch)
    fix(manifest, contents, late, leave)
    with contextlib.suppress(FlashpackError):  # what cannot be canonical stays as it came
        raw = canonical(manifest)
    _write(folder, raw, contents, leave)


def fix(manifest: Any, contents: dict[str, bytearray], late: dict[str, list[_Patch]], leave: int) -> None:
    """Fill in everything of ``manifest`` (as JSON) and of the files that follows from the rest of them."""
    if not isinstance(manifest, dict):
        return
    entries = {row["path"]: row for row in _rows(manifest, "files") if row["path"] in contents}
    if not leave & LEAVE_KINDS:
        for row in _list(manifest, "record_kinds"):
            with contextlib.suppress(FlashpackError):
                _fix_kind(row)
    with contextlib.suppress(FlashpackError):
        kinds = tuple(RecordKind.from_json(k) for k in _list(manifest, "record_kinds"))
        layers = [Layer.from_json(d) for d in _list(manifest, "layers")]
        if not leave & LEAVE_KINDS:
            with contextlib.suppress(FlashpackError):
                manifest["required_features"] = _features(manifest, kinds, layers)
        for layer in layers:
            if layer.path in contents and all(kind < len(kinds) for kind, _ in layer.kinds):
                _fix_shard(layer, kinds, entries[layer.path], contents[layer.path], late.get(layer.path, []), leave)
    for path, entry in entries.items():
        if entry.get("role") == "dense":
            rows = [row for row in _rows(manifest, "tensors") if row["path"] == path]
            with contextlib.suppress(FlashpackError):
                _fix_dense(rows, entry, contents[path], late.get(path, []), leave)
        if entry.get("role") == "copy" and not leave & LEAVE_COPIES:
            _set_digest(entry, "file", contents[path])
            entry["size"] = len(contents[path])


def _features(manifest: dict[str, Any], kinds: tuple[RecordKind, ...], layers: list[Layer]) -> list[str]:
    matrices = tuple(Matrix.from_json(m) for m in _list(manifest, "matrices"))
    tensors = tuple(TensorEntry.from_json(t) for t in _list(manifest, "tensors"))
    return Manifest({}, {}, kinds, tuple(layers), matrices, tensors, ()).required_features


def _fix_kind(row: Any) -> None:
    projections = fields.items(fields.mapping(row, "kind"), "projections")
    kind = RecordKind(tuple(Projection.from_json(p) for p in projections))
    row |= {key: value for key, value in kind.to_json().items() if key != "projections"}


def _fix_shard(
    layer: Layer, kinds: tuple[RecordKind, ...], entry: Any, content: bytearray, late: list[_Patch], leave: int
) -> None:
    tail_bytes = ShardLayout(layer, kinds).tail_bytes
    frames = 0 if layer.codec == "raw" else max(0, len(content) - C.PAGE - tail_bytes) // C.PAGE * C.PAGE
    layout = ShardLayout(layer, kinds, frames)
    if layout.size > _MOST_BYTES:
        return
    if not leave & LEAVE_HEADERS:
        _resize(content, layout.size)
        content[: len(layout.header_bytes)] = layout.header_bytes
        _lay(content, late)
        _set_digest(entry, "header", content[: len(layout.header_bytes)])
        entry["size"] = layout.size
    if len(content) == layout.size:
        if not leave & LEAVE_RECORDS:
            with contextlib.suppress(FlashpackError):
                _fix_records(layout, content)
        if not leave & LEAVE_TAILS:
            _set_digest(entry, "tail", content[layout.tail :])


def _fix_records(layout: ShardLayout, content: bytearray) -> None:
    """The digests at the end of a shard; what a frame holds is not looked at."""
    tail = layout.parse_tail(bytes(content[layout.tail :]))
    places = zip(tail.offsets, tail.spans, strict=True)
    content[-C.DIGEST_BYTES * layout.layer.experts :] = b"".join(digest(content[at : at + n]) for at, n in places)


def _fix_dense(rows: list[Any], entry: Any, content: bytearray, late: list[_Patch], leave: int) -> None:
    tensors = [TensorEntry.from_json(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: tensors[i].offset)
    specs = [dense_spec(tensors[i].name, tensors[i].dtype, tensors[i].shape) for i in order]
    raw, header = dense_header(specs, str(entry["path"]))
    if header.size > _MOST_BYTES:
        return
    if not leave & LEAVE_HEADERS:
        _resize(content, header.size)
        content[: len(raw)] = raw
        _lay(content, late)
        _set_digest(entry, "header", content[: len(raw)])
        entry["size"] = header.size
        for i, placed in zip(order, [t for t in header.tensors if not t.hidden], strict=True):
            rows[i]["offset"] = placed.offset
    if not leave & LEAVE_TENSORS:
        for row, tensor in zip(rows, tensors, strict=True):
            row["digest"] = hexdigest(content[row["offset"] : row["offset"] + tensor.nbytes])


def _contents(manifest: Any, patches: list[_Patch]) -> dict[str, bytearray]:
    """The files by path: zeros of the listed size, and the patches."""
    rows = _rows(manifest, "files") if isinstance(manifest, dict) else []
    contents: dict[str, bytearray] = {}
    for number, row in enumerate(rows[:_MOST_FILES]):
        size = row.get("size")
        content = bytearray(min(size, _MOST_BYTES) if type(size) is int and size > 0 else 0)
        _lay(content, [patch for patch in patches if patch.file == number])
        contents[row["path"]] = content
    return contents


def _lay(content: bytearray, patches: list[_Patch]) -> None:
    for patch in patches:
        if patch.offset < len(content):
            end = min(len(content), patch.offset + len(patch.data))
            content[patch.offset : end] = patch.data[: end - patch.offset]


def _patches(data: bytes) -> list[_Patch]:
    found, at = [], 0
    while at + PATCH.size <= len(data):
        file, offset, length = PATCH.unpack_from(data, at)
        at += PATCH.size
        found.append(_Patch(file, offset, data[at : at + length]))
        at += length
    return found


def _list(data: dict[str, Any], key: str) -> list[Any]:
    value = data.get(key)
    return value if isinstance(value, list) else []


def _rows(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The objects of a list that have a path."""
    return [row for row in _list(data, key) if isinstance(row, dict) and isinstance(row.get("path"), str)]


def _set_digest(entry: Any, name: str, data: bytes | bytearray) -> None:
    if isinstance(entry.get("digests"), dict):
        entry["digests"][name] = hexdigest(data)


def _resize(content: bytearray, size: int) -> None:
    del content[size:]
    content.extend(bytes(size - len(content)))


def _write(folder: Path, manifest: bytes, contents: dict[str, bytearray], leave: int) -> None:
    (folder / C.MANIFEST).write_bytes(manifest)
    identity = "0" * 64 if leave & LEAVE_IDENTITY else hexdigest(manifest)
    (folder / C.MANIFEST_DIGEST).write_bytes(f"{identity}\n".encode())
    for path, content in contents.items():
        target = folder / path
        # Only a plain path inside the folder is made; a reader must refuse the others without opening them.
        if path.startswith(("/", C.MANIFEST)) or ".." in path.split("/"):
            continue
        with contextlib.suppress(OSError, ValueError):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
