"""What is fuzzed. A target takes any bytes; nothing but ``FlashpackError`` may come out of the code it calls.

It returns True if the bytes were accepted. What is accepted must also hold what a reader relies on: that is asserted.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from flashpack.errors import FlashpackError
from flashpack.formats import Encoding, Manifest, Pack, Projection, RecordKind, codecs, verify
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.dtypes import NUMPY
from flashpack.formats.encodings import decode
from flashpack.formats.entries import Layer
from flashpack.formats.header import parse_header
from flashpack.formats.layout import ShardLayout
from flashpack.formats.reader import Shard
from fuzz.stranger import bytes_to_pack

Target = Callable[[bytes], bool]


def manifest(data: bytes) -> bool:
    """``data`` is flashpack.json."""
    try:
        parsed = Manifest.from_bytes(data)
    except FlashpackError:
        return False
    assert Manifest.from_bytes(parsed.to_bytes()) == parsed
    return True


def header(data: bytes) -> bool:
    """``data`` is the size of a safetensors file behind its header (4 bytes) and the JSON of the header."""
    size = 8 + len(data[4:]) + int.from_bytes(data[:4], "little")
    try:
        parsed = parse_header(data[4:], size, "file")
    except FlashpackError:
        return False
    assert sum(t.nbytes for t in parsed.tensors) == size - parsed.data_start
    return True


def frame(data: bytes) -> bool:
    """``data`` is the size of a record (3 bytes) and its stored form."""
    record = bytearray(int.from_bytes(data[:3], "little"))
    stored = data[3:]
    if not stored:
        return False
    try:
        codecs.decode(memoryview(stored), memoryview(record), "frame")
    except FlashpackError:
        return False
    return True


_KIND = RecordKind(tuple(Projection(name, (1, 32), Encoding("raw", "F32")) for name in ("up", "down")))
_LARGE = RecordKind(tuple(Projection(name, (3, 4096), Encoding("raw", "F32")) for name in ("up", "down")))
RECORD_PAGES = (_KIND.stride // C.PAGE, _LARGE.stride // C.PAGE)


def tail(data: bytes) -> bool:
    """``data`` is the shard (1 byte: codec, kinds, pages of frames) and what stands behind its records."""
    shape, rest = data[0] if data else 0, data[1:]
    kinds = ((0, 2), (1, 1)) if shape & 2 else ((1, 3),)
    layer = Layer(1, "m", "s", kinds, C.CODECS[shape & 1])
    layout = ShardLayout(layer, (_KIND, _LARGE), (shape >> 2) * C.PAGE if shape & 1 else 0)
    raw = rest[: layout.tail_bytes].ljust(layout.tail_bytes, b"\0")
    try:
        parsed = layout.parse_tail(raw)
    except FlashpackError:
        return False
    at = len(layout.header_bytes)
    for offset, span in sorted(zip(parsed.offsets, parsed.spans, strict=True)):
        assert (offset, span % C.PAGE) == (at, 0)
        at += span
    assert at == layout.tail
    return True


def pack(data: bytes) -> bool:
    """``data`` is a whole pack, as ``stranger`` describes it."""
    with memory_folder() as folder:
        bytes_to_pack(data, folder)
        return pack_in(folder)


def pack_in(folder: Path) -> bool:
    """Check a pack, open it and read all of it; True if it is whole."""
    try:
        whole = not verify(folder, workers=1)
    except FlashpackError:
        whole = False
    try:
        read_everything(folder)
    except FlashpackError:
        assert not whole
    return whole


def read_everything(folder: Path) -> None:
    """Use every record and tensor of a pack as the runtime does."""
    opened = Pack(folder)
    opened.check_copies()
    for layer in opened.manifest.layers:
        with opened.open_shard(layer) as shard:
            for expert in range(layer.experts):
                read_record(shard, expert)
    for tensor in opened.manifest.tensors:
        assert opened.map_tensor(tensor.name).nbytes == tensor.nbytes
    for matrix in opened.manifest.matrices:
        parts = {part: opened.map_tensor(name) for part, name in matrix.tensor_names().items()}
        assert decode(matrix.encoding, parts, matrix.shape).shape == matrix.shape


def read_record(shard: Shard, expert: int) -> None:
    """Read, check and decode an expert."""
    offset, span = shard.extent(expert)
    stored = memoryview(os.pread(shard.fd, span, offset))
    if not shard.intact(expert, stored):
        raise FlashpackError("damaged")
    kind = shard.kind(expert)
    record = memoryview(bytearray(kind.stride))
    shard.decode(expert, stored, record)
    for projection in kind.projections:
        parts = {
            s.name.partition(".")[2]: np.frombuffer(record[s.offset : s.offset + s.nbytes], NUMPY[s.dtype]).reshape(
                s.shape
            )
            for s in kind.sections
            if s.name.startswith(f"{projection.name}.")
        }
        assert decode(projection.encoding, parts, projection.shape).shape == projection.shape


def journal(data: bytes) -> bool:
    """``data`` is a journal; where its first byte is odd, the lines get the digests they need."""
    from flashpack.converter.journal import Journal

    first, *lines = data[1:].split(b"\n")
    if data[:1] and data[0] & 1:
        lines = [_signed(line) for line in lines]
    with memory_folder() as folder:
        (folder / C.JOURNAL).write_bytes(b"\n".join((first, *lines)))
        try:
            Journal(folder, {"recipe": {"experts": "q4"}, "source": {"a": {"size": 1}}}).close()
        except FlashpackError:
            return False
        return True


def _signed(line: bytes) -> bytes:
    try:
        parsed = json.loads(line)
        if isinstance(parsed, dict):
            parsed.pop("digest", None)
            text = json.dumps(parsed, sort_keys=True).encode()
            return json.dumps(parsed | {"digest": hexdigest(text)}, sort_keys=True).encode()
    except (ValueError, RecursionError):
        pass
    return line


def source(data: bytes) -> bool:
    """``data`` is config.json, the index (absent if empty) and the only shard, with zero bytes between the three."""
    from flashpack.converter.source import INDEX, open_checkpoint

    config, _, rest = data.partition(b"\0")
    index, _, shard = rest.partition(b"\0")
    with memory_folder() as folder:
        (folder / "config.json").write_bytes(config)
        if index:
            (folder / INDEX).write_bytes(index)
        (folder / "model.safetensors").write_bytes(shard)
        try:
            checkpoint = open_checkpoint(folder)
        except FlashpackError:
            return False
        for extent in checkpoint.stored.values():
            assert 0 <= extent.offset <= extent.offset + extent.nbytes <= len(shard)
        return True


@contextmanager
def memory_folder() -> Iterator[Path]:
    """An empty folder, in memory where there is a file system for that."""
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="flashpack-fuzz-", dir=shared if shared.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


TARGETS: dict[str, Target] = {
    "manifest": manifest,
    "header": header,
    "frame": frame,
    "tail": tail,
    "pack": pack,
    "journal": journal,
    "source": source,
}
