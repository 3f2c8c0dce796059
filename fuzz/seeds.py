"""Makes the seed corpus: ``python -m fuzz.seeds``. The same seeds each time."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import numpy as np

from flashpack.formats import constants as C
from flashpack.formats.header import TensorSpec, build_header
from fuzz import frames
from fuzz.packs import write_random_pack
from fuzz.stranger import pack_to_bytes

CORPUS = Path(__file__).parent / "corpus"
PACKS = 12


def main() -> None:
    for number in range(PACKS):
        with tempfile.TemporaryDirectory() as folder:
            write_random_pack(Path(folder), random.Random(number))
            _save("pack", f"pack-{number}", pack_to_bytes(Path(folder)))
            if number % 3 == 0:
                _save("manifest", f"pack-{number}", (Path(folder) / C.MANIFEST).read_bytes())
    specs = [TensorSpec("a.weight", "BF16", (2, 8)), TensorSpec("b", "F32", (), 64), TensorSpec("empty", "U8", (0, 3))]
    raw, header = build_header(specs, {"format": "pt"}, "seed")
    size = header.size - header.data_start
    _save("header", "three-tensors", size.to_bytes(4, "little") + raw[8:].rstrip())
    _save("header", "no-tensor", b"\0\0\0\0{}")
    _frames()
    _tails()
    _journals()
    plain = raw[8:].rstrip()
    shard = len(plain).to_bytes(8, "little") + plain + bytes(size)
    index = {"metadata": {"total_size": size}, "weight_map": {t.name: "model.safetensors" for t in specs}}
    for name, text in (("indexed", json.dumps(index).encode()), ("alone", b"")):
        _save("source", name, b'{"model_type": "mixtral", "rope": {"theta": 1e6}}\0' + text + b"\0" + shard)


def _frames() -> None:
    for name, (record, stored) in frames.GOOD.items():
        _save("frame", f"good-{name}", len(record).to_bytes(3, "little") + stored)
    for name, stored in frames.BAD.items():
        _save("frame", f"bad-{name}", len(frames.RECORD).to_bytes(3, "little") + stored)


def _tails() -> None:
    """One per form of a shard: with and without a table, plain and compressed."""
    table = np.array([[1, 0], [0, 1], [0, 0]], "<u4").tobytes()
    sizes = np.array([100, C.PAGE, 3], "<u4").tobytes()
    pages = 3 << 2
    _save("tail", "raw", b"\0" + bytes(96))
    _save("tail", "raw-mixed", b"\2" + table + bytes(96))
    _save("tail", "zstd", bytes([1 | pages]) + sizes + bytes(192))
    _save("tail", "zstd-mixed", bytes([3 | pages]) + table + sizes + bytes(192))


def _journals() -> None:
    start = {"recipe": {"experts": "q4"}, "source": {"a": {"size": 1}}}
    file = {"path": "a", "role": "dense", "size": 1, "digests": {"header": "0" * 64}}
    lines = [start, {"process": 1}, {"file": file, "tensors": [], "errors": {}}]
    text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    _save("journal", "signed", b"\1" + text)
    _save("journal", "unsigned", b"\0" + text)
    _save("journal", "discard", b"\1" + json.dumps(start).encode() + b'\n{"discard": true}\n')
    _save("journal", "other-source", b"\1" + text.replace(b'"q4"', b'"q3"'))


def _save(target: str, name: str, data: bytes) -> None:
    path = CORPUS / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    main()
