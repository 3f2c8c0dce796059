"""The rules of SPEC.md about the manifest of a flashpack pack, and what follows from it; read_pack.py reads with them.

All of this is a function of the manifest's bytes: no file is opened here. "Section 3" is a section of SPEC.md.
"""

import json
import re
from collections.abc import Iterable
from math import prod
from typing import Any, NoReturn

from pack_encodings import FEATURES, FLOATS, PARTS, SIZES, PackError, need, stored_parts

PAGE = 16384
DIGESTS = {"experts": ["header", "tail"], "dense": ["header"], "copy": ["file"]}
OWN_NAMES = ("flashpack.json", "flashpack.json.b3", "flashpack.journal")
FORBIDDEN = (".part", ".py", ".pyc", ".pyd", ".so", ".dylib", ".dll", ".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle")

TYPES: dict[str, Any] = {
    "integer": lambda v: type(v) is int and 0 <= v < 2**62,  # `type`, because True is an instance of int
    "string": lambda v: isinstance(v, str) and 1 <= len(v.encode()) <= 1024 and not re.search(r"[\0-\x1f\x7f-\x9f]", v),
    "shape": lambda v: isinstance(v, list) and len(v) <= 8 and all(TYPES["integer"](n) and n > 0 for n in v),
    "digest": lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) is not None,
}
# The tables of sections 3, 5 and 7. FIRST is the same in all versions.
FIRST: Any = {"format": "string", "version": "integer", "min_reader": "string", "required_features": ["string"]}
MATRIX = {"name": "string", "shape": "shape", "encoding": {"name": "string"}}
SECTION = {"name": "string", "dtype": "string", "shape": "shape", "offset": "integer"}
REST = {
    "optional_features": ["string"],
    "model": dict.fromkeys(("architecture", "model_type", "name_schema", "transformers"), "string"),
    "recipe": {},
    "record_kinds": [{"projections": [MATRIX], "sections": [SECTION], "nbytes": "integer", "stride": "integer"}],
    "layers": [
        {"index": "integer", "module": "string", "path": "string", "kinds": [{"kind": "integer", "count": "integer"}]}
    ],
    "matrices": [MATRIX],
    "tensors": [SECTION | {"path": "string", "digest": "digest"}],
    "files": [{"path": "string", "role": "string", "size": "integer", "digests": {}}],
}


def up(size: int, multiple: int = PAGE) -> int:
    return -(-size // multiple) * multiple


def nbytes(dtype: str, shape: list[int]) -> int:
    return prod(shape) * SIZES[dtype]


def check(value: Any, kind: Any, where: str) -> None:
    """Refuse a missing field or another type; fields that `kind` does not name are ignored."""
    good = TYPES[kind](value) if isinstance(kind, str) else isinstance(value, type(kind))
    need(good, f"{where} is missing or of another type")
    for key, inner in kind.items() if isinstance(kind, dict) else ():
        check(value.get(key), inner, f"{where}.{key}")
    for item in value if isinstance(kind, list) else ():
        check(item, kind[0], f"an element of {where}")


def parse(raw: bytes) -> Any:
    """Canonical JSON. Written again, it must be the same bytes: a key that stood twice would stand there once."""

    def refuse(number: str) -> NoReturn:
        raise ValueError(f"{number:.20} is no integer")

    try:
        data = json.loads(raw.decode(), parse_float=refuse, parse_constant=refuse)
        need(json.dumps(data, sort_keys=True, indent=1).encode() + b"\n" == raw, "the manifest is not canonical")
        json.dumps(data, ensure_ascii=False).encode()  # fails on half of a surrogate pair, in whatever field
    except (ValueError, RecursionError) as error:
        raise PackError("format", f"the manifest is not the JSON of section 3: {error!s:.80}") from None
    return data


def derive(metadata: dict[str, str], tensors: Iterable[Any], aligned: bool) -> tuple[bytes, dict[str, int], int]:
    """Section 4: the header of the file with these tensors; where each one (and each pad) starts; the file's size."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in tensors:
        gap = -end % (PAGE if nbytes(dtype, shape) >= 65536 else 64) if aligned else 0
        pad = [(f"__pad__.{len(entries)}", "U8", [gap])] if gap else []
        for key, kind, dims in [*pad, (name, dtype, shape)]:
            need(key not in entries, f"a tensor may not be called {key}")
            begin, end = end, end + nbytes(kind, dims)
            entries[key] = {"dtype": kind, "shape": dims, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    start = up(8 + len(text))
    need(start <= 100_000_000, "a header is too large")
    starts = {key: start + e["data_offsets"][0] for key, e in entries.items() if key != "__metadata__"}
    return (start - 8).to_bytes(8, "little") + text.ljust(start - 8), starts, start + end


def check_kind(kind: Any) -> None:
    """Section 5: the sections of a record follow from its projections."""
    names = [p["name"] for p in kind["projections"]]
    need(names in (["gate", "up", "down"], ["up", "down"]), f"odd projections: {names}")
    stored = {p["name"]: stored_parts(p["encoding"], p["shape"]) for p in kind["projections"]}
    for p in kind["projections"]:
        need(p.get("bias", "F32") in FLOATS, f"odd bias: {p}")
        stored[p["name"]] |= {"bias": (p["bias"], p["shape"][:1])} if "bias" in p else {}
    order = [(name, part) for part in PARTS for name in names[:-1]] + [("down", part) for part in PARTS]
    order += [(name, "bias") for name in names]
    expected, end = [], 0
    for name, part in order:
        if part in stored[name]:
            dtype, shape = stored[name][part]
            expected.append((f"{name}.{part}", dtype, shape, up(end, 64)))
            end = up(end, 64) + nbytes(dtype, shape)
    given = [(s["name"], s["dtype"], s["shape"], s["offset"]) for s in kind["sections"]]
    need(given == expected, "the sections do not follow from the projections")
    need(kind["nbytes"] == end and kind["stride"] == up(end) <= 4294950912, "odd size of a record")


def check_files(files: list[Any]) -> None:
    folded = {"".join(map(str.lower, file["path"])) for file in files}  # one by one: a word's last sigma is another
    need(len(folded) == len(files), "a path stands twice")
    for file in files:
        path, low = file["path"], "".join(map(str.lower, file["path"]))
        good = all(part and part[0] != "." and len(part.encode()) <= 255 for part in path.split("/"))
        need(good and not {"\\", ":"} & set(path), f"not a path inside the pack: {path}")
        need(low not in OWN_NAMES and not low.endswith(FORBIDDEN), f"a name that a pack must not list: {path}")
        need(not {low[: slash.start()] for slash in re.finditer("/", low)} & folded, f"{path} lies below a file")
        need(sorted(file["digests"]) == DIGESTS.get(file["role"]), f"unknown role, or odd digests: {path}")
        check(file["digests"], dict.fromkeys(file["digests"], "digest"), path)


def check_layers(m: Any) -> None:
    indices, modules, paths = ([layer[key] for layer in m["layers"]] for key in ("index", "module", "path"))
    need(len(set(indices)) == len(set(modules)) == len(indices) <= 65536, "a layer or module stands twice")
    shards = [file["path"] for file in m["files"] if file["role"] == "experts"]
    need(sorted(paths) == shards and max(indices, default=0) < 65536, "odd index, or layers and shards differ")
    codecs = [layer.get("codec", "raw") for layer in m["layers"]]
    check(codecs, ["string"], "codec")
    need(set(codecs) <= {"raw", "zstd"}, f"an unknown codec: {set(codecs)}", "version")
    for layer in m["layers"]:
        kinds, counts = [k["kind"] for k in layer["kinds"]], [k["count"] for k in layer["kinds"]]
        need(len(kinds) == len(set(kinds)) and max(kinds, default=256) < len(m["record_kinds"]), "odd kinds of a layer")
        need(min(counts) >= 1 and sum(counts) <= 65536, "a kind without records, or too many experts")


def check_dense(m: Any) -> None:
    paths = {file["path"] for file in m["files"] if file["role"] == "dense"}
    stored = {}
    for tensor in m["tensors"]:
        need(tensor["path"] in paths and tensor["dtype"] in SIZES, f"in no dense file, or unknown dtype: {tensor}")
        need(not tensor["name"].startswith("__pad__"), "a tensor with the name of a pad")
        stored[tensor["name"]] = tensor["dtype"], tensor["shape"]
    for matrix in m["matrices"]:
        name = matrix["name"]
        need(name.endswith(".weight") and matrix["encoding"]["name"] != "raw", f"odd matrix: {name}")
        for part, wanted in stored_parts(matrix["encoding"], matrix["shape"]).items():
            need(stored.get(name.removesuffix("weight") + part) == wanted, f"{part} of {name} is missing or odd")


def features(m: Any) -> set[str]:
    """Section 10: what a reader of this manifest has to know."""
    projections = [p for kind in m["record_kinds"] for p in kind["projections"]]
    used = {p["encoding"]["name"] for p in projections + m["matrices"]} & set(FEATURES)
    used |= {"zstd"} if any(layer.get("codec") == "zstd" for layer in m["layers"]) else set()
    used |= {"expert_bias"} if any("bias" in p for p in projections) else set()
    return used | ({"int_tensors"} if any(t["dtype"] in ("I32", "I64") for t in m["tensors"]) else set())


def read_manifest(raw: bytes) -> Any:
    """The manifest in these bytes, if it keeps all rules."""
    m = parse(raw)
    check(m, FIRST, "the manifest")  # first, so that a newer pack is refused as newer and not for what it changes
    need(m["format"] == "flashpack" and m["version"] >= 1, "another format")
    need(re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}){1,3}", m["min_reader"]) is not None, "odd min_reader")
    known = {"zstd", "expert_bias", "int_tensors", *FEATURES}
    newer = [f"version {m['version']}"] * (m["version"] > 1) + [f for f in m["required_features"] if f not in known]
    need(not newer, f"{newer} needs flashpack {m['min_reader']}", "version")
    check(m, REST, "the manifest")
    need(m["model"]["name_schema"] == "transformers-5", "unknown name_schema", "version")
    need(len(m["record_kinds"]) <= 256, "too many record kinds")
    for key, by in (("files", "path"), ("matrices", "name"), ("tensors", "name"), ("optional_features", None)):
        keys = [item[by] if by else item for item in m[key]]
        need(keys == sorted(set(keys)), f"{key} are not sorted, or one stands twice")
    for kind in m["record_kinds"]:
        check_kind(kind)
    check_files(m["files"])
    check_layers(m)
    check_dense(m)
    need(m["required_features"] == sorted(features(m)), "required_features are not exactly those in use")
    return m
