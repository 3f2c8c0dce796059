"""Small packs with everything that the format has: random, valid, made by flashpack's own writer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flashpack.formats import Encoding, Manifest, Projection, RecordKind
from flashpack.formats import constants as C
from flashpack.formats.entries import FileEntry, Layer, Matrix, TensorEntry
from flashpack.formats.header import TensorSpec
from flashpack.formats.layout import dense_spec
from flashpack.formats.records import MXFP4, PROJECTIONS, fp8, nvfp4
from flashpack.formats.writer import DenseWriter, RecordBuffer, ShardWriter, commit, write_copy


@dataclass
class Written:
    """What was put into a pack: records by layer and expert, tensors by name, copied files by path."""

    manifest: Manifest = field(init=False)
    records: dict[tuple[int, int], bytes] = field(default_factory=dict)
    tensors: dict[str, bytes] = field(default_factory=dict)
    copies: dict[str, bytes] = field(default_factory=dict)


def write_random_pack(folder: Path, rng: random.Random) -> Written:
    """Write a pack into an empty ``folder``: any kinds, encodings, codecs, tables and dense tensors, of a few pages."""
    written = Written()
    data = np.random.default_rng(rng.getrandbits(32))
    kinds = tuple(dict.fromkeys(_kind(rng) for _ in range(rng.randint(1, 3))))
    files: list[FileEntry] = []
    layers: list[Layer] = []
    for index in sorted(rng.sample(range(9), rng.randint(0, 3))):
        some = rng.sample(range(len(kinds)), rng.randint(1, len(kinds)))
        path = f"experts/layer-{index:04d}.safetensors"
        counts = tuple((kind, rng.randint(1, 3)) for kind in some)
        layers.append(Layer(index, f"model.layers.{index}.mlp.experts", path, counts, rng.choice(C.CODECS)))
        files.append(_shard(folder, layers[-1], kinds, rng, data, written))
    tensors: list[TensorEntry] = []
    matrices: list[Matrix] = []
    for number in range(rng.randint(0, 2)):
        matrices += (m := [_matrix(f"m{number}.{i}.weight", rng) for i in range(rng.randint(0, 2))])
        specs = _specs(f"t{number}", m, rng)
        entry, rows = _dense(folder, f"dense-{number:05d}.safetensors", specs, data, written)
        files.append(entry)
        tensors += rows
    for name in rng.sample(("config.json", "tokenizer.json", "sub/LICENSE", "empty"), rng.randint(0, 2)):
        written.copies[name] = b"" if name == "empty" else data.bytes(20)
        files.append(write_copy(folder, name, written.copies[name]))
    model = {"architecture": "A", "model_type": "m", "name_schema": C.NAME_SCHEMA, "transformers": "5"}
    recipe = {"experts": "any", "note": rng.choice(("plain", "\u00e9\U0001f600"))}
    written.manifest = Manifest(model, recipe, kinds, tuple(layers), tuple(matrices), tuple(tensors), tuple(files))
    commit(folder, written.manifest)
    return written


def _encoding(width: int, rng: random.Random) -> Encoding:
    groups = [g for g in C.GROUP_SIZES if width % g == 0]
    fits = [Encoding("raw", rng.choice(C.RAW_DTYPES))]
    sizes = [rng.choice((0, 1, 2, 7, 32, C.MAX_BLOCK)) for _ in range(2)]
    fits.append(fp8(rng.choice(C.FP8_SCALE_DTYPES), (sizes[0], sizes[1])))
    if width % C.NVFP4_GROUP == 0:
        fits.append(nvfp4(rng.choice(C.GLOBAL_SCALES)))
    if width % C.MXFP4_GROUP == 0:
        fits.append(MXFP4)
    if groups:
        affine = Encoding("affine", rng.choice(C.SCALE_DTYPES), rng.choice(C.AFFINE_BITS), rng.choice(groups))
        fits += [affine] * 3
    return rng.choice(fits)


def _kind(rng: random.Random) -> RecordKind:
    names = rng.choice((PROJECTIONS, PROJECTIONS[1:]))
    rows, width = rng.choice((1, 3, 8)), rng.choice((5, 32, 64, 128, 4000))
    biases = ("", *C.BIAS_DTYPES) if rng.random() < 0.3 else ("",)
    return RecordKind(
        tuple(Projection(name, (rows, width), _encoding(width, rng), rng.choice(biases)) for name in names)
    )


def _shard(
    folder: Path,
    layer: Layer,
    kinds: tuple[RecordKind, ...],
    rng: random.Random,
    data: np.random.Generator,
    written: Written,
) -> FileEntry:
    rows = [(kind, row) for kind, count in layer.kinds for row in range(count)]
    table = None
    if layer.mixed:
        rng.shuffle(rows)
        table = np.array(rows, np.uint32)
    with ShardWriter(folder, layer, kinds, table) as writer:
        for expert, (kind, _) in enumerate(rows):
            record = RecordBuffer(kinds[kind])
            for section in record.sections.values():
                # Finite as any float type, and of few values: so that some records are worth compressing.
                section[...] = data.integers(0, rng.choice((1, 3, 100)), section.shape)
            written.records[layer.index, expert] = record.data.tobytes()
            writer.write(expert, memoryview(written.records[layer.index, expert]))
        return writer.finish()


def _matrix(name: str, rng: random.Random) -> Matrix:
    rows, width = rng.randint(1, 4), 32 * rng.randint(1, 3)
    encoding = _encoding(width, rng)
    while not encoding.quantized:
        encoding = _encoding(width, rng)
    return Matrix(name, (rows, width), encoding)


def _specs(stem: str, matrices: list[Matrix], rng: random.Random) -> list[TensorSpec]:
    """The parts of the matrices, and some other tensors, at times one that starts on a page."""
    specs = [
        dense_spec(m.tensor_names()[part], dtype, shape)
        for m in matrices
        for part, (dtype, shape) in m.encoding.parts(m.shape).items()
    ]
    for i in range(rng.randint(0, 3)):
        shape = tuple(rng.choice((1, 2, 7)) for _ in range(rng.randint(0, 3)))
        specs.append(dense_spec(f"{stem}.{i}", rng.choice(C.TENSOR_DTYPES), shape))
    if rng.random() < 0.2:
        specs.append(dense_spec(f"{stem}.large", "BF16", (C.PAGE_ALIGNED_FROM // 2,)))
    rng.shuffle(specs)
    return specs


def _dense(
    folder: Path, path: str, specs: list[TensorSpec], data: np.random.Generator, written: Written
) -> tuple[FileEntry, list[TensorEntry]]:
    with DenseWriter(folder, path, specs) as writer:
        for spec in specs:
            # Bytes below 60 are finite in every type.
            raw = bytes(spec.nbytes) if spec.nbytes > 4000 else data.integers(0, 60, spec.nbytes, np.uint8).tobytes()
            written.tensors[spec.name] = raw
            writer.append(spec.name, memoryview(raw))
        return writer.finish()
