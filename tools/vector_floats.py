"""Packs of the conformance suite with small floats, biases of experts and integer tensors: valid ones and faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from vector_edges import write_values
from vector_faults import DENSE, Fault, Json, change, entry
from vector_fields import at, other_type, without
from vector_packs import BF16, Q4, SMALL, Builder, gated, ungated

from flashpack.formats import Encoding, Projection, RecordKind
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.entries import Matrix
from flashpack.formats.records import MXFP4, affine_dq, fp8, nvfp4

F32 = Encoding("raw", "F32")
NVFP4 = {name: nvfp4(name) for name in C.GLOBAL_SCALES}
FP8 = [
    fp8("F32", (0, 0)), fp8("BF16", (1, 0)), fp8("F16", (0, 1)), fp8("E8M0", (1, 32)), fp8("F32", (16, 16)),
    fp8("BF16", (5, 7)), fp8("F16", (C.MAX_BLOCK, C.MAX_BLOCK)), fp8("E8M0", (3, 0)),
]  # fmt: skip
"""Every type of scales; one scale, rows, columns, blocks that divide 32 and 64, blocks that do not, the largest."""


def dense_of(encodings: list[Encoding], shape: tuple[int, int]) -> list[Matrix]:
    return [Matrix(f"m{i}.weight", shape, e) for i, e in enumerate(encodings)]


def mxfp4(folder: Path) -> None:
    """Experts and a dense matrix of 4-bit floats; alone and beside other encodings; compressed."""
    pack = Builder(folder, [gated(MXFP4, MXFP4, MXFP4), gated(MXFP4, Q4, BF16), ungated(MXFP4, 96, 32)])
    pack.layer(0, (0, 1), (1, 1)).layer(1, (2, 1), codec="zstd")
    pack.dense(1, SMALL, *dense_of([MXFP4], (5, 96))).commit()


def nvfp4_scales(folder: Path) -> None:
    """4-bit floats in groups of 16 without, times and divided by a scale of the matrix; gate and up in two ways."""
    none, times, by = (NVFP4[name] for name in ("none", "multiply", "divide"))
    pack = Builder(folder, [gated(none, none, none), gated(times, times, by, 48, 16), gated(by, none, times)])
    for i in range(3):
        pack.layer(i, (i, 1))
    pack.dense(1, SMALL, *dense_of(list(NVFP4.values()), (3, 48))).commit()


def fp8_blocks(folder: Path) -> None:
    """Scales of every type, for matrices, rows, columns and blocks, ragged at the end; odd sizes."""
    kinds = [gated(e, e, e) for e in FP8] + [ungated(e, 17, 13) for e in FP8]
    pack = Builder(folder, kinds)
    pack.layer(0, *((i, 1) for i in range(len(FP8)))).layer(1, *((i + len(FP8), 1) for i in range(len(FP8))))
    pack.dense(1, SMALL, *dense_of(FP8, (11, 19))).commit()


def dq_blocks(folder: Path) -> None:
    """Twice rounded integers of each width: blocks of whole rows, blocks that begin within rows; beside each other."""
    two, three, four = map(affine_dq, (2, 3, 4))
    kinds = [gated(two, two, three, 64, 256), gated(two, three, four, 32, 96), ungated(four)]
    pack = Builder(folder, kinds)
    pack.layer(0, (0, 1), (1, 1)).layer(1, (2, 1), codec="zstd")
    matrices = [Matrix(f"{name}.weight", (8, 96), e) for name, e in zip("abc", (two, three, four), strict=True)]
    pack.dense(1, SMALL, *matrices).commit()


def float_codes(folder: Path) -> None:
    """Every code of each small float: values, scales, and NaN."""
    kind = RecordKind((Projection("gate", (1, 256 * 32), MXFP4), Projection("up", (1, 256 * 16), NVFP4["none"]),
                       Projection("down", (3, 256), fp8("E8M0", (1, 0)))))  # fmt: skip
    codes, all_codes = np.arange(16, dtype=np.uint8), np.arange(256, dtype=np.uint8)
    words = np.tile(codes[::2] | codes[1::2] << 4, 256).view("<u4")
    sections = {
        "gate.weight": np.tile(words, 2), "gate.scales": all_codes, "up.weight": words, "up.scales": all_codes,
        "down.weight": np.tile(all_codes, 3), "down.scales": np.array([0, 127, 254]),
    }  # fmt: skip
    write_values(folder, kind, sections)


def float_rounding(folder: Path) -> None:
    """Scales of 24 significant bits, also negative: the scale of a group is rounded before the product."""
    kind = gated(NVFP4["multiply"], NVFP4["divide"], fp8("F32", (1, 3)), 64, 32)
    rng = np.random.default_rng(34)
    sections = {}
    for s in kind.sections:
        array = rng.integers(0, 2 ** (8 * (1 if s.dtype == "U8" else 4)), s.shape, np.uint32)
        if s.dtype == "F32":  # sign and fraction at random, magnitudes near each other
            array = array & np.uint32(0x81FFFFFF) | np.uint32(0x3C000000)
        sections[s.name] = array
    write_values(folder, kind, sections)


def biased(kind: RecordKind, *biases: str) -> RecordKind:
    """``kind`` with these types of biases, in the order of its projections."""
    pairs = zip(kind.projections, biases, strict=True)
    return RecordKind(tuple(Projection(p.name, p.shape, p.encoding, bias) for p, bias in pairs))


def expert_biases(folder: Path) -> None:
    """Biases of each type, of all projections, of some, side by side and with gaps; compressed, too."""
    kinds = [
        biased(gated(MXFP4, MXFP4, MXFP4), "BF16", "BF16", "BF16"),
        biased(gated(BF16, Q4, F32, 32, 32), "F32", "F16", ""),
        biased(ungated(F32, 5, 3), "", "F16"),
        biased(ungated(Q4, 32, 32), "F32", "BF16"),
    ]
    pack = Builder(folder, kinds)
    pack.layer(0, (0, 2)).layer(1, (1, 1), (2, 1)).layer(2, (3, 1), codec="zstd").dense(1, SMALL).commit()


def integer_tensors(folder: Path) -> None:
    """Signed integers of 4 and 8 bytes, negative ones among them; a scalar, a large one."""
    pack = Builder(folder, [ungated(BF16)]).layer(0, (0, 1))
    pack.dense(1, SMALL | {"table": ("I64", (3, 5)), "count": ("I64", ()), "index": ("I32", (16384 + 1,))}).commit()


def small_floats(folder: Path) -> None:
    """One expert with a bias, each small float, an integer tensor: small, for faults of single fields."""
    kind = RecordKind((Projection("up", (2, 32), NVFP4["multiply"], "BF16"),
                       Projection("down", (32, 2), fp8("E8M0", (0, 0)))))  # fmt: skip
    matrices = [Matrix("a.weight", (2, 32), MXFP4), Matrix("b.weight", (2, 32), NVFP4["divide"]),
                Matrix("c.weight", (3, 32), fp8("F32", (2, 0)))]  # fmt: skip
    Builder(folder, [kind]).layer(0, (0, 1)).dense(1, {"model.ids": ("I64", (2,))}, *matrices).commit()


def small_biases(folder: Path) -> None:
    """Biases of gate, up and down, integers of 4 bytes only; small."""
    kind = biased(gated(BF16, BF16, BF16, 1, 1), "F32", "F32", "F32")
    Builder(folder, [kind]).layer(0, (0, 1)).dense(1, {"model.ids": ("I32", (2,))}).commit()


FLOAT_VALID: dict[str, Callable[[Path], None]] = {
    "mxfp4": mxfp4,
    "nvfp4": nvfp4_scales,
    "fp8": fp8_blocks,
    "affine-dq": dq_blocks,
    "float-codes": float_codes,
    "float-rounding": float_rounding,
    "expert-biases": expert_biases,
    "integer-tensors": integer_tensors,
    "small-floats": small_floats,
    "small-biases": small_biases,
}

UP, DOWN = (("record_kinds", 0, "projections", i, "encoding") for i in (0, 1))


def up(**other: object) -> Callable[[Path], None]:
    """The nvfp4 encoding of ``up`` in the small pack, with other parameters."""
    return change(lambda m: at(m, UP).update(other))


def down(**other: object) -> Callable[[Path], None]:
    """The fp8 encoding of ``down``, one scale of a byte; what would be stored is the same."""
    return change(lambda m: at(m, DOWN).update(other))


def matrix(number: int, **other: object) -> Callable[[Path], None]:
    """A quantized dense matrix, described otherwise."""
    return change(lambda m: m["matrices"][number].update(other))


def bias(value: object) -> Callable[[Path], None]:
    return change(lambda m: m["record_kinds"][0]["projections"][0].update(bias=value))


def sections(edit: Callable[[list[Json]], object]) -> Callable[[Path], None]:
    return change(lambda m: edit(m["record_kinds"][0]["sections"]))


def swap_biases(rows: list[Json]) -> None:
    """``up.bias`` before ``gate.bias``, at each other's offsets."""
    rows[-3]["name"], rows[-2]["name"] = rows[-2]["name"], rows[-3]["name"]


def odd_width(encoding: Json, name: str, parts: dict[str, tuple[str, list[int]]], width: int) -> Callable[[Path], None]:
    """One more record kind, which nobody uses: its inputs are no multiple of a group, all else follows."""

    def edit(m: Json) -> None:
        rows, end = [], 0
        for p in ("up", "down"):
            for part, (dtype, shape) in parts.items():
                end = -(-end // 64) * 64
                rows.append({"name": f"{p}.{part}", "dtype": dtype, "shape": shape, "offset": end})
                end += shape[0] * shape[1] * {"U8": 1, "U32": 4}[dtype]
        projections = [{"name": p, "shape": [1, width], "encoding": encoding} for p in ("up", "down")]
        m["record_kinds"].append({"projections": projections, "sections": rows, "nbytes": end, "stride": C.PAGE})
        m["required_features"] = sorted({*m["required_features"], name})

    return change(edit)


def without_feature(name: str) -> Callable[[Path], None]:
    return change(lambda m: m["required_features"].remove(name))


def with_feature(name: str) -> Callable[[Path], None]:
    return change(lambda m: m.update(required_features=[name]))


def unnamed_part(part: str) -> Callable[[Path], None]:
    """The dense tensor ``b.PART`` under another name, in the file, too, and its header's digest as it follows."""

    def put(folder: Path) -> None:
        path = folder / DENSE
        content = bytearray(path.read_bytes())
        old, new = f'"b.{part}"'.encode(), f'"z.{part}"'.encode()
        assert content[: C.PAGE].count(old) == 1
        content[: C.PAGE] = content[: C.PAGE].replace(old, new)
        path.write_bytes(content)

        def edit(m: Json) -> None:
            next(t for t in m["tensors"] if t["name"] == f"b.{part}")["name"] = f"z.{part}"
            m["tensors"].sort(key=lambda t: t["name"])
            entry(m, DENSE)["digests"].update(header=hexdigest(content[: C.PAGE]))

        change(edit)(folder)

    return put


def fields() -> Iterator[Fault]:
    """Each parameter missing, and of another type."""
    for place, keys in ((UP, "global_scale"), (DOWN, "block scale_dtype")):
        for key in keys.split():
            variant = key.replace("_", "-") + ("-of-fp8" if place is DOWN else "")
            yield Fault("missing-field", change(without(place, key)), valid="small-floats", variant=variant)
            yield Fault("wrong-type", change(other_type(place, key)), valid="small-floats", variant=variant)


V = "version"
FLOAT_FAULTS: list[Fault] = [
    *fields(),
    *(Fault("unused-feature", without_feature(name), valid="affine-dq" if name == "affine_dq" else "small-floats",
            variant=f"unlisted-{name}".replace("_", "-"))
      for name in C.FEATURES if name != "zstd"),
    *(Fault("unused-feature", with_feature(name), valid="small", variant=name.replace("_", "-"))
      for name in C.FEATURES if name != "zstd"),
    Fault("unknown-encoding", down(name="fp8_e5m2"), V, valid="small-floats", variant="fp8-e5m2"),
    Fault("unknown-encoding", matrix(0, encoding={"name": "MXFP4"}), V, valid="small-floats", variant="upper-case"),
    *(Fault(rule, put, valid="small-floats", variant=variant) for rule, variant, put in [
        # Section 3
        ("wrong-type", "block-of-three", down(block=[0, 0, 0])),
        ("wrong-type", "block-of-one", down(block=[0])),
        ("wrong-type", "block-negative", down(block=[-1, 0])),
        ("wrong-type", "block-false", down(block=[False, 0])),
        ("wrong-type", "block-2-62", down(block=[0, 2**62])),
        # Section 5
        ("wrong-type", "bias", bias(None)),
        ("wrong-type", "bias-true", bias(True)),
        ("bias-out-of-range", "", bias("U8")),
        ("bias-out-of-range", "none", bias("none")),
        ("section-overlap", "bias-of-another-type", bias("F16")),
        ("section-overlap", "no-bias", sections(lambda rows: rows.pop())),
        # Section 6
        ("nvfp4-out-of-range", "", up(global_scale="add")),
        ("nvfp4-out-of-range", "upper-case", up(global_scale="Multiply")),
        ("nvfp4-out-of-range", "matrix", matrix(1, encoding={"name": "nvfp4", "global_scale": "inverse"})),
        ("fp8-out-of-range", "", down(scale_dtype="U8")),
        ("fp8-out-of-range", "e5m2", down(scale_dtype="E5M2")),
        ("fp8-out-of-range", "rows", down(block=[C.MAX_BLOCK + 1, 0])),
        ("fp8-out-of-range", "columns", down(block=[0, C.MAX_BLOCK + 1])),
        ("width-not-multiple", "mxfp4", odd_width(
            {"name": "mxfp4"}, "mxfp4", {"weight": ("U32", [1, 6]), "scales": ("U8", [1, 1])}, 48)),
        ("width-not-multiple", "nvfp4", odd_width({"name": "nvfp4", "global_scale": "none"}, "nvfp4",
                                                  {"weight": ("U32", [1, 3]), "scales": ("U8", [1, 1])}, 24)),
        ("width-not-multiple", "affine-dq", odd_width(affine_dq(2).to_json(), "affine_dq",
                                                      {"weight": ("U32", [1, 3]), "scales": ("U8", [1, 1])}, 48)),
        ("values-not-in-blocks", "", odd_width(affine_dq(2).to_json(), "affine_dq",
                                               {"weight": ("U32", [1, 6]), "scales": ("U8", [1, 3])}, 96)),
        # Section 7
        ("unknown-dtype", "f64", change(lambda m: m["tensors"][-1].update(dtype="F64"))),
        ("unknown-dtype", "i16", change(lambda m: m["tensors"][-1].update(dtype="I16", shape=[8]))),
        ("matrix-part-missing", "scales", unnamed_part("scales")),
        ("matrix-part-missing", "global", unnamed_part("global")),
        ("matrix-part-shape", "fp8-rows", matrix(2, encoding=fp8("F32", (1, 0)).to_json())),
        ("matrix-part-shape", "fp8-columns", matrix(2, encoding=fp8("F32", (2, 31)).to_json())),
        ("matrix-part-shape", "fp8-scales", matrix(2, encoding=fp8("BF16", (2, 0)).to_json())),
    ]),
    *(Fault(rule, put, valid="affine-dq", variant=variant) for rule, variant, put in [
        ("dq-out-of-range", "", matrix(0, encoding=affine_dq(2).to_json() | {"bits": 5})),
        ("dq-out-of-range", "group", matrix(0, encoding=affine_dq(2).to_json() | {"group_size": 64})),
        ("dq-out-of-range", "scale", matrix(0, encoding=affine_dq(2).to_json() | {"scale_dtype": "F16"})),
        ("matrix-part-missing", "blocks", unnamed_part("blocks")),
    ]),
    *(Fault("section-overlap", sections(edit), valid="small-biases", variant=variant) for variant, edit in [
        ("biases-swapped", swap_biases),
        ("bias-shape", lambda rows: rows[-1].update(shape=[1, 1])),
    ]),
]  # fmt: skip
