"""SPEC.md and the code must say the same: every table with a constant is compared."""

from __future__ import annotations

import ast
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import flashpack
from flashpack import errors
from flashpack.errors import FormatError
from flashpack.formats import Encoding, Manifest, Pack, Projection, RecordKind, affine, codecs, fields
from flashpack.formats import constants as C
from flashpack.formats.dtypes import ITEMSIZE, NUMPY
from flashpack.formats.encodings import decode
from flashpack.formats.entries import ROLES, Layer, Matrix
from flashpack.formats.floats import E2M1, E4M3, E8M0
from flashpack.formats.layout import ShardLayout
from flashpack.formats.manifest import canonical
from flashpack.formats.records import MXFP4, PARTS, affine_dq, fp8, nvfp4
from tests.conftest import ROOT, PackOf, extract, source_of

TEXT = (ROOT / "SPEC.md").read_text()
SECTIONS = {int(m[1]): m[2] for m in re.finditer(r"^## (\d+)\. .*?\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)}


def tables(section: int) -> list[list[list[str]]]:
    """The tables of a section: rows of cells, without code marks and rule names, the heading row first."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", SECTIONS[section], re.MULTILINE):
        lines = [re.sub(r" ?`\[[a-z0-9-]+\]`", "", line) for line in block.splitlines()]
        rows = [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]
        found.append([rows[0], *rows[2:]])
    return found


def test_limits() -> None:
    limits = dict(tables(10)[1][1:])
    assert {k: int(v.split()[0]) for k, v in limits.items()} == {
        "header of a safetensors file": C.MAX_HEADER_BYTES,
        "manifest": C.MAX_MANIFEST_BYTES,
        "stride of a record": C.MAX_RECORD_BYTES,
        "MoE layers": C.MAX_LAYERS,
        "experts in a layer": C.MAX_EXPERTS,
        "record kinds": C.MAX_KINDS,
    }


def test_error_codes_and_exit_codes() -> None:
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.FlashpackError)]
    expected = {e.code: e.exit_code for e in kinds if e is not errors.FlashpackError}
    assert {row[0]: int(row[2]) for row in tables(11)[0][1:]} == expected


def test_finding_codes_are_those_the_checkers_use() -> None:
    used = set()
    for path in (ROOT / "flashpack").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "Finding":
                used.add(tuple(ast.unparse(a).strip("'") for a in (node.args[0], node.args[2])))
            elif isinstance(called, ast.Attribute) and called.attr == "finding":
                used.add(tuple(ast.unparse(a).strip("'") for a in node.args[:2]))
    used.discard(("code", "section"))  # the one that passes on what it is given
    listed = {(row[0], row[1]) for row in tables(8)[1][1:]}
    assert listed == used


def test_dtypes() -> None:
    listed = {row[0]: int(row[1]) for row in tables(4)[0][1:]}
    assert listed == {name: ITEMSIZE[name] for name in listed}
    assert tuple(listed) == C.TENSOR_DTYPES


def test_parameters_of_the_affine_encoding() -> None:
    parameters = {row[0]: row[1].split(", ") for row in tables(6)[1][1:]}
    assert tuple(map(int, parameters["bits"])) == C.AFFINE_BITS
    assert tuple(map(int, parameters["group_size"])) == C.GROUP_SIZES
    assert tuple(parameters["scale_dtype"]) == C.SCALE_DTYPES
    encoding = Encoding("affine", "F16", 3, 32)
    assert tables(6)[2][1:] == [
        ["weight", "U32", "[O, I * b / 32]"], ["scales", "D", "[O, I / g]"], ["biases", "D", "[O, I / g]"],
    ]  # fmt: skip
    assert list(encoding.parts((8, 64))) == [row[0] for row in tables(6)[2][1:]]
    assert encoding.parts((8, 64)) == {"weight": ("U32", (8, 6)), "scales": ("F16", (8, 2)), "biases": ("F16", (8, 2))}
    assert json.dumps(encoding.to_json()) == json.dumps(
        {"name": "affine", "bits": 3, "group_size": 32, "scale_dtype": "F16"}
    )


def test_small_float_encodings() -> None:
    names, _, _, _, types, mx, nv, scales, parameters, fp, _, dq_parameters, dq = tables(6)[:13]
    encodings = {
        "mxfp4": MXFP4, "nvfp4": nvfp4("divide"), "fp8_e4m3": fp8("F16", (2, 3)), "affine_dq": affine_dq(3)
    }  # fmt: skip
    assert [row[0] for row in names[1:]] == ["raw", "affine", *encodings]
    assert {row[0]: row[2] for row in names[1:]} == {"raw": "", "affine": ""} | {name: name for name in encodings}
    assert encodings.keys() <= C.FEATURES.keys()
    assert [row[0] for row in types[1:]] == ["E2M1", "E4M3", "E8M0"]
    assert [2 ** sum(map(int, row[1].split(", "))) for row in types[1:]] == [len(E2M1), len(E4M3), len(E8M0)]
    assert f"groups of {C.MXFP4_GROUP}." in SECTIONS[6]
    assert f"groups of {C.NVFP4_GROUP}." in SECTIONS[6]
    assert tuple(row[0] for row in scales[1:]) == C.GLOBAL_SCALES
    assert dict(parameters[1:]) == {
        "block": f"two integers from 0 to {C.MAX_BLOCK}",
        "scale_dtype": ", ".join(C.FP8_SCALE_DTYPES),
    }
    assert dict(dq_parameters[1:]) == {
        "bits": ", ".join(map(str, C.DQ_BITS)), "group_size": str(C.DQ_GROUP), "scale_dtype": C.DQ_DTYPE
    }  # fmt: skip
    rows, width = 8, 96
    for encoding, table in zip(encodings.values(), (mx, nv, fp, dq), strict=True):
        stated = {}
        for part, dtype, shape in table[1:]:
            text = shape.split("]")[0].strip("[").replace("O", str(rows)).replace("I", str(width))
            text = text.replace("r", str(encoding.block[0])).replace("c", str(encoding.block[1]))
            text = text.replace("b", str(encoding.bits))
            quotients = [[math.prod(map(int, n.split(" * "))) for n in size.split(" / ")] for size in text.split(", ")]
            stated[part] = (dtype.replace("D, or U8 if D is E8M0", encoding.dtype),
                            tuple(-(-q[0] // (q[1] if len(q) > 1 else 1)) for q in quotients))  # fmt: skip
        assert encoding.parts((rows, width)) == stated
        assert Encoding.from_json(encoding.to_json()) == encoding
        assert encoding.part_names == tuple(stated)


def test_hexadecimal_examples() -> None:
    examples = tables(6)[3][1:]
    assert [int(row[0]) for row in examples] == list(C.AFFINE_BITS)
    formula = re.search(r"the (\d+) values q\[i\] = \(i \* (\d+) \+ (\d+)\) mod 2\^b", SECTIONS[6])
    assert formula
    count, factor, first = map(int, formula.groups())
    for bits, text in ((int(b), text) for b, text in examples):
        codes = ((np.arange(count) * factor + first) % 2**bits).astype(np.uint8)
        assert affine.pack_bits(codes, bits).tobytes().hex() == text


def test_examples_of_small_floats() -> None:
    examples = tables(6)[10][1:]
    assert {json.loads(row[0])["name"] for row in examples} == {"mxfp4", "nvfp4", "fp8_e4m3"}
    for number, (name, *stored, values) in enumerate(examples, 1):
        encoding = Encoding.from_json(json.loads(name))
        expected = [float(v) for v in values.removesuffix(", and these again").split(", ")]
        expected *= 1 + values.endswith("again")
        shape = (2, 3) if number == len(examples) else (1, len(expected))
        parts = {}
        for (part, (dtype, dims)), text in zip(encoding.parts(shape).items(), filter(None, stored), strict=True):
            parts[part] = np.frombuffer(bytes.fromhex(text), NUMPY[dtype]).reshape(dims)
        assert repr(decode(encoding, parts, shape).ravel().tolist()) == repr(expected)  # -0.0 is not 0.0


def test_names_of_files(pack_of: PackOf) -> None:
    rows = [row[0] for row in tables(2)[0][1:]]
    shard, dense = f"{C.EXPERTS_FOLDER}/layer-NNNN.safetensors", "dense-NNNNN.safetensors"
    others = ["config.json, tokenizer.json, ...", f"{C.JOURNAL}, *{C.PARTIAL_SUFFIX}"]
    assert rows == [C.MANIFEST, C.MANIFEST_DIGEST, shard, dense, *others]
    for name, role in ((shard, "experts"), (dense, "dense")):
        paths = [f.path for f in Pack(pack_of("qwen3_moe")).manifest.files if f.role == role]
        assert paths
        assert all(re.fullmatch(re.sub("N+", lambda m: rf"\d{{{len(m[0])}}}", name), path) for path in paths)


def test_what_covers_each_byte() -> None:
    """The regions of section 8, and the digests that files of each role have."""
    rows = tables(8)[0][1:]
    assert [row[0].split(":")[0] for row in rows] == (
        ["manifest", C.MANIFEST_DIGEST, *["shard"] * 3, *["dense file"] * 3, "copied file"]
    )
    for role, subject in (("experts", "shard"), ("dense", "dense file"), ("copy", "copied file")):
        named = {d for row in rows if row[0].startswith(subject) for d in re.findall(r"digests\.(\w+)", row[1])}
        assert named == ROLES[role]


def test_names_of_tensors_and_pages() -> None:
    plain, compressed = ([row[0] for row in table[1:]] for table in tables(5)[2:])
    assert plain == [C.RECORDS_TENSOR.format(kind="K"), C.TABLE_TENSOR, C.DIGESTS_TENSOR]
    kind = RecordKind(tuple(Projection(n, (8, 64), Encoding("raw", "F32")) for n in ("up", "down")))
    specs = ShardLayout(Layer(0, "m", "p", ((0, 5), (1, 2))), (kind, kind)).specs
    assert [row[1] for row in tables(5)[2][1:]] == [
        "U8 [count, stride of kind K]", "U32 [experts, 2]", "U8 [experts, 32]",
    ]  # fmt: skip
    assert [(s.name, s.dtype, s.shape) for s in specs] == [
        ("records.0", "U8", (5, kind.stride)),
        ("records.1", "U8", (2, kind.stride)),
        ("table", "U32", (7, 2)),
        ("digests", "U8", (7, 32)),
    ]
    specs = ShardLayout(Layer(0, "m", "p", ((0, 1), (1, 1)), "zstd"), (kind, kind), C.PAGE).specs
    assert compressed == [s.name for s in specs]
    types = ["U8 [F]", "U32 [experts, 2]", "U32 [experts]", "U8 [experts, 32]", "U8 [experts, 32]"]
    assert [row[1] for row in tables(5)[3][1:]] == types
    assert [(s.dtype, s.shape[1:]) for s in specs] == [
        ("U8", ()), ("U32", (2,)), ("U32", ()), ("U8", (32,)), ("U8", (32,)),
    ]  # fmt: skip
    assert f"`{C.PAD_PREFIX}N`" in SECTIONS[4]
    assert f"**page**: {C.PAGE} bytes" in SECTIONS[1]
    assert f"rounded up to a multiple of {C.SECTION_ALIGNMENT}." in SECTIONS[5]
    assert f"BLAKE3 with {C.DIGEST_BYTES} bytes" in SECTIONS[1]
    assert f'"{C.NAME_SCHEMA}"' in SECTIONS[3]


def test_order_of_sections_in_a_record() -> None:
    encoding = Encoding("affine", "BF16", 4, 64)
    kind = RecordKind(tuple(Projection(n, (8, 64), encoding) for n in ("gate", "up", "down")))
    parts = ("weight", "scales", "biases")
    expected = [f"{p}.{part}" for part in parts for p in ("gate", "up")] + [f"down.{part}" for part in parts]
    assert [s.name for s in kind.sections] == expected
    assert all(s.offset % C.SECTION_ALIGNMENT == 0 for s in kind.sections)
    kind = RecordKind(tuple(Projection(n, (8, 64), nvfp4("divide"), "F16") for n in ("gate", "up", "down")))
    stated = re.search(r"for each part of (.*?): that part.*?after them `gate", SECTIONS[5], re.DOTALL)
    assert stated
    assert ", ".join(f"`{part}`" for part in PARTS) == stated[1]
    expected = [f"{p}.{part}" for part in ("weight", "scales", "global") for p in ("gate", "up")]
    expected += ["down.weight", "down.scales", "down.global", "gate.bias", "up.bias", "down.bias"]
    assert [s.name for s in kind.sections] == expected
    assert [(s.dtype, s.shape) for s in kind.sections[-3:]] == [("F16", (8,))] * 3


def test_fields_of_the_manifest(pack_of: PackOf) -> None:
    data = json.loads((pack_of("trained") / C.MANIFEST).read_bytes())
    top, model, files = tables(3)
    assert {row[0] for row in top[1:]} == set(data)
    assert {row[0] for row in model[1:]} == set(data["model"])
    assert {row[0] for row in files[1:]} == set(data["files"][0])
    for role, digests in ROLES.items():
        assert re.search(rf"`{role}`: " + ", ".join(f"`{d}`" for d in sorted(digests)), SECTIONS[3])
    kind, layers = tables(5)[:2]
    first = data["record_kinds"][0]
    assert {row[0] for row in kind[1:] if "[" not in row[0]} == set(first)
    projection = {row[0].split(".")[1] for row in kind[1:] if "[" in row[0]}
    assert projection == {*first["projections"][0], "bias"}  # one without a bias does not say so
    types = next(row[2] for row in kind[1:] if row[0].endswith(".bias"))
    assert tuple(re.findall(r"F32|F16|BF16", types)) == C.BIAS_DTYPES
    named = next(row[2] for row in kind[1:] if row[0] == "sections").split(" of each section")[0]
    assert set(named.split(", ")) == set(first["sections"][0])
    named = next(row[2] for row in layers[1:] if row[0] == "kinds")
    assert all(re.search(rf"\b{field} \(", named) for field in data["layers"][0]["kinds"][0])
    assert {row[0] for row in layers[1:]} == {*data["layers"][0], "codec"}  # a plain layer does not say so
    listed = {name for row in tables(7)[0][1:] for name in row[0].split(", ")}
    assert listed == set(data["tensors"][0])
    sentence = re.search(r"`matrices` lists .*? quantized: (.*?)\. `x\.weight`", SECTIONS[7], re.DOTALL)
    assert sentence
    matrix = Matrix("x.weight", (1, 32), Encoding("affine", "F16", 3, 32)).to_json()
    assert set(re.findall(r"`(\w+)`(?= [(\[])|`(\w+)`$", sentence[1])) >= {(field, "") for field in matrix}
    assert canonical({"b": [1], "a": "é"}) == b'{\n "a": "\\u00e9",\n "b": [\n  1\n ]\n}\n'


def test_names_that_a_pack_does_not_hold() -> None:
    sentence = re.search(r"in any case, in (.*?) `\[executable", SECTIONS[2].replace("\n", " "))
    assert sentence
    assert tuple(re.findall(r"`(\.\w+)`", sentence[1])) == C.REFUSED_SUFFIXES
    own = re.search(r"MUST NOT be, as a whole, one of (.*?), in any\s+case", SECTIONS[3], re.DOTALL)
    assert own
    assert set(re.findall(r"`([^`]+)`", own[1])) == {C.MANIFEST, C.MANIFEST_DIGEST, C.JOURNAL, C.PARTIAL_SUFFIX}


def test_features_codecs_and_numbers_in_the_text() -> None:
    assert {row[0]: row[1] for row in tables(10)[0][1:]} == C.FEATURES
    assert {*C.CODECS} - {"raw"} <= C.FEATURES.keys()
    assert TEXT.startswith(f"# The flashpack pack format, version {C.VERSION}\n")
    assert f"as {2 * C.DIGEST_BYTES} lower-case hexadecimal" in SECTIONS[1]
    assert f"digest, {2 * C.DIGEST_BYTES} hexadecimal" in SECTIONS[2]
    assert f"is\n{2 * C.DIGEST_BYTES} lower-case hexadecimal" in SECTIONS[3]
    assert f"1 to {C.MAX_NAME_BYTES} bytes" in SECTIONS[3]
    assert f"at most {C.MAX_KINDS} `[too-many-kinds]`" in SECTIONS[3]
    assert f"section 5; at most {C.MAX_LAYERS} |" in SECTIONS[3]
    assert f"below {C.MAX_LAYERS} `[layer-index-too-large]`" in SECTIONS[5]
    assert f"at most {C.MAX_EXPERTS} experts in all `[too-many-experts]`" in SECTIONS[5]
    assert f"at the next multiple of {C.SECTION_ALIGNMENT}, so" in SECTIONS[7]
    assert f"at most {C.MAX_DIMENSIONS} integers" in SECTIONS[3]
    assert C.MAX_INTEGER == 2**62
    assert "from 0 to 2^62 - 1" in SECTIONS[3]
    assert f"those of {C.PAGE_ALIGNED_FROM} bytes and more" in SECTIONS[7]
    stride = dict(tables(5)[0][1:][i][::2] for i in range(len(tables(5)[0]) - 1))["stride"]
    assert stride.endswith(f"at most {C.MAX_RECORD_BYTES}")


def test_what_strings_and_paths_may_hold() -> None:
    ranges = re.search(r"\(U\+(\w+) to U\+(\w+), U\+(\w+) to U\+(\w+)\)", SECTIONS[3])
    assert ranges
    a, b, c, d = (int(digits, 16) for digits in ranges.groups())
    refused = set()
    for code in range(0x400):
        try:
            fields.text({"k": f"x{chr(code)}"}, "k")
        except FormatError:
            refused.add(code)
    assert refused == {*range(a, b + 1), *range(c, d + 1)}
    longest = re.search(r"no part has more than (\d+) bytes", SECTIONS[3])
    assert longest
    assert fields.path({"p": "x" * int(longest[1])}, "p")
    with pytest.raises(FormatError):
        fields.path({"p": "x" * (int(longest[1]) + 1)}, "p")


def test_the_order_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names appear and vanish in the order of the list."""
    steps = re.findall(r"^\d\. (.*)", SECTIONS[9], re.MULTILINE)
    begins = ("the journal", "each shard", "the copied", f"`{C.MANIFEST_DIGEST}`", f"`{C.MANIFEST}`", "removal")
    assert len(steps) == len(begins)
    assert all(step.startswith(begin) for step, begin in zip(steps, begins, strict=True))
    out = tmp_path / "out"
    happened: list[int] = []
    really_replace, really_unlink = os.replace, os.unlink

    def step(name: str) -> int:
        order = {C.MANIFEST_DIGEST: 4, C.MANIFEST: 5}
        return order.get(name, 2 if name.endswith(".safetensors") else 3)

    def replacing(source: Path, target: Path) -> None:
        assert source.name == target.name + C.PARTIAL_SUFFIX
        assert (out / C.JOURNAL).exists()
        happened.append(step(target.name))
        really_replace(source, target)

    def unlinking(path: Path, *, dir_fd: int | None = None) -> None:
        if Path(path).name == C.JOURNAL:
            happened.append(6)
        really_unlink(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(os, "unlink", unlinking)
    flashpack.convert(source_of("qwen3_moe"), out)
    assert happened == sorted(happened)
    assert set(happened) == {2, 3, 4, 5, 6}


def test_a_record_is_compressed_only_where_a_page_is_saved() -> None:
    assert "keeps a record uncompressed where a frame would not save a page" in SECTIONS[5]
    one, two = memoryview(bytes(C.PAGE)), memoryview(bytes(2 * C.PAGE))
    assert codecs.compress(one) is one
    assert len(codecs.compress(two)) < C.PAGE


def test_min_reader_is_the_newest_that_a_feature_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(ROOT / "tests/vectors/valid/small-compressed.tar.gz", tmp_path)
    manifest = Manifest.from_bytes((tmp_path / C.MANIFEST).read_bytes())
    monkeypatch.setattr(C, "FIRST_READER", "0.9.0")
    monkeypatch.setattr(C, "FEATURES", {"zstd": "0.10.0"})
    assert json.loads(manifest.to_bytes())["min_reader"] == "0.10.0"
    plain = replace(manifest, layers=(), files=())
    assert json.loads(plain.to_bytes())["min_reader"] == "0.9.0"


def test_metadata_of_shards(pack_of: PackOf) -> None:
    pack = Pack(pack_of("qwen3_moe"))
    layer = pack.manifest.layers[1]
    found = pack.manifest.shard_layout(layer).built[1].metadata
    assert found == {"flashpack": "experts", "layer": "1", "module": "model.layers.1.mlp.experts"}
    assert '{"flashpack": "experts", "layer": "<index>"' in SECTIONS[5]
    path = "dense-00001.safetensors"
    assert pack.manifest.dense_layout(path)[1].metadata == {"flashpack": "dense"}
    assert '`__metadata__` is `{"flashpack": "dense"}`' in SECTIONS[7]
