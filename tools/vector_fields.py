"""More invalid packs of the conformance suite: every field, every variant of a rule; put into the small valid packs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard
from vector_edges import frame_of
from vector_faults import (
    DENSE,
    SHARD0,
    Fault,
    Json,
    add_file,
    change,
    entry,
    flip,
    frame,
    link,
    read,
    reframe,
    tail,
    text,
)  # fmt: skip

from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.manifest import canonical
from flashpack.formats.records import align
from flashpack.formats.writer import commit_bytes

Place = tuple[str | int, ...]

FIELDS: dict[str, tuple[Place, str]] = {
    "": ((), "format version min_reader required_features optional_features model recipe record_kinds layers matrices "
             "tensors files"),
    "model": (("model",), "architecture model_type name_schema transformers"),
    "record_kinds": (("record_kinds", 0), "projections sections nbytes stride"),
    "projections": (("record_kinds", 0, "projections", 0), "name shape encoding"),
    "sections": (("record_kinds", 0, "sections", 0), "name dtype shape offset"),
    "affine": (("record_kinds", 0, "projections", 0, "encoding"), "name bits group_size scale_dtype"),
    "raw": (("record_kinds", 1, "projections", 0, "encoding"), "dtype"),
    "layers": (("layers", 0), "index module path kinds"),
    "kinds": (("layers", 0, "kinds", 0), "kind count"),
    "matrices": (("matrices", 0), "name shape encoding"),
    "tensors": (("tensors", 0), "name path dtype shape offset digest"),
    "files": (("files", 0), "path role size digests"),
}  # fmt: skip
"""Every object of the manifest: where there is one, and the fields that it must have."""


def at(data: Json, place: Place) -> Any:
    value: Any = data
    for key in place:
        value = value[key]
    return value


def without(place: Place, key: str) -> Callable[[Json], object]:
    return lambda m: at(m, place).pop(key)


def other_type(place: Place, key: str) -> Callable[[Json], None]:
    """A field with a value of another type, as near as possible."""

    def edit(m: Json) -> None:
        row = at(m, place)
        old = row[key]
        row[key] = str(old) if isinstance(old, int) else {} if isinstance(old, list) else [old]

    return edit


def fields() -> Iterator[Fault]:
    """Each field missing, and of another type."""
    for name, (place, keys) in FIELDS.items():
        valid = "small-mixed" if name == "raw" else "small"
        for key in keys.split():
            variant = f"{name or 'manifest'}-{key.replace('_', '-')}".replace("_", "-")
            yield Fault("missing-field", change(without(place, key)), valid=valid, variant=variant)
            yield Fault("wrong-type", change(other_type(place, key)), valid=valid, variant=variant)
    for key in ("record_kinds", "layers", "tensors", "files"):
        edit = change(lambda m, key=key: m[key].append(7))
        yield Fault("wrong-type", edit, valid="small", variant=f"entry-of-{key.replace('_', '-')}")
    for key, path in (("file", "config.json"), ("header", DENSE), ("header", SHARD0), ("tail", SHARD0)):
        variant = f"{key}-of-{path.split('.')[0].replace('/', '-')}"
        edit = change(lambda m, key=key, path=path: entry(m, path)["digests"].pop(key))
        yield Fault("missing-digest", edit, valid="small", variant=variant)


def kind_json(*projections: tuple[str, list[int], Json]) -> Json:
    """A record kind by the rules of section 5, whatever its parameters."""
    stored: dict[str, dict[str, tuple[str, list[int]]]] = {}
    for name, (rows, width), e in projections:
        groups = (e.get("scale_dtype", ""), [rows, width // e.get("group_size", 1)])
        stored[name] = {"weight": (e["dtype"], [rows, width])} if e["name"] == "raw" else {
            "weight": ("U32", [rows, width * e["bits"] // 32]), "scales": groups, "biases": groups,
        }  # fmt: skip
    sections, end = [], 0
    for group in ([n for n in stored if n != "down"], ["down"]):
        for part in ("weight", "scales", "biases"):
            for name in group:
                if part in stored[name]:
                    dtype, shape = stored[name][part]
                    end = align(end, 64)
                    sections.append({"name": f"{name}.{part}", "dtype": dtype, "shape": shape, "offset": end})
                    end += shape[0] * shape[1] * {"U8": 1, "F32": 4, "U32": 4, "F64": 8}.get(dtype, 2)
    rows_json = [{"name": n, "shape": s, "encoding": e} for n, s, e in projections]
    return {"projections": rows_json, "sections": sections, "nbytes": end, "stride": align(end, C.PAGE)}


def kind(*projections: tuple[str, list[int], Json]) -> Callable[[Path], None]:
    """One more record kind, which nobody uses."""
    return change(lambda m: m["record_kinds"].append(kind_json(*projections)))


def affine(**other: object) -> Json:
    return {"name": "affine", "bits": 4, "group_size": 32, "scale_dtype": "BF16"} | other


RAW: Json = {"name": "raw", "dtype": "BF16"}
SKIPPABLE = b"\x50\x2a\x4d\x18\1\0\0\0x"


def sections(edit: Callable[[list[Json]], object]) -> Callable[[Path], None]:
    return change(lambda m: edit(m["record_kinds"][0]["sections"]))


def recipe(new: bytes, old: bytes = b'"experts": "q4"') -> Callable[[Path], None]:
    """A field of the recipe in other bytes."""
    return text(lambda b: b.replace(old, new, 1))


def proof(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """The file with the manifest's digest after ``edit``; empty: none."""

    def put(folder: Path) -> None:
        path = folder / C.MANIFEST_DIGEST
        data = edit(path.read_bytes())
        path.write_bytes(data) if data else path.unlink()

    return put


def replaced(path: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in place of a file."""

    def put(folder: Path) -> None:
        (folder / path).unlink()
        make(folder / path)

    return put


def stray(path: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(b"x")

    return put


def link_nowhere(folder: Path) -> None:
    (folder / "x").symlink_to("none")


def cut(path: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / path, (folder / path).stat().st_size - 1)


def grown(path: str, by: int) -> Callable[[Path], None]:
    """A file with zeros at its end, and a manifest that says so."""

    def put(folder: Path) -> None:
        size = (folder / path).stat().st_size + by
        os.truncate(folder / path, size)
        change(lambda m: entry(m, path).update(size=size))(folder)

    return put


def too_small(folder: Path) -> None:
    """A shard without room for what must stand behind its records."""
    os.truncate(folder / SHARD0, 70)
    change(lambda m: entry(m, SHARD0).update(size=70))(folder)


def other_header(path: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    """A header of one page in other bytes, with its own digest in the manifest."""

    def put(folder: Path) -> None:
        content = bytearray((folder / path).read_bytes())
        header = bytes(content[8 : C.PAGE])
        assert header.count(old) == 1
        content[8 : C.PAGE] = header.rstrip().replace(old, new).ljust(len(header))
        (folder / path).write_bytes(content)
        change(lambda m: entry(m, path)["digests"].update(header=hexdigest(content[: C.PAGE])))(folder)

    return put


def nine_dimensions(folder: Path) -> None:
    """A tensor of nine dimensions, also in the header of its file."""
    other_header(DENSE, b'"shape":[5]', b'"shape":[1,1,1,1,1,1,1,1,5]')(folder)
    change(lambda m: m["tensors"][-2].update(shape=[1] * 8 + [5]))(folder)


def same_place(folder: Path) -> None:
    """Two tensors with the same first byte; the digests are those of the bytes there."""
    data = read(folder)
    first, norm = data["tensors"][0], data["tensors"][-2]
    place = first["offset"]
    norm.update(offset=place, digest=hexdigest((folder / DENSE).read_bytes()[place : place + 10]))
    commit_bytes(folder, canonical(data))


def written(*paths: str) -> Callable[[Path], None]:
    """Several copied files."""

    def put(folder: Path) -> None:
        for path in paths:
            add_file(path)(folder)

    return put


def listed(path: str) -> Callable[[Path], None]:
    """A copied file in the manifest only, for names that files cannot have."""
    row = {"path": path, "role": "copy", "size": 2, "digests": {"file": hexdigest(b"x\n")}}
    return change(lambda m: m.update(files=sorted([*m["files"], row], key=lambda f: f["path"])))


def named_tensor(name: str) -> Callable[[Path], None]:
    """A tensor of this name, else like the first one, which it replaces."""

    def put(folder: Path) -> None:
        data = read(folder)
        data["matrices"] = []
        row = next(t for t in data["tensors"] if t["name"] == "model.norm")
        row["name"] = name
        data["tensors"].sort(key=lambda t: t["name"])
        commit_bytes(folder, canonical(data))

    return put


def tensor_of(**fields: object) -> Callable[[Path], None]:
    """One more tensor, of one byte of config.json."""
    row = {"name": "zz", "path": "config.json", "dtype": "U8", "shape": [1], "offset": 0, "digest": hexdigest(b"{")}
    return change(lambda m: m["tensors"].append(row | fields))


def matrix_of(**fields: object) -> Callable[[Path], None]:
    """The quantized matrix, described otherwise."""
    return change(lambda m: m["matrices"][0].update(fields))


def bad_checksum(record: bytes) -> bytes:
    good = zstandard.ZstdCompressor(write_checksum=True).compress(record)
    return good[:-1] + bytes([good[-1] ^ 1])


def full_manifest(folder: Path) -> None:
    """Canonical, with one byte more than the limit."""
    data = read(folder) | {"zz": ""}
    data["zz"] = "x" * (C.MAX_MANIFEST_BYTES + 1 - len(canonical(data)))
    commit_bytes(folder, canonical(data))


def many_experts(folder: Path) -> None:
    """One expert more than the limit; the size and the header are those that follow, only the file is short."""
    from flashpack.formats import Manifest
    from flashpack.formats.entries import Layer
    from flashpack.formats.layout import ShardLayout

    kinds = Manifest.from_bytes((folder / C.MANIFEST).read_bytes()).record_kinds
    layer = Layer(0, "model.layers.0.mlp.experts", SHARD0, ((0, C.MAX_EXPERTS + 1),))
    layout = ShardLayout(layer, kinds)
    data = read(folder)
    data["layers"] = [layer.to_json()]
    entry(data, SHARD0).update(size=layout.size)
    entry(data, SHARD0)["digests"].update(header=hexdigest(layout.header_bytes))
    commit_bytes(folder, canonical(data))


LATER = {".pyc", ".pyd", ".so", ".dylib", ".dll", ".pth", ".pt", ".bin", ".ckpt", ".pickle"}
TABLE = ("format", "shard", "expert-table")
FRAME = ("format", "read", "frame")
SIZE = ("format", "open", "")
TAIL = ("integrity", "shard", "tail-digest")
STORED: list[tuple[str, str, Callable[[Path], None], tuple[str | None, str, str]]] = [
    ("frame-larger-than-record", "empty", frame(lambda r: b"", size=0), TABLE),
    ("frames-not-filled", "too-few", tail(SHARD0, lambda t: t.__setitem__(slice(0, 4), b"\1\x40\0\0")), TABLE),
    ("frame-of-another-size", "less", frame(lambda r: zstandard.compress(r[:-1])), FRAME),
    ("frame-with-trailer", "frame", frame(lambda r: zstandard.compress(r) + zstandard.compress(b"")), FRAME),
    ("frame-with-trailer", "skippable", frame(lambda r: zstandard.compress(r) + SKIPPABLE), FRAME),
    ("not-a-frame", "skippable", frame(lambda r: SKIPPABLE + zstandard.compress(r)), FRAME),
    (
        "not-a-frame",
        "skippable-of-its-size",
        frame(lambda r: SKIPPABLE[:4] + len(r).to_bytes(4, "little") + b"x"),
        FRAME,
    ),
    ("not-a-frame", "dictionary", frame(lambda r: frame_of([(1, len(r), b"\0")], len(r), dictionary=5)), FRAME),
    ("not-a-frame", "shorter-than-stated", frame(lambda r: frame_of([(1, len(r) - 1, b"\0")], len(r))), FRAME),
    ("not-a-frame", "longer-than-stated", frame(lambda r: frame_of([(1, len(r) + 1, b"\0")], len(r))), FRAME),
    ("not-a-frame", "block-type", frame(lambda r: frame_of([(3, len(r), b"\0")], len(r))), FRAME),
    ("not-a-frame", "cut-off", frame(lambda r: zstandard.compress(r)[:-1]), FRAME),
    ("not-a-frame", "checksum", frame(bad_checksum), FRAME),
    ("content-digest", "table", tail(SHARD0, lambda t: t.__setitem__(10, t[10] ^ 1)), (None, "", "content-digest")),
    ("damaged-frame", "padding", flip(SHARD0, 2 * C.PAGE - 1), ("integrity", "read", "record-digest")),
    ("damaged-tail", "sizes", flip(SHARD0, 3 * C.PAGE), TAIL),
    ("damaged-tail", "contents", flip(SHARD0, 3 * C.PAGE + 8), TAIL),
    ("size-not-derived", "compressed", grown(SHARD0, 64), SIZE),
    ("size-not-derived", "too-small", too_small, SIZE),
]
"""Rule, variant, change, and how it is seen, of more faults in the small compressed pack."""

MORE_FAULTS: list[Fault] = [
    *fields(),
    *(Fault(rule, put, error, step, finding or None, "small-compressed", variant)
      for rule, variant, put, (error, step, finding) in STORED),
    *(Fault("executable-file", add_file(f"x{suffix}"), valid="small", variant=suffix[1:]) for suffix in sorted(LATER)),
    *(Fault(rule, put, valid="small", variant=variant) for rule, variant, put in [
        # Section 3: JSON
        ("duplicate-key", "inside", recipe(b'"experts": "q4",\n  "experts": "q4"')),
        ("fraction", "one", recipe(b'"experts": 1.0')),
        ("not-a-number", "infinity", recipe(b'"experts": -Infinity')),
        ("not-canonical", "mark", text(lambda b: b"\xef\xbb\xbf" + b)),
        ("half-surrogate", "key", recipe(b'"\\udc00": "q4"')),
        ("half-surrogate", "turned", recipe(b'"experts": "\\udc00\\ud800"')),
        ("not-canonical", "no-newline", text(lambda b: b[:-1])),
        ("not-canonical", "keys", recipe(b'"z": "q4"')),
        ("not-canonical", "keys-by-utf16", recipe(b'"minmax",\n  "\\ud83d\\ude00": 1,\n  "\\ufffd": 1', b'"minmax"')),
        ("not-canonical", "not-ascii", recipe('"experts": "\u00e9"'.encode())),
        ("not-canonical", "upper-case", recipe(b'"experts": "\\u00E9"')),
        ("not-canonical", "escape", recipe(b'"experts": "\\u0041"')),
        ("not-canonical", "slash", recipe(b'"experts": "a\\/b"')),
        ("not-canonical", "minus-zero", recipe(b'"experts": -0')),
        ("not-canonical", "empty-list", recipe(b'"experts": [\n  ]')),
        ("not-canonical", "carriage-return", text(lambda b: b.replace(b"\n", b"\r\n"))),
        ("manifest-too-large", "by-a-byte", full_manifest),
        # Section 3: types
        ("wrong-type", "list", text(lambda b: b"[]\n")),
        ("wrong-type", "version-true", change(lambda m: m.update(version=True))),
        ("wrong-type", "empty-string", change(lambda m: m["model"].update(architecture=""))),
        ("wrong-type", "long-string", change(lambda m: m["model"].update(architecture="\u00e9" * 512 + "x"))),
        ("wrong-type", "long-path", listed("/".join(["x" * 204] * 5 + ["y"]))),
        ("wrong-type", "size-2-62", change(lambda m: entry(m, "config.json").update(size=2**62))),
        ("wrong-type", "size-negative", change(lambda m: entry(m, "config.json").update(size=-1))),
        ("wrong-type", "nine-ones", nine_dimensions),
        ("wrong-type", "flat-matrix", matrix_of(shape=[64])),
        ("wrong-type", "codec", change(lambda m: m["layers"][0].update(codec=None))),
        ("wrong-type", "required-feature", change(lambda m: m.update(required_features=[["zstd"]]))),
        ("bad-digest", "short", change(lambda m: m["tensors"][0].update(digest="0" * 63))),
        ("bad-digest", "upper-case", change(lambda m: m["tensors"][0].update(digest="A" * 64))),
        ("bad-digest", "newline", change(lambda m: m["tensors"][0].update(digest="0" * 64 + "\n"))),
        ("control-character", "delete", change(lambda m: m["model"].update(architecture="a\x7f"))),
        ("control-character", "next-line", change(lambda m: m["model"].update(model_type="a\x85"))),
        # Section 3: fields
        ("bad-min-reader", "one-number", change(lambda m: m.update(min_reader="1"))),
        ("bad-min-reader", "five-numbers", change(lambda m: m.update(min_reader="1.2.3.4.5"))),
        ("bad-min-reader", "letters", change(lambda m: m.update(min_reader="1.2.0rc1"))),
        ("bad-min-reader", "ten-digits", change(lambda m: m.update(min_reader="1.0000000000"))),
        ("bad-min-reader", "other-digits", change(lambda m: m.update(min_reader="\u0661.\u0662"))),
        ("bad-min-reader", "newline", change(lambda m: m.update(min_reader="1.2\n"))),
        ("unsorted-features", "twice", change(lambda m: m.update(optional_features=["a", "a"]))),
        ("unsorted-matrices", "twice", change(lambda m: m["matrices"].extend(m["matrices"]))),
        ("missing-digest", "other", change(lambda m: entry(m, "config.json")["digests"].update(header="0" * 64))),
        # Section 3: paths
        ("parent-path", "here", add_file("./x")),
        ("parent-path", "empty", add_file("a//x")),
        ("parent-path", "end", add_file("x/")),
        ("hidden-path", "folder", add_file(".a/x")),
        ("hidden-path", "below", add_file("a/.x")),
        ("long-path-part", "bytes", listed("\u00e9" * 128)),
        ("own-name", "manifest", add_file("flashpack.json")),
        ("own-name", "digest", add_file("flashpack.json.b3")),
        ("own-name", "journal", add_file("FLASHPACK.journal")),
        ("own-name", "upper-case", add_file("a/x.PART")),
        ("path-twice", "same", written("x", "x")),
        ("path-twice", "letters", written("\u00c9", "\u00e9")),
        ("path-twice", "sigma", written("\u0391\u03a3", "\u03b1\u03c3")),
        ("path-below-file", "case", listed("CONFIG.json/x")),
        # Section 4
        ("header-digest-not-derived", "shard",
         other_header(SHARD0, b'"flashpack":"experts","layer":"0"', b'"layer":"0","flashpack":"experts"')),
        ("size-not-derived", "shard", grown(SHARD0, C.PAGE)),
        ("size-not-derived", "dense", grown(DENSE, 64)),
        # Section 5
        ("odd-projections", "down", kind(("down", [1, 1], RAW))),
        ("odd-projections", "order", kind(("up", [1, 1], RAW), ("gate", [1, 1], RAW), ("down", [1, 1], RAW))),
        ("odd-projections", "other", kind(("gate", [1, 1], RAW), ("side", [1, 1], RAW), ("down", [1, 1], RAW))),
        ("odd-projections", "none", change(lambda m: m["record_kinds"][0].update(projections=[]))),
        ("section-overlap", "order", sections(lambda s: s.reverse())),
        ("section-overlap", "one-more", sections(lambda s: s.append(s[-1]))),
        ("section-overlap", "one-less", sections(lambda s: s.pop())),
        ("section-overlap", "name", sections(lambda s: s[1].update(name="up.scale"))),
        ("section-overlap", "dtype", sections(lambda s: s[1].update(dtype="F16"))),
        ("section-overlap", "shape", sections(lambda s: s[1].update(shape=s[1]["shape"][::-1]))),
        ("record-too-large", "by-a-page",
         kind(("up", [1, 1], RAW), ("down", [1, (C.MAX_RECORD_BYTES - 64) // 2 + 1], RAW))),
        ("layer-without-shard", "copy", change(lambda m: m["layers"][0].update(path="config.json"))),
        ("kind-out-of-range", "by-one", change(lambda m: m["layers"][0]["kinds"][0].update(kind=1))),
        ("too-many-experts", "alone", many_experts),
        # Section 6
        ("affine-out-of-range", "scale", kind(*((n, [1, 32], affine(scale_dtype="U8")) for n in ("up", "down")))),
        ("affine-out-of-range", "no-bits", kind(*((n, [1, 32], affine(bits=0)) for n in ("up", "down")))),
        ("affine-out-of-range", "matrix", matrix_of(encoding=affine(bits=1))),
        ("raw-out-of-range", "bytes", kind(*((n, [1, 32], RAW | {"dtype": "U8"}) for n in ("up", "down")))),
        ("width-not-multiple", "alone", kind(*((n, [1, 48], affine()) for n in ("up", "down")))),
        # Section 7
        ("tensor-in-no-dense-file", "alone", tensor_of()),
        ("tensor-in-no-dense-file", "missing", tensor_of(path="dense-00002.safetensors")),
        ("tensor-overlap", "same", same_place),
        ("reserved-name", "", named_tensor("__pad__.1")),
        ("reserved-name", "metadata", named_tensor("__metadata__")),
        ("raw-matrix", "alone", change(lambda m: m["matrices"].append(
            {"name": "model.plain.weight", "shape": [2, 3], "encoding": RAW}))),
        ("matrix-part-missing", "weight", matrix_of(name="model.other.weight")),
        ("matrix-part-shape", "dtype", matrix_of(encoding=affine(scale_dtype="F16"))),
    ]),
    Fault("unknown-encoding", matrix_of(encoding={"name": "trellis"}), "version", valid="small", variant="matrix"),
    *(Fault(rule, put, "integrity", "open", finding, "small", variant) for rule, finding, variant, put in [
        ("manifest-digest", "manifest-digest", "missing", proof(lambda b: b"")),
        ("manifest-digest", "manifest-digest", "no-newline", proof(lambda b: b[:-1])),
        ("manifest-digest", "manifest-digest", "longer", proof(lambda b: b + b"\n")),
        ("manifest-digest", "manifest-digest", "upper-case", proof(bytes.upper)),
        ("symbolic-link", "unreadable-file", "inside", link("config.json", ".elsewhere")),
        ("symbolic-link", "unreadable-file", "nowhere", replaced("config.json", lambda p: p.symlink_to("none"))),
        ("not-a-file", "unreadable-file", "", replaced("config.json", Path.mkdir)),
        ("not-a-file", "unreadable-file", "pipe", replaced(DENSE, os.mkfifo)),
        ("missing-file", "missing-file", "copy", lambda p: (p / "config.json").unlink()),
        ("missing-file", "missing-file", "dense", lambda p: (p / DENSE).unlink()),
        ("truncated-file", "size", "shard", cut(SHARD0)),
        ("truncated-file", "size", "dense", cut(DENSE)),
        ("truncated-file", "size", "copy", cut("config.json")),
        ("truncated-file", "size", "no-tensor", lambda p: os.truncate(p / DENSE, C.PAGE + 1)),
        ("truncated-file", "size", "header", lambda p: os.truncate(p / SHARD0, 100)),
        ("manifest-digest", "manifest-digest", "link", link(C.MANIFEST_DIGEST, ".elsewhere")),
        ("longer-file", "size", "shard", lambda p: os.truncate(p / SHARD0, (p / SHARD0).stat().st_size + 1)),
        ("longer-file", "size", "copy", lambda p: os.truncate(p / "config.json", 1000)),
    ]),
    *(Fault("unlisted-file", stray(path), "format", "copies", "unlisted-file", "small", variant) for variant, path in [
        ("folder", "new/x"), ("part", "dense-00002.safetensors.part"), ("journal", "experts/flashpack.journal"),
    ]),
    Fault("unlisted-file", link_nowhere, "format", "copies", "unlisted-file", "small", "link"),
    *(Fault("no-manifest", put, "not-a-pack", valid="small", variant=variant) for variant, put in [
        ("", lambda p: (p / C.MANIFEST).unlink()),
        ("interrupted", lambda p: (p / C.MANIFEST).rename(p / C.JOURNAL)),
        ("link", link(C.MANIFEST, ".elsewhere")),
        ("folder", replaced(C.MANIFEST, Path.mkdir)),
    ]),
    Fault("damaged-header", flip(DENSE, 20), "integrity", "dense", "header-digest", "small", "dense"),
    Fault("damaged-header", flip(SHARD0, 0), "integrity", "shard", "header-digest", "small", "length"),
    Fault("damaged-tail", flip(SHARD0, -96 - 10), "integrity", "shard", "tail-digest", "small-mixed", "table"),
    Fault("table-names-record-twice", tail(SHARD0, lambda t: t.__setitem__(4, 9)), "format", "shard", "expert-table",
          "small-mixed", "row"),
    Fault("table-names-record-twice", tail(SHARD0, lambda t: t.__setitem__(0, 9)), "format", "shard", "expert-table",
          "small-mixed", "kind"),
    Fault("layer-without-shard", reframe(lambda m: m["layers"][1].update(path=SHARD0)), variant="shared"),
]  # fmt: skip
