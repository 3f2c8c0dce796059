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
from flashpack.formats import constants as C
from flashpack.formats.checksums import Hasher, digest, hasher, hexdigest
from flashpack.formats.dtypes import ITEMSIZE
from flashpack.formats.files import output_errors, pwrite, sync, sync_folder, write_durably
from flashpack.formats.header import TensorSpec, build_header
from flashpack.formats.manifest import FileEntry, Layer, Manifest, TensorEntry
from flashpack.formats.records import RecordKind
from flashpack.formats.shard import ShardLayout


class _PackFile:
    """A file of the pack under construction: ``path.part`` until ``_publish`` renames it."""

    def __init__(self, pack: Path, path: str, header: bytes, size: int) -> None:
        self.path = path
        self.size = size
        self._header = header
        self._final = pack / path
        self._partial = self._final.with_name(self._final.name + C.PARTIAL_SUFFIX)
        with output_errors(self._final):
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._open = True
        self._write(header, 0)
        with output_errors(self._final):
            os.ftruncate(self._fd, size)

    def _write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        with output_errors(self._final):
            pwrite(self._fd, data, offset)

    def _publish(self) -> None:
        with output_errors(self._final):
            sync(self._fd)
            self._close()
            os.replace(self._partial, self._final)
            sync_folder(self._final.parent)

    def _close(self) -> None:
        if self._open:
            os.close(self._fd)
            self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Without finish() the partial file stays; it never counts as part of the pack and is overwritten next time.
        self._close()


class ShardWriter(_PackFile):
    """Writes the experts of one layer, in any order, then ``finish``.

    ``table``: uint32 [experts, 2] rows (kind, row), needed where experts differ in their record kind.
    """

    def __init__(
        self, pack: Path, layer: Layer, kinds: Sequence[RecordKind], table: NDArray[np.uint32] | None = None
    ) -> None:
        self.layout = ShardLayout(layer, tuple(kinds))
        self._table = self.layout.default_table() if table is None else table
        self.layout.check_table(self._table)
        self._digests: list[bytes | None] = [None] * layer.experts
        super().__init__(pack, layer.path, self.layout.header_bytes, self.layout.size)

    def write(self, expert: int, record: memoryview) -> None:
        """Write one record: exactly ``stride`` bytes, padding included."""
        offset, stride = self.layout.extent(*map(int, self._table[expert]))
        if len(record) != stride or self._digests[expert] is not None:
            raise FormatError(f"{self.path}: expert {expert}: written twice, or {len(record)} bytes not {stride}")
        self._digests[expert] = digest(record)
        self._write(record, offset)

    def finish(self) -> FileEntry:
        """Write the digests, make the file durable and give it its name."""
        missing = [e for e, d in enumerate(self._digests) if d is None]
        if missing:
            raise FormatError(f"{self.path}: expert {missing[0]} was never written")
        tail = b"".join(d for d in self._digests if d is not None)
        if self.layout.mixed:
            tail = self._table.tobytes() + tail
        self._write(tail, self.layout.tail)
        self._publish()
        digests = {"header": hexdigest(self._header), "tail": hexdigest(tail)}
        return FileEntry(self.path, "experts", self.size, digests)


class DenseWriter(_PackFile):
    """Writes one file of dense tensors; each tensor may arrive in pieces, in order."""

    def __init__(self, pack: Path, path: str, specs: Sequence[TensorSpec]) -> None:
        header_bytes, self._layout = build_header(list(specs), {"flashpack": "dense"}, path)
        self._tensors = {t.name: t for t in self._layout.tensors if not t.hidden}
        self._hashers: dict[str, Hasher] = {name: hasher() for name in self._tensors}
        self._done = dict.fromkeys(self._tensors, 0)
        super().__init__(pack, path, header_bytes, self._layout.size)

    def append(self, name: str, data: memoryview) -> None:
        """Write the next bytes of tensor ``name``."""
        tensor = self._tensors[name]
        raw = data.cast("B")
        if self._done[name] + len(raw) > tensor.nbytes:
            raise FormatError(f"{self.path}: tensor {name}: more than its {tensor.nbytes} bytes")
        self._hashers[name].update(raw)
        self._write(raw, tensor.offset + self._done[name])
        self._done[name] += len(raw)

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
        return FileEntry(self.path, "dense", self.size, {"header": hexdigest(self._header)}), entries


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
    (pack / path).parent.mkdir(parents=True, exist_ok=True)
    write_durably(pack / path, data, C.PARTIAL_SUFFIX)
    return FileEntry(path, "copy", len(data), {"file": hexdigest(data)})


def commit(pack: Path, manifest: Manifest) -> str:
    """Make the pack: first the identity file, then the manifest by atomic rename, the commit point.

    Returns the identity.
    """
    manifest.validate()
    identity = manifest.identity
    write_durably(pack / C.MANIFEST_DIGEST, f"{identity}\n".encode(), C.PARTIAL_SUFFIX)
    write_durably(pack / C.MANIFEST, manifest.to_bytes(), C.PARTIAL_SUFFIX)
    return identity
