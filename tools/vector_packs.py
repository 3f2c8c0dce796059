"""The valid packs of the conformance suite: together they use every encoding and feature of SPEC.md."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flashpack.formats import Encoding, Manifest, Projection, RecordKind
from flashpack.formats import constants as C
from flashpack.formats.dtypes import ITEMSIZE
from flashpack.formats.entries import FileEntry, Layer, Matrix, TensorEntry
from flashpack.formats.layout import dense_spec
from flashpack.formats.manifest import canonical
from flashpack.formats.writer import DenseWriter, RecordBuffer, ShardWriter, commit, commit_bytes, write_copy

MODEL = {"architecture": "TinyForCausalLM", "model_type": "tiny", "name_schema": C.NAME_SCHEMA, "transformers": "5.0.0"}
RECIPE = {"experts": "q4", "quantizer": "minmax"}
Q4 = Encoding("affine", "BF16", 4, 32)
BF16 = Encoding("raw", "BF16")
Shape = tuple[int, int]


def gated(gate: Encoding, up: Encoding, down: Encoding, hidden: int = 64, width: int = 32) -> RecordKind:
    """gate and up [width, hidden], down [hidden, width]."""
    shapes: list[tuple[str, Shape, Encoding]] = [
        ("gate", (width, hidden), gate), ("up", (width, hidden), up), ("down", (hidden, width), down),
    ]  # fmt: skip
    return RecordKind(tuple(Projection(*p) for p in shapes))


def ungated(encoding: Encoding, hidden: int = 64, width: int = 32) -> RecordKind:
    """up [width, hidden], down [hidden, width]."""
    return RecordKind((Projection("up", (width, hidden), encoding), Projection("down", (hidden, width), encoding)))


def fill(array: np.ndarray, dtype: str, rng: np.random.Generator, values: int = 20) -> None:
    """Finite values: any integers, or small floats; ``values`` different ones, so that a record may compress."""
    if dtype == "BF16":
        floats = rng.integers(-values, values, array.shape).astype(np.float32) / 64
        array[...] = floats.view(np.uint32) >> 16
    elif dtype in ("F16", "F32"):
        floats = rng.integers(-values, values, array.shape) / 64
        array[...] = floats.astype("<f2" if dtype == "F16" else "<f4").view(array.dtype)
    else:
        # Any bits, but few different words, so that an archive is small.
        array[...] = rng.choice(rng.integers(0, 2 ** (8 * array.dtype.itemsize), 16, dtype=array.dtype), array.shape)


class Builder:
    """Writes one pack, with values that follow from its name."""

    def __init__(self, folder: Path, kinds: list[RecordKind], values: int = 20) -> None:
        self.folder, self.kinds, self.values = folder, tuple(kinds), values
        self.rng = np.random.default_rng(sum(folder.name.encode()))
        self.layers: list[Layer] = []
        self.matrices: list[Matrix] = []
        self.tensors: list[TensorEntry] = []
        self.files: list[FileEntry] = []
        self.copies = {"config.json": b'{"model_type": "tiny"}\n', "tokenizer.json": b"{}\n"}

    def layer(self, index: int, *kinds: tuple[int, int], codec: str = "raw", odd: int | None = None) -> Builder:
        """A layer with (kind, count) records; expert ``odd`` gets values that do not compress."""
        layer = Layer(index, f"model.layers.{index}.mlp.experts", f"experts/layer-{index:04}.safetensors", kinds, codec)
        rows = [(kind, row) for kind, count in kinds for row in range(count)]
        table = np.array(rows[::-1], "<u4") if len(kinds) > 1 else None
        with ShardWriter(self.folder, layer, self.kinds, table) as writer:
            for expert in range(layer.experts):
                kind = self.kinds[rows[::-1][expert][0] if table is not None else rows[expert][0]]
                buffer = RecordBuffer(kind)
                for s in kind.sections:
                    fill(buffer.sections[s.name], s.dtype, self.rng, 400 if expert == odd else self.values)
                writer.write(expert, buffer.data.data)
            self.files.append(writer.finish())
        self.layers.append(layer)
        return self

    def dense(self, number: int, tensors: dict[str, tuple[str, tuple[int, ...]]], *matrices: Matrix) -> Builder:
        """A dense file with plain tensors and the parts of matrices."""
        specs = [dense_spec(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
        for m in matrices:
            names = m.tensor_names()
            specs += [dense_spec(names[p], dtype, shape) for p, (dtype, shape) in m.encoding.parts(m.shape).items()]
        with DenseWriter(self.folder, f"dense-{number:05}.safetensors", specs) as writer:
            for spec in specs:
                bits = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}[ITEMSIZE[spec.dtype]]
                array = np.zeros(math.prod(spec.shape), bits)
                fill(array[:100], spec.dtype, self.rng)
                writer.append(spec.name, array.data.cast("B"))
            entry, rows = writer.finish()
        self.files.append(entry)
        self.tensors += rows
        self.matrices += matrices
        return self

    def commit(self, **more: object) -> None:
        """Write the copied files and the manifest, with ``more`` top-level fields."""
        self.files += [write_copy(self.folder, path, data) for path, data in self.copies.items()]
        manifest = Manifest(
            MODEL, RECIPE, self.kinds, tuple(self.layers), tuple(self.matrices), tuple(self.tensors), tuple(self.files)
        )
        if more:
            Manifest.from_bytes(raw := canonical(json.loads(manifest.to_bytes()) | more))
            commit_bytes(self.folder, raw)
        else:
            commit(self.folder, manifest)


SMALL = {"model.norm.weight": ("BF16", (64,)), "model.scale": ("F32", ())}
EMBED = Matrix("model.embed.weight", (10, 64), Q4)


def base(folder: Path) -> None:
    """What most faults are put into: two plain layers, one with a table; a quantized matrix, gaps, a large tensor."""
    pack = Builder(folder, [gated(Q4, Q4, Q4), ungated(BF16)])
    pack.layer(0, (0, 2)).layer(3, (0, 1), (1, 2))
    pack.dense(1, SMALL | {"model.large": ("BF16", (32768 + 3,)), "model.after": ("F16", (3,))}, EMBED).commit()


def compressed(folder: Path) -> None:
    """A layer of zstd frames, one record kept as it is, records of several pages."""
    kind = gated(BF16, BF16, BF16, 64, 64)
    pack = Builder(folder, [kind], values=3)
    pack.layer(0, (0, 3), codec="zstd", odd=1).dense(1, SMALL).commit()


def compressed_mixed(folder: Path) -> None:
    """Frames with an expert table, beside a plain layer."""
    pack = Builder(folder, [gated(BF16, BF16, BF16, 64, 64), ungated(BF16, 64, 64)], values=3)
    pack.layer(0, (1, 1), (0, 2), codec="zstd").layer(1, (1, 1)).dense(1, SMALL).commit()


def raw_dtypes(folder: Path) -> None:
    """Records in each raw type; one of them mixes the three."""
    raw = {d: Encoding("raw", d) for d in C.RAW_DTYPES}
    pack = Builder(folder, [ungated(raw[d], 5, 3) for d in raw] + [gated(raw["F32"], raw["BF16"], raw["F16"], 7, 3)])
    for i in range(4):
        pack.layer(i, (i, 1))
    pack.dense(1, {f"t.{d}": (d, (3, 5)) for d in ("U8", "U32", "BF16", "F16", "F32")}).commit()


def affine(bits: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        encodings = [
            Encoding("affine", dtype, bits, group)
            for dtype, group in zip(C.SCALE_DTYPES, C.GROUP_SIZES[bits % 3 :] + C.GROUP_SIZES[: bits % 3], strict=True)
        ]
        pack = Builder(folder, [gated(e, e, e, 128, 128) for e in encodings])
        for i in range(len(encodings)):
            pack.layer(i, (i, 1))
        pack.dense(1, SMALL, *(Matrix(f"m{i}.weight", (3, 128), e) for i, e in enumerate(encodings))).commit()

    build.__doc__ = f"{bits}-bit groups of each size, scales of each type, experts and dense matrices."
    return build


def unequal(folder: Path) -> None:
    """gate and up in different encodings, and in sizes that leave a gap between them."""
    q8 = Encoding("affine", "F16", 8, 64)
    pack = Builder(folder, [gated(Q4, q8, BF16), gated(BF16, BF16, BF16, 5, 3)])
    pack.layer(0, (0, 1)).layer(1, (1, 2)).dense(1, SMALL).commit()


def several_dense_files(folder: Path) -> None:
    """Three dense files; page-aligned tensors, gaps, scalars, a tensor of eight dimensions."""
    pack = Builder(folder, [ungated(BF16)]).layer(0, (0, 1))
    pack.dense(1, {"a": ("U8", (65536,)), "b": ("U8", (1,)), "c": ("BF16", (40000,)), "d": ("F32", ())})
    pack.dense(2, {"e": ("U8", (65535,)), "f": ("U32", (1, 2, 1, 2, 1, 2, 1, 1))}).dense(
        7, {"g": ("F16", (1,))}
    ).commit()


def no_dense(folder: Path) -> None:
    """No dense part at all."""
    Builder(folder, [ungated(BF16)]).layer(0, (0, 1)).commit()


def no_layers(folder: Path) -> None:
    """No MoE layers, and a record kind that nobody uses."""
    Builder(folder, [ungated(BF16)]).dense(1, SMALL).commit()


def unknown_fields(folder: Path) -> None:
    """Fields of a later version in every object: ignored."""
    base(folder)
    data = json.loads((folder / C.MANIFEST).read_bytes())

    def add(value: object) -> None:
        if isinstance(value, dict):
            for inner in list(value.values()):
                add(inner)
            value["zz_later"] = [1, {"x": None}]
        elif isinstance(value, list):
            for inner in value:
                add(inner)

    for entry in data["files"]:
        entry["zz_later"] = True  # digests are a closed set: they say what is covered
    for key in ("matrices", "tensors", "layers", "model", "recipe"):
        add(data[key])
    for kind in data["record_kinds"]:
        kind["zz_later"] = 7
        for projection in kind["projections"]:
            add(projection)
    data["zz_later"] = {"deep": [[[["x"]]]]}
    commit_bytes(folder, canonical(data))


def unknown_fields_of_sections(folder: Path) -> None:
    """A field of a later version in the list of sections: ignored."""
    base(folder)
    data = json.loads((folder / C.MANIFEST).read_bytes())
    data["record_kinds"][0]["sections"][0]["zz_later"] = 1
    commit_bytes(folder, canonical(data))


def later_reader(folder: Path) -> None:
    """Optional features and a min_reader that this version does not know."""
    pack = Builder(folder, [ungated(BF16)]).layer(0, (0, 1)).dense(1, SMALL)
    pack.commit(optional_features=["gleam", "sparkle"], min_reader="7.12.1")


def names(folder: Path) -> None:
    """Names beyond ASCII and 16 bits, copied files in folders, an empty file, the last layer index."""
    pack = Builder(folder, [ungated(BF16)]).layer(65535, (0, 1))
    pack.dense(1, {"gewicht.größe": ("F32", (2,)), "\U0001f600": ("U8", (2,))})
    pack.copies |= {"sub/folder/LICENSE": b"text\n", "tokenizer-ä.txt": b"", "vocab.txt": b"\xff\x00"}
    pack.commit()


def leftovers(folder: Path) -> None:
    """A journal and hidden files, which are no part of a pack."""
    base(folder)
    (folder / C.JOURNAL).write_bytes(b"{}\n")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "experts" / "._layer").write_bytes(b"x")


VALID: dict[str, Callable[[Path], None]] = {
    "base": base,
    "compressed": compressed,
    "compressed-mixed": compressed_mixed,
    "raw-dtypes": raw_dtypes,
    **{f"affine-{bits}": affine(bits) for bits in C.AFFINE_BITS},
    "unequal-encodings": unequal,
    "several-dense-files": several_dense_files,
    "no-dense-part": no_dense,
    "no-layers": no_layers,
    "unknown-fields": unknown_fields,
    "unknown-fields-of-sections": unknown_fields_of_sections,
    "later-reader": later_reader,
    "names": names,
    "leftovers": leftovers,
}
