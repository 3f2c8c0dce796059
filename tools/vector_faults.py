"""The invalid packs of the conformance suite: each breaks one rule of SPEC.md, with all checksums made right again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from vector_packs import BF16, EMBED

from flashpack.formats import Encoding, Manifest, RecordKind
from flashpack.formats import constants as C
from flashpack.formats.checksums import digest, hexdigest
from flashpack.formats.entries import Layer, Matrix
from flashpack.formats.layout import ShardLayout, dense_spec
from flashpack.formats.manifest import canonical
from flashpack.formats.records import Projection, align
from flashpack.formats.writer import DenseWriter, ShardWriter, commit_bytes

Json = dict[str, Any]
SHARD0 = "experts/layer-0000.safetensors"
SHARD3 = "experts/layer-0003.safetensors"
DENSE = "dense-00001.safetensors"


@dataclass(frozen=True)
class Fault:
    """``rule`` of SPEC.md; the ``valid`` pack it is put into; how a reader sees it.

    ``error``: code of the error, and ``at`` which step: "open", "copies" (before a library reads the folder),
    "shard", "read". ``finding``: what a full check reports; without one the check raises the same error.
    """

    rule: str
    put: Callable[[Path], object]
    error: str | None = "format"
    at: str = "open"
    finding: str | None = None
    valid: str = "base"
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.rule}--{self.variant}" if self.variant else self.rule


def read(folder: Path) -> Json:
    data: Json = json.loads((folder / C.MANIFEST).read_bytes())
    return data


def change(edit: Callable[[Json], object]) -> Callable[[Path], None]:
    """The manifest after ``edit``, canonical and with its digest."""

    def put(folder: Path) -> None:
        data = read(folder)
        edit(data)
        commit_bytes(folder, canonical(data))

    return put


def text(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """The manifest's bytes after ``edit``, with their digest."""
    return lambda folder: commit_bytes(folder, edit((folder / C.MANIFEST).read_bytes()))


def flip(path: str, offset: int) -> Callable[[Path], None]:
    """One bit of a file; negative offsets count from the end. Digests stay as they are."""

    def put(folder: Path) -> None:
        data = bytearray((folder / path).read_bytes())
        data[offset] ^= 4
        (folder / path).write_bytes(data)

    return put


def entry(data: Json, path: str) -> Json:
    found: Json = next(f for f in data["files"] if f["path"] == path)
    return found


def reframe(edit: Callable[[Json], object]) -> Callable[[Path], None]:
    """``change``, and plain shards get the headers that follow, so that nothing else is wrong."""

    def put(folder: Path) -> None:
        data = read(folder)
        kinds = Manifest.from_bytes((folder / C.MANIFEST).read_bytes()).record_kinds
        edit(data)
        for row in data["layers"]:
            pairs = tuple((k["kind"], k["count"]) for k in row["kinds"])
            header = ShardLayout(Layer(row["index"], row["module"], row["path"], pairs), kinds).header_bytes
            content = bytearray((folder / row["path"]).read_bytes())
            content[: len(header)] = header
            (folder / row["path"]).write_bytes(content)
            entry(data, row["path"])["digests"]["header"] = hexdigest(header)
        commit_bytes(folder, canonical(data))

    return put


def tail(path: str, edit: Callable[[bytearray], object]) -> Callable[[Path], None]:
    """What stands behind the records after ``edit``, with its digest."""

    def put(folder: Path) -> None:
        manifest = Manifest.from_bytes((folder / C.MANIFEST).read_bytes())
        layout = manifest.shard_layout(manifest.layer_of(path))
        content = bytearray((folder / path).read_bytes())
        part = content[layout.tail :]
        edit(part)
        content[layout.tail :] = part
        (folder / path).write_bytes(content)
        change(lambda m: entry(m, path)["digests"].update(tail=hexdigest(part)))(folder)

    return put


def frame(
    make: Callable[[bytes], bytes], pad: bytes = b"\0", size: int | None = None, spare: int = 0
) -> Callable[[Path], None]:
    """The compressed pack's first frame made anew from its record, everything else following from it.

    ``pad``: what fills the page behind it. ``size``: the size that is stated. ``spare``: pages that nobody names.
    """

    def put(folder: Path) -> None:
        manifest = Manifest.from_bytes((folder / C.MANIFEST).read_bytes())
        layer = manifest.layers[0]
        old = manifest.shard_layout(layer)
        content = (folder / layer.path).read_bytes()
        rows = old.parse_tail(content[old.tail :])
        stored = [content[o : o + n] for o, n in zip(rows.offsets, rows.spans, strict=True)]
        sizes = list(rows.sizes)
        record = zstandard.ZstdDecompressor().decompress(stored[0][: sizes[0]])
        new = make(record)
        sizes[0] = len(new) if size is None else size
        stored[0] = new.ljust(align(max(len(new), sizes[0]), C.PAGE), pad)
        frames = b"".join(stored) + bytes(spare * C.PAGE)
        layout = ShardLayout(layer, manifest.record_kinds, len(frames))
        end = b"".join(n.to_bytes(4, "little") for n in sizes) + b"".join(rows.contents)
        end += b"".join(digest(s) for s in stored)
        (folder / layer.path).write_bytes(layout.header_bytes + frames + end)
        digests = {"header": hexdigest(layout.header_bytes), "tail": hexdigest(end)}
        change(lambda m: entry(m, layer.path).update(size=layout.size, digests=digests))(folder)

    return put


def odd_header(folder: Path) -> None:
    """A header that says the same in other bytes, with its own digest in the manifest."""
    content = bytearray((folder / DENSE).read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    content[8:length] = content[8:length].replace(b'{"__metadata__":', b'{ "__metadata__":', 1)[: length - 8]
    (folder / DENSE).write_bytes(content)
    change(lambda m: entry(m, DENSE)["digests"].update(header=hexdigest(content[:length])))(folder)


def longer(folder: Path) -> None:
    with open(folder / DENSE, "ab") as f:
        f.write(b"\0")


def shorter(folder: Path) -> None:
    os.truncate(folder / SHARD0, 20_000)


def both_longer(folder: Path) -> None:
    longer(folder)
    change(lambda m: entry(m, DENSE).update(size=entry(m, DENSE)["size"] + 1))(folder)


def link(path: str, to: str) -> Callable[[Path], None]:
    """``path`` moved to ``to``, relative to its folder, and a symbolic link in its place."""

    def put(folder: Path) -> None:
        (folder / path).rename((folder / path).parent / to)
        (folder / path).symlink_to(to)

    return put


def gap(folder: Path) -> int:
    """The first byte between two dense tensors."""
    manifest = Manifest.from_bytes((folder / C.MANIFEST).read_bytes())
    tensors = manifest.dense_tensors[DENSE]
    return next(a.offset + a.nbytes for a, b in pairwise(tensors) if a.offset + a.nbytes < b.offset)


def padding(folder: Path) -> None:
    flip(DENSE, gap(folder))(folder)


def first_tensor(folder: Path) -> None:
    flip(DENSE, read(folder)["tensors"][0]["offset"])(folder)


def huge_kind(m: Json) -> None:
    big = Encoding("raw", "F32")
    m["record_kinds"].append(
        RecordKind((Projection("up", (2**15, 2**15), big), Projection("down", (2**15, 2**15), big))).to_json()
    )


def swap(rows: list[Json]) -> None:
    rows[0], rows[1] = rows[1], rows[0]


def add_file(path: str) -> Callable[[Path], None]:
    """A copied file of this name, listed as any other."""

    def put(folder: Path) -> None:
        data = read(folder)
        row = {"path": path, "role": "copy", "size": 2, "digests": {"file": hexdigest(b"x\n")}}
        data["files"] = sorted([*data["files"], row], key=lambda f: f["path"])
        inside = folder / path.lstrip("/")
        if len(path) < 200 and ".." not in path and not inside.exists():
            try:
                inside.parent.mkdir(parents=True, exist_ok=True)
                inside.write_bytes(b"x\n")
            except OSError:
                pass  # a name that no file can have beside the others
        commit_bytes(folder, canonical(data))

    return put


def move_tensor(by: int) -> Callable[[Json], None]:
    def edit(m: Json) -> None:
        row = next(t for t in m["tensors"] if t["name"] == "model.after")
        row["offset"] += by

    return edit


def rename_matrix(m: Json) -> None:
    """A matrix whose name does not end in .weight; its parts are there."""
    m["matrices"][0]["name"] = "model.embed"


def drop_part(m: Json) -> None:
    m["matrices"].append(Matrix("model.norm.weight", (2, 32), EMBED.encoding).to_json())


def k0(m: Json) -> Json:
    kind: Json = m["record_kinds"][0]
    return kind


def without_size(record: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(record)


def with_trailer(record: bytes) -> bytes:
    return zstandard.compress(record) + b"\0\0"


FRAMES: list[tuple[str, str, Callable[[Path], None], str | None, str, str]] = [
    ("frame-larger-than-record", "", frame(lambda r: r + b"\0"), "format", "shard", "expert-table"),
    ("frames-not-filled", "", frame(bytes, spare=1), "format", "shard", "expert-table"),
    ("frame-of-another-size", "", frame(lambda r: zstandard.compress(r + r)), "format", "read", "frame"),
    ("frame-of-another-size", "not-stated", frame(without_size), "format", "read", "frame"),
    ("frame-with-trailer", "", frame(with_trailer), "format", "read", "frame"),
    ("not-a-frame", "", frame(lambda r: r[:100]), "format", "read", "frame"),
    ("content-digest", "", frame(lambda r: zstandard.compress(bytes(len(r)))), None, "", "content-digest"),
    ("nonzero-frame-padding", "", frame(zstandard.compress, pad=b"\1"), None, "", "padding"),
    ("damaged-frame", "", flip(SHARD0, C.PAGE + 40), "integrity", "read", "record-digest"),
]
"""Rule, variant, change, and how it is seen, of faults in the compressed pack."""


def odd_kind(*projections: tuple[str, tuple[int, int], dict[str, Any]]) -> Callable[[Path], None]:
    """One more record kind, which nobody uses, right in all but what its constructor would refuse."""
    parts = []
    for name, shape, fields in projections:
        encoding = object.__new__(Encoding)
        for key, value in ({"bits": 0, "group_size": 0} | fields).items():
            object.__setattr__(encoding, key, value)
        parts.append(Projection(name, shape, encoding))
    kind = object.__new__(RecordKind)
    object.__setattr__(kind, "projections", tuple(parts))
    return change(lambda m: m["record_kinds"].append(kind.to_json()))


def redense(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Callable[[Path], None]:
    """Another dense file, consistent in itself, in place of the pack's; no matrices."""

    def put(folder: Path) -> None:
        specs = [dense_spec(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
        with DenseWriter(folder, DENSE, specs) as writer:
            for spec in specs:
                writer.append(spec.name, memoryview(bytes(spec.nbytes)))
            file, rows = writer.finish()
        edit = {"tensors": [t.to_json() for t in sorted(rows, key=lambda t: t.name)], "matrices": []}
        change(lambda m: (m.update(edit), entry(m, DENSE).update(file.to_json())))(folder)

    return put


def kind_without_records(folder: Path) -> None:
    """A shard that gives a kind and no record of it, otherwise as it should be."""
    manifest = Manifest.from_bytes((folder / C.MANIFEST).read_bytes())
    layer = replace(manifest.layers[0], kinds=((0, 2), (1, 0)))
    with ShardWriter(folder, layer, manifest.record_kinds, np.array([[0, 0], [0, 1]], "<u4")) as writer:
        for expert in range(2):
            writer.write(expert, memoryview(bytes(manifest.record_kinds[0].stride)))
        file = writer.finish()
    change(lambda m: (m["layers"].__setitem__(0, layer.to_json()), entry(m, SHARD0).update(file.to_json())))(folder)


RAW = {"name": "raw", "dtype": "BF16"}
SEVEN = {"name": "affine", "dtype": "BF16", "bits": 7, "group_size": 32}
SIXTEEN = {"name": "affine", "dtype": "BF16", "bits": 4, "group_size": 16}
CONSISTENT = [
    Fault("wrong-type", change(lambda m: k0(m)["sections"][0].update(offset=False)), variant="boolean"),
    Fault("wrong-type", change(lambda m: m["optional_features"].append(7)), variant="feature"),
    Fault("wrong-type", change(lambda m: m["matrices"].append(7)), variant="entry"),
    Fault("wrong-type", change(lambda m: k0(m)["projections"][0].update(encoding="q4")), variant="encoding"),
    Fault("wrong-type", change(lambda m: k0(m)["projections"][0].update(shape=[32, 64, 1])), variant="matrix"),
    Fault("zero-dimension", redense({"a": ("F32", (0,)), "b": ("F32", (1,))}), variant="alone"),
    Fault("unknown-dtype", redense({"a": ("I64", (1,))}), variant="alone"),
    Fault("empty-kind", kind_without_records, variant="alone"),
    Fault("affine-out-of-range", odd_kind(("up", (1, 32), SEVEN), ("down", (1, 32), SEVEN)), variant="alone"),
    Fault("affine-out-of-range", odd_kind(("up", (1, 32), SIXTEEN), ("down", (1, 32), SIXTEEN)), variant="group-alone"),
    Fault("raw-out-of-range", odd_kind(("up", (1, 1), RAW | {"dtype": "F64"}), ("down", (1, 1), RAW)), variant="alone"),
    Fault("odd-projections", odd_kind(("up", (1, 1), RAW), ("up", (1, 1), RAW)), variant="alone"),
    Fault("odd-projections", odd_kind(("gate", (1, 1), RAW), ("down", (1, 1), RAW)), variant="no-up"),
]
"""Faults that no other rule would find, too."""

V = "version"
FAULTS: list[Fault] = [
    # Section 2
    Fault("symbolic-link", link(SHARD0, "elsewhere"), "integrity", finding="unreadable-file"),
    Fault("linked-folder", link("experts", "elsewhere"), "integrity", finding="unreadable-file"),
    Fault("missing-file", lambda p: (p / SHARD3).unlink(), "integrity", finding="missing-file"),
    Fault("truncated-file", shorter, "integrity", finding="size"),
    Fault("longer-file", longer, "integrity", finding="size"),
    Fault("unlisted-file", lambda p: (p / "notes.json").write_bytes(b"{}"), "format", "copies", "unlisted-file"),
    Fault("executable-file", add_file("modeling_tiny.py")),
    Fault("executable-file", add_file("weights.PKL"), variant="pickle"),
    # Section 3: JSON
    Fault("duplicate-key", text(lambda b: b.replace(b'"recipe":', b'"recipe": {},\n "recipe":', 1))),
    Fault("fraction", change(lambda m: m["recipe"].update(share=0.5))),
    Fault("fraction", text(lambda b: b.replace(b'"version": 1', b'"version": 1e0')), variant="exponent"),
    Fault("not-a-number", text(lambda b: b.replace(b'"version": 1', b'"version": NaN'))),
    Fault("not-utf8", text(lambda b: b.replace(b'"q4"', b'"q\xff"', 1))),
    Fault("half-surrogate", text(lambda b: b.replace(b'"q4"', b'"\\ud800"', 1))),
    Fault("deep-nesting", text(lambda b: b.replace(b'"q4"', b"[" * 100_000 + b"]" * 100_000, 1))),
    Fault("not-canonical", text(lambda b: json.dumps(json.loads(b)).encode())),
    Fault("not-canonical", text(lambda b: b + b"\n"), variant="newline"),
    Fault("manifest-digest", flip(C.MANIFEST_DIGEST, 3), "integrity", finding="manifest-digest"),
    Fault("manifest-digest", flip(C.MANIFEST, 30), "integrity", finding="manifest-digest", variant="manifest"),
    Fault("manifest-too-large", text(lambda b: b + b" " * C.MAX_MANIFEST_BYTES)),
    # Section 3: types
    Fault("missing-field", change(lambda m: m.pop("layers"))),
    Fault("missing-field", change(lambda m: m["files"][0].pop("size")), variant="size"),
    Fault("wrong-type", change(lambda m: m["layers"][0].update(index=True))),
    Fault("wrong-type", change(lambda m: m.update(files={})), variant="files"),
    Fault("wrong-type", change(lambda m: m["tensors"][0].update(offset=-1)), variant="negative"),
    Fault("wrong-type", change(lambda m: m["tensors"][0].update(offset=2**62)), variant="too-large"),
    Fault("wrong-type", change(lambda m: m["tensors"][0].update(shape=[1] * 9)), variant="nine-dimensions"),
    Fault("control-character", reframe(lambda m: m["layers"][0].update(module="a\x1b[2J"))),
    Fault("zero-dimension", change(lambda m: m["tensors"][0].update(shape=[0, 4]))),
    Fault("bad-digest", change(lambda m: m["files"][0]["digests"].update(file="A" * 64))),
    # Section 3: fields
    Fault("other-format", change(lambda m: m.update(format="zip"))),
    Fault("version-zero", change(lambda m: m.update(version=0))),
    Fault("newer-version", change(lambda m: m.update(version=2, min_reader="3.1")), V),
    Fault("bad-min-reader", change(lambda m: m.update(min_reader="1.0; rm"))),
    Fault("unused-feature", change(lambda m: m.update(required_features=["zstd"]))),
    Fault("unused-feature", change(lambda m: m.update(required_features=[])), valid="compressed", variant="unlisted"),
    Fault("unknown-feature", change(lambda m: m.update(required_features=["warp"], min_reader="3.1")), V),
    Fault("unsorted-features", change(lambda m: m.update(optional_features=["b", "a"]))),
    Fault("too-many-kinds", change(lambda m: m["record_kinds"].extend([k0(m)] * 255))),
    Fault("unsorted-matrices", change(lambda m: m["matrices"].reverse()), valid="affine-4"),
    Fault("unsorted-tensors", change(lambda m: swap(m["tensors"]))),
    Fault("unsorted-files", change(lambda m: swap(m["files"]))),
    Fault("unknown-name-schema", change(lambda m: m["model"].update(name_schema="transformers-9")), V),
    Fault("unknown-role", change(lambda m: m["files"][0].update(role="secret"))),
    Fault("missing-digest", change(lambda m: entry(m, SHARD0)["digests"].pop("tail"))),
    # Section 3: paths
    Fault("absolute-path", add_file("/etc/passwd")),
    Fault("parent-path", add_file("../outside")),
    Fault("parent-path", add_file("a/../../outside"), variant="inside"),
    Fault("hidden-path", add_file(".hidden")),
    Fault("long-path-part", add_file("x" * 256)),
    Fault("backslash-path", add_file("a\\b")),
    Fault("backslash-path", add_file("c:b"), variant="colon"),
    Fault("own-name", add_file("FlashPack.json")),
    Fault("own-name", add_file("x.part"), variant="part"),
    Fault("path-twice", add_file("CONFIG.json")),
    Fault("path-below-file", add_file("config.json/x")),
    # Section 4
    Fault("header-digest-not-derived", odd_header),
    Fault("size-not-derived", both_longer),
    Fault("damaged-header", flip(SHARD0, 20), "integrity", "shard", "header-digest"),
    Fault("damaged-header", flip(SHARD0, 16000), "integrity", "shard", "header-digest", variant="spaces"),
    Fault("nonzero-padding", padding, None, "", "padding"),
    # Section 5
    Fault("odd-projections", change(lambda m: k0(m)["projections"].reverse())),
    Fault("section-overlap", change(lambda m: k0(m)["sections"][1].update(offset=0))),
    Fault("wrong-nbytes", change(lambda m: k0(m).update(nbytes=k0(m)["nbytes"] + 1))),
    Fault("wrong-stride", change(lambda m: k0(m).update(stride=k0(m)["stride"] + C.PAGE))),
    Fault("record-too-large", change(huge_kind)),
    Fault("layer-twice", reframe(lambda m: m["layers"][1].update(index=0))),
    Fault("layer-index-too-large", reframe(lambda m: m["layers"][1].update(index=65536))),
    Fault("module-twice", reframe(lambda m: m["layers"][1].update(module=m["layers"][0]["module"]))),
    Fault("shard-without-layer", change(lambda m: m["layers"].pop())),
    Fault("layer-without-shard", change(lambda m: m["files"].remove(entry(m, SHARD3)))),
    Fault("kind-out-of-range", change(lambda m: m["layers"][0]["kinds"][0].update(kind=9))),
    Fault("empty-kind", change(lambda m: m["layers"][0]["kinds"].append({"kind": 1, "count": 0}))),
    Fault("empty-kind", change(lambda m: m["layers"][0].update(kinds=[])), variant="none"),
    Fault("kind-twice", change(lambda m: m["layers"][0].update(kinds=[{"kind": 0, "count": 1}] * 2))),
    Fault("too-many-experts", change(lambda m: m["layers"][0]["kinds"][0].update(count=65537))),
    Fault("unknown-codec", change(lambda m: m["layers"][0].update(codec="lz9")), V),
    Fault("table-names-record-twice", tail(SHARD3, lambda t: t.__setitem__(slice(0, 8), t[8:16])), "format", "shard",
          "expert-table"),
    *(Fault(rule, put, error, at, finding, "compressed", variant) for rule, variant, put, error, at, finding in FRAMES),
    # Section 6
    Fault("affine-out-of-range", change(lambda m: k0(m)["projections"][0]["encoding"].update(bits=7))),
    Fault("affine-out-of-range", change(lambda m: k0(m)["projections"][0]["encoding"].update(group_size=16)),
          variant="group"),
    Fault("raw-out-of-range", change(lambda m: m["record_kinds"][1]["projections"][0]["encoding"].update(dtype="F64"))),
    Fault("width-not-multiple", change(lambda m: k0(m)["projections"][0].update(shape=[32, 65]))),
    Fault("unknown-encoding", change(lambda m: k0(m)["projections"][0].update(encoding={"name": "trellis"})), V),
    # Section 7
    Fault("tensor-twice", change(lambda m: m["tensors"].insert(0, m["tensors"][0]))),
    Fault("tensor-in-no-dense-file", change(lambda m: m["tensors"][0].update(path="config.json"))),
    Fault("unknown-dtype", change(lambda m: m["tensors"][0].update(dtype="I64"))),
    Fault("tensor-overlap", change(move_tensor(-64))),
    Fault("tensor-gap", change(move_tensor(64))),
    Fault("tensor-past-end", change(move_tensor(2**40))),
    Fault("matrix-name", change(rename_matrix)),
    Fault("raw-matrix", change(lambda m: m["matrices"][0].update(encoding=BF16.to_json()))),
    Fault("matrix-part-missing", change(drop_part)),
    Fault("matrix-part-shape", change(lambda m: m["matrices"][0].update(shape=[11, 64]))),
    # Section 8
    Fault("damaged-tail", flip(SHARD0, -5), "integrity", "shard", "tail-digest"),
    Fault("damaged-record", flip(SHARD0, C.PAGE + 7), "integrity", "read", "record-digest"),
    Fault("damaged-record", flip(SHARD0, 2 * C.PAGE - 1), "integrity", "read", "record-digest", variant="padding"),
    Fault("damaged-tensor", first_tensor, None, "", "tensor-digest"),
    Fault("damaged-copy", flip("config.json", 3), "integrity", "copies", "file-digest"),
    *CONSISTENT,
]  # fmt: skip
