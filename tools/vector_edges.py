"""More valid packs of the conformance suite: small ones for single faults, limits, and what other writers may do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zstandard
from vector_packs import BF16, MODEL, Q4, RECIPE, Builder, ungated

from flashpack.formats import Encoding, Manifest, Projection, RecordKind
from flashpack.formats import constants as C
from flashpack.formats.checksums import digest, hexdigest
from flashpack.formats.entries import FileEntry, Layer, Matrix
from flashpack.formats.layout import ShardLayout, dense_spec
from flashpack.formats.manifest import canonical
from flashpack.formats.writer import DenseWriter, RecordBuffer, ShardWriter, commit_bytes, write_copy

F32 = Encoding("raw", "F32")
TWO_PAGES = RecordKind((Projection("up", (64, 128), BF16), Projection("down", (1, 1), BF16)))


def small(folder: Path) -> None:
    """One expert, one quantized matrix, one plain one, a gap: small, for faults of single fields."""
    embed = Matrix("model.embed.weight", (2, 32), Q4)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.norm": ("BF16", (5,)),
        "model.plain.weight": ("BF16", (2, 3)),
    }
    Builder(folder, [ungated(Q4, 32, 32)]).layer(0, (0, 1)).dense(1, tensors, embed).commit()


def small_mixed(folder: Path) -> None:
    """Three experts of two kinds with a table, small."""
    kinds = [ungated(Q4, 32, 32), ungated(BF16, 1, 1)]
    Builder(folder, kinds).layer(0, (0, 1), (1, 2)).dense(1, {"model.norm": ("BF16", (5,))}).commit()


def small_compressed(folder: Path) -> None:
    """Two frames, small."""
    pack = Builder(folder, [TWO_PAGES], values=1)
    pack.layer(0, (0, 2), codec="zstd").dense(1, {"model.norm": ("BF16", (5,))}).commit()


def frame_of(blocks: list[tuple[int, int, bytes]], size: int, window: int | None = None, dictionary: int = 0) -> bytes:
    """A zstd frame by hand: ``blocks`` of (type, size, content) with type 0 as it is, 1 one byte repeated.

    ``window``: the window descriptor; without it the frame is a single segment. ``dictionary``: its number.
    """
    flags = 0x80 | (0x20 if window is None else 0) | (1 if dictionary else 0)
    head = b"\x28\xb5\x2f\xfd" + bytes([flags]) + (b"" if window is None else bytes([window]))
    head += (bytes([dictionary]) if dictionary else b"") + size.to_bytes(4, "little")
    last = len(blocks) - 1
    return head + b"".join(
        ((i == last) | kind << 1 | count << 3).to_bytes(3, "little") + content
        for i, (kind, count, content) in enumerate(blocks)
    )


def foreign_frames(folder: Path) -> None:
    """Frames of other writers: by hand, with checksums, other levels, large windows; none saves a page."""
    kind = ungated(BF16, 64, 64)
    assert kind.stride == C.PAGE
    levels = [zstandard.ZstdCompressor(level=n, write_checksum=n % 2 == 1) for n in (-5, 1, 19)]
    some = bytes(range(64)) * (C.PAGE // 64)
    # Exponents of bytes below 64 are small: all values are finite.
    frames = [compressor.compress(some) for compressor in levels]
    frames.append(frame_of([(1, C.PAGE, b"\x3c")], C.PAGE))
    frames.append(frame_of([(0, 100, some[:100]), (1, C.PAGE - 100, b"\x01")], C.PAGE, window=0x90))  # of 256 MiB
    frames.append(frame_of([(1, 7, b"\x02"), (1, C.PAGE - 7, b"\x03"), (0, 0, b"")], C.PAGE, window=0x30))
    layer = Layer(0, "model.layers.0.mlp.experts", "experts/layer-0000.safetensors", ((0, len(frames)),), "zstd")
    contents = [some] * 3 + [b"\x3c" * C.PAGE, some[:100] + b"\x01" * (C.PAGE - 100), b"\2" * 7 + b"\3" * (C.PAGE - 7)]
    stored = [frame.ljust(C.PAGE, b"\0") for frame in frames]
    layout = ShardLayout(layer, (kind,), len(frames) * C.PAGE)
    tail = np.array([len(f) for f in frames], "<u4").tobytes() + b"".join(map(digest, contents))
    tail += b"".join(map(digest, stored))
    (folder / "experts").mkdir()
    (folder / layer.path).write_bytes(layout.header_bytes + b"".join(stored) + tail)
    digests = {"header": hexdigest(layout.header_bytes), "tail": hexdigest(tail)}
    entry = FileEntry(layer.path, "experts", layout.size, digests)
    pack = Builder(folder, [kind])
    pack.layers.append(layer)
    pack.files.append(entry)
    pack.commit()


def exact_page(folder: Path) -> None:
    """Records that fill their page to the last byte, or three; tensors just large enough for a page, and not."""
    kinds = [
        RecordKind((Projection("up", (32, 64), F32), Projection("down", (32, 64), F32))),
        RecordKind((Projection("up", (64, 128), F32), Projection("down", (1, 1), F32))),
    ]
    pack = Builder(folder, kinds, values=1).layer(0, (0, 2)).layer(1, (1, 1))
    sizes = (1, C.PAGE_ALIGNED_FROM, 1, C.PAGE_ALIGNED_FROM - 1)
    pack.dense(1, {f"t{i}": ("U8", (size,)) for i, size in enumerate(sizes)}).commit()


def write_values(folder: Path, kind: RecordKind, sections: dict[str, np.ndarray]) -> None:
    """A pack of one expert with these stored values (unsigned integers)."""
    layer = Layer(0, "model.layers.0.mlp.experts", "experts/layer-0000.safetensors", ((0, 1),))
    with ShardWriter(folder, layer, (kind,)) as writer:
        buffer = RecordBuffer(kind)
        for name, values in sections.items():
            buffer.sections[name][...] = values.reshape(buffer.sections[name].shape)
        writer.write(0, buffer.data.data)
        pack = Builder(folder, [kind])
        pack.files.append(writer.finish())
    pack.layers.append(layer)
    pack.commit()


def special_values(folder: Path) -> None:
    """Infinities, both zeros, subnormal numbers and the largest ones, in each raw type."""
    bits = {
        "BF16": [0x7F80, 0xFF80, 0x8000, 0x0000, 0x0001, 0x807F, 0x7F7F, 0xFF7F],
        "F16": [0x7C00, 0xFC00, 0x8000, 0x0000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF],
        "F32": [0x7F800000, 0xFF800000, 0x80000000, 0, 1, 0x807FFFFF, 0x7F7FFFFF, 0xFF7FFFFF],
    }
    names = ("gate", "up", "down")
    pairs = list(zip(names, bits, strict=True))
    kind = RecordKind(tuple(Projection(name, (2, 4), Encoding("raw", dtype)) for name, dtype in pairs))
    write_values(folder, kind, {f"{name}.weight": np.array(bits[dtype]) for name, dtype in pairs})


def rounding(folder: Path) -> None:
    """Scales and biases of 24 significant bits, also negative: product and sum are rounded each."""
    encoding = Encoding("affine", "F32", 8, 32)
    kind = RecordKind(tuple(Projection(name, (8, 32), encoding) for name in ("up", "down")))
    rng = np.random.default_rng(12)
    sections = {}
    for name in ("up", "down"):
        sections[f"{name}.weight"] = rng.integers(0, 2**32, (8, 8), np.uint32)
        for part in ("scales", "biases"):
            # Sign and fraction at random, magnitudes near each other.
            some = rng.integers(0, 2**32, 8, np.uint32)
            sections[f"{name}.{part}"] = some & np.uint32(0x81FFFFFF) | np.uint32(0x3C000000)
    write_values(folder, kind, sections)


def limits(folder: Path) -> None:
    """The largest numbers: 256 record kinds, a stride of almost 4 GiB, names of 1024 bytes, a long header."""
    kinds = [ungated(BF16, 1, 1 + i) for i in range(C.MAX_KINDS - 1)]
    kinds.append(
        RecordKind((Projection("up", (1, 1), BF16), Projection("down", (1, (C.MAX_RECORD_BYTES - 64) // 2), BF16)))
    )
    assert kinds[-1].stride == kinds[-1].nbytes == C.MAX_RECORD_BYTES
    pack = Builder(folder, kinds, values=1)
    pack.layer(0, (C.MAX_KINDS - 2, 1))
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {f"a.{i:03}".ljust(200, "a"): ("U8", (1,)) for i in range(120)}
    pack.dense(1, tensors | {"\u00e9" * (C.MAX_NAME_BYTES // 2): ("F32", (1,) * C.MAX_DIMENSIONS)})
    longest = "x" * 255  # flashpack's writer cannot write it, because .part is longer
    (folder / longest).write_bytes(b"x\n")
    pack.files.append(FileEntry(longest, "copy", 2, {"file": hexdigest(b"x\n")}))
    pack.commit(min_reader="999999999.999999999.999999999.999999999")


def largest_manifest(folder: Path) -> None:
    """A manifest of exactly the limit."""
    pack = Builder(folder, [])
    pack.commit()
    data = json.loads((folder / C.MANIFEST).read_bytes())
    data["zz"] = ""
    data["zz"] = "x" * (C.MAX_MANIFEST_BYTES - len(canonical(data)))
    commit_bytes(folder, canonical(data))
    assert (folder / C.MANIFEST).stat().st_size == C.MAX_MANIFEST_BYTES


def free_choices(folder: Path) -> None:
    """What is left to the writer: layers in any order, other file names, an empty dense file, keys beyond 16 bits."""
    kinds = (ungated(BF16, 1, 1), ungated(BF16, 1, 2))
    files, layers = [], []
    for index, path in ((7, "z.st"), (2, "weights/of layer/2")):
        layer = Layer(index, f"experts of {index}", path, ((1, 1),))
        with ShardWriter(folder, layer, kinds) as writer:
            writer.write(0, memoryview(bytes(C.PAGE)))
            files.append(writer.finish())
        layers.append(layer)
    tensors = []
    for path, specs in (("weights/none", []), ("dense", [dense_spec("b", "F32", ()), dense_spec("a", "F32", ())])):
        with DenseWriter(folder, path, specs) as writer:
            for spec in specs:
                writer.append(spec.name, memoryview(bytes(range(4))))
            entry, rows = writer.finish()
        files.append(entry)
        tensors += rows
    # Lower case, not case folding: these two are different names. And a folder may have any name but a hidden one.
    for path in ("\u00df.txt", "ss.txt", "flashpack.json.d/x", "a.part/x", "modeling.py/x"):
        files.append(write_copy(folder, path, b"x\n"))
    recipe = RECIPE | {
        "\ufffd": -(2**63),
        "\U0001f600": 2**64 - 1,
        "empty": [{}, [], "", None, True, '\x00\x7f\u2028"\\/'],
    }
    manifest = Manifest(MODEL, recipe, kinds, tuple(layers), (), tuple(tensors), tuple(files))
    raw = manifest.to_bytes()
    Manifest.from_bytes(raw)
    commit_bytes(folder, raw)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "file").write_bytes(b"x")


MORE_VALID: dict[str, Callable[[Path], None]] = {
    "small": small,
    "small-mixed": small_mixed,
    "small-compressed": small_compressed,
    "foreign-frames": foreign_frames,
    "exact-page": exact_page,
    "special-values": special_values,
    "rounding": rounding,
    "limits": limits,
    "largest-manifest": largest_manifest,
    "free-choices": free_choices,
}
