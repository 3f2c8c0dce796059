"""Writing packs: files under a temporary name, durable rename, the manifest last (SPEC.md section 9).

``ShardWriter`` and ``DenseWriter`` are independent of each other and of threads; ``commit`` ends the pack.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from flashpack.errors import FormatError
from flashpack.formats import codecs
from flashpack.formats import constants as C
from flashpack.formats.checksums import Hasher, digest, hasher, hexdigest
from flashpack.formats.dtypes import ITEMSIZE
from flashpack.formats.entries import FileEntry, Layer, TensorEntry
from flashpack.formats.files import create, output_errors, publish, pwrite, resize, sync, write_durably
from flashpack.formats.header import TensorSpec
from flashpack.formats.layout import ShardLayout, dense_header
from flashpack.formats.manifest import Manifest
from flashpack.formats.records import RecordKind, align


class _PackFile:
    """A file of the pack under construction: ``path.part`` until ``_publish`` renames it."""

    def __init__(self, pack: Path, path: str, header: bytes = b"", size: int = 0) -> None:
        self.path = path
        self._final = pack / path
        self._partial = self._final.with_name(self._final.name + C.PARTIAL_SUFFIX)
        with output_errors(self._final):
            self._fd = create(self._partial)
        self._open = True
        try:
            self._write(header, 0)
            self._resize(size)  # a size limit shows at once, not after an hour
        except BaseException:
            self._close()
            raise

    def _write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        with output_errors(self._final):
            pwrite(self._fd, data, offset)

    def _resize(self, size: int) -> None:
        with output_errors(self._final):
            resize(self._fd, size)

    def _publish(self) -> None:
        with output_errors(self._final):
            sync(self._fd)
            self._close()
            publish(self._partial, self._final)

    def _close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Without finish() the partial file stays; it never counts as part of the pack and is overwritten next time.
        self._close()


class RecordDigests:
    """What a shard's writer learns from its records, in the order of experts; writes nothing itself.

    ``table``: uint32 [experts, 2] rows (kind, row), needed where experts differ in their record kind.
    """

    def __init__(self, layer: Layer, kinds: Sequence[RecordKind], table: NDArray[np.uint32] | None = None) -> None:
        self.layout = ShardLayout(layer, tuple(kinds))
        self._table = self.layout.default_table() if table is None else table
        self.layout.check_table(self._table)
        self._sizes: list[int] = []
        self._frames = 0
        self._digests: list[bytes] = []
        self._contents: list[bytes] = []

    def add(self, expert: int, record: memoryview) -> tuple[int, bytes | memoryview]:
        """Take one record (``stride`` bytes, padding included); returns where and what is stored of it."""
        layout = self.layout
        if expert != len(self._digests) or expert >= layout.layer.experts:
            raise FormatError(f"{layout.layer.path}: expert {expert}: records come once each, in order")
        kind, row = map(int, self._table[expert])
        if len(record) != layout.stride(kind):
            raise FormatError(f"{layout.layer.path}: expert {expert}: {len(record)} bytes, not {layout.stride(kind)}")
        self._contents.append(digest(record))
        if layout.layer.codec == "raw":
            self._digests.append(self._contents[-1])
            return layout.record_offsets[kind] + row * len(record), record
        frame = codecs.compress(record)
        offset = len(layout.header_bytes) + self._frames
        stored = bytes(frame).ljust(align(len(frame), C.PAGE), b"\0")
        self._sizes.append(len(frame))
        self._frames += len(stored)
        self._digests.append(digest(stored))
        return offset, stored

    def finish(self) -> tuple[ShardLayout, bytes, FileEntry]:
        """The final layout, the bytes behind the records, and the shard's row of the manifest."""
        layer = self.layout.layer
        if len(self._digests) != layer.experts:
            raise FormatError(f"{layer.path}: expert {len(self._digests)} was never written")
        tail = self._table.astype("<u4").tobytes() if layer.mixed else b""
        if layer.codec != "raw":
            tail += np.array(self._sizes, "<u4").tobytes() + b"".join(self._contents)
        tail += b"".join(self._digests)
        layout = ShardLayout(layer, self.layout.kinds, self._frames)
        digests = {"header": hexdigest(layout.header_bytes), "tail": hexdigest(tail)}
        return layout, tail, FileEntry(layer.path, "experts", layout.size, digests)


class ShardWriter(_PackFile):
    """Writes the experts of one layer, in order, then ``finish``."""

    def __init__(
        self, pack: Path, layer: Layer, kinds: Sequence[RecordKind], table: NDArray[np.uint32] | None = None
    ) -> None:
        self._records = RecordDigests(layer, kinds, table)
        super().__init__(pack, layer.path, size=self._records.layout.size if layer.codec == "raw" else 0)

    def write(self, expert: int, record: memoryview) -> None:
        """Write the record of the next expert: exactly ``stride`` bytes, padding included."""
        offset, stored = self._records.add(expert, record)
        self._write(stored, offset)

    def finish(self) -> FileEntry:
        """Write header and tail, make the file durable and give it its name."""
        layout, tail, entry = self._records.finish()
        self._write(layout.header_bytes, 0)
        self._write(tail, layout.tail)
        self._publish()
        return entry


class DenseWriter(_PackFile):
    """Writes one file of dense tensors; each tensor may arrive in pieces, in order."""

    def __init__(self, pack: Path, path: str, specs: Sequence[TensorSpec]) -> None:
        self._header, self._layout = dense_header(specs, path)
        self._tensors = {t.name: t for t in self._layout.tensors if not t.hidden}
        self._hashers: dict[str, Hasher] = {name: hasher() for name in self._tensors}
        self._done = dict.fromkeys(self._tensors, 0)
        super().__init__(pack, path, self._header, self._layout.size)

    def append(self, name: str, data: memoryview) -> None:
        """Write the next bytes of tensor ``name``."""
        tensor = self._tensors[name]
        raw = data.cast("B")
        if self._done[name] + len(raw) > tensor.nbytes:
            raise FormatError(f"{self.path}: tensor {name}: more than its {tensor.nbytes} bytes")
        self._hashers[name].update(raw)
        self._write(raw, tensor.offset + self._done[name])
        self._done[name] += len(raw)

    def digests(self) -> dict[str, str]:
        """Digests of the tensors as far as they have been written."""
        return {name: hashed.hexdigest() for name, hashed in self._hashers.items()}

    def finish(self) -> tuple[FileEntry, list[TensorEntry]]:
        """Make the file durable and give it its name."""
        for name, tensor in self._tensors.items():
            if self._done[name] != tensor.nbytes:
                raise FormatError(f"{self.path}: tensor {name}: {self._done[name]} of {tensor.nbytes} bytes written")
        self._publish()
        entries = [
            TensorEntry(t.name, self.path, t.dtype, t.shape, t.offset, self._hashers[t.name].hexdigest())
            for t in self._tensors.values()
        ]
        return FileEntry(self.path, "dense", self._layout.size, {"header": hexdigest(self._header)}), entries


class RecordBuffer:
    """A record in memory: one numpy array per section, all views of the same zeroed bytes."""

    def __init__(self, kind: RecordKind) -> None:
        self.data = np.zeros(kind.stride, dtype=np.uint8)
        self.sections: Mapping[str, np.ndarray] = {
            s.name: self.data[s.offset : s.offset + s.nbytes]
            .view(f"<u{ITEMSIZE[s.dtype]}")
            .reshape(-1, math.prod(s.shape[1:]))
            for s in kind.sections
        }


def write_copy(pack: Path, path: str, data: bytes) -> FileEntry:
    """Write a small file that is copied through (config, tokenizer, ...)."""
    write_durably(pack / path, data, C.PARTIAL_SUFFIX)
    return FileEntry(path, "copy", len(data), {"file": hexdigest(data)})


def commit(pack: Path, manifest: Manifest) -> str:
    """Make the pack: first the identity file, then the manifest by atomic rename, the commit point.

    What a reader would refuse is not written. Returns the identity.
    """
    raw = manifest.to_bytes()
    Manifest.from_bytes(raw)
    return commit_bytes(pack, raw)


def commit_bytes(pack: Path, manifest: bytes) -> str:
    """``commit`` for the bytes of a manifest that has been checked."""
    identity = hexdigest(manifest)
    write_durably(pack / C.MANIFEST_DIGEST, f"{identity}\n".encode(), C.PARTIAL_SUFFIX)
    write_durably(pack / C.MANIFEST, manifest, C.PARTIAL_SUFFIX)
    return identity
