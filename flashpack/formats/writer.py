"""Writing packs: files under a temporary name, durable rename, the manifest last (SPEC.md section 9).

``ShardWriter`` and ``DenseWriter`` are independent of each other and of threads; ``commit`` ends the pack.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from flashpack.errors import FormatError
from flashpack.formats import codecs
from flashpack.formats import constants as C
from flashpack.formats.checksums import Hasher, digest, hasher, hexdigest
from flashpack.formats.dtypes import ITEMSIZE
from flashpack.formats.entries import FileEntry, Layer, TensorEntry
from flashpack.formats.files import (
    chunks,
    create,
    is_aligned,
    open_inside,
    output_errors,
    publish,
    pwrite,
    resize,
    sync,
    sync_folder,
    without_cache_for_writing,
    write_behind,
    write_durably,
)
from flashpack.formats.header import TensorSpec
from flashpack.formats.layout import ShardLayout, dense_header
from flashpack.formats.manifest import Manifest
from flashpack.formats.records import RecordKind, align


def partial_name(path: str, token: str = "") -> str:
    """The name of an unfinished file."""
    return path + (f".{token}" if token else "") + C.PARTIAL_SUFFIX


class _PackFile:
    """A file of the pack under construction: ``path.part`` until ``_publish`` renames it; ``path.<token>.part`` where
    others may write the same file at the same time.

    ``earlier`` says what an interrupted run wrote there, part by part; ``done`` is how many of these parts are proven
    to be there still. The rest of that file counts for nothing.
    """

    def __init__(
        self,
        pack: Path,
        path: str,
        header: bytes = b"",
        size: int = 0,
        earlier: Sequence[object] = (),
        token: str = "",
    ) -> None:
        self.path = path
        self.done = 0
        self._final = pack / path
        self._partial = self._final.with_name(partial_name(self._final.name, token))
        self._named = False
        with output_errors(self._final):
            self._fd = self._create(pack, bool(earlier))
        self._direct: int | None = None
        self._open = True
        try:
            with output_errors(self._final):
                # Copying a pack through the page cache takes longer than anything else that is done to it.
                self._direct = without_cache_for_writing(self._partial)
            end = self._prove(earlier)
            if earlier:
                self._resize(end)
            self._write(header, 0)
            self._resize(max(end, size))  # a size limit shows at once, not after an hour
        except BaseException:
            self._close()
            raise

    def _create(self, pack: Path, keep: bool) -> int:
        if keep:
            with contextlib.suppress(OSError):
                return open_inside(pack, self.path + C.PARTIAL_SUFFIX, os.O_RDWR)
        return create(self._partial, pack)

    def _prove(self, earlier: Sequence[object]) -> int:
        """Count in ``done`` the parts that are there; returns where the last one ends."""
        return 0

    def _holds(self, offset: int, size: int, hashed: Hasher, expected: str) -> bool:
        """Whether these bytes of the file have this digest; they go into ``hashed``."""
        with contextlib.suppress(FormatError, OSError):
            for piece in chunks(self._fd, offset, size, self.path):
                hashed.update(piece)
            return hashed.hexdigest() == expected
        return False

    def flush(self) -> None:
        """Make what has been written durable."""
        with output_errors(self._final):
            sync(self._fd)
            if not self._named:
                sync_folder(self._final.parent)
                self._named = True

    def _write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        with output_errors(self._final):
            if self._direct is not None and is_aligned(data, offset):
                pwrite(self._direct, data, offset)
            else:
                pwrite(self._fd, data, offset)
                write_behind(self._fd, offset, len(data))

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
            if self._direct is not None:
                os.close(self._direct)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Without finish() the partial file stays; it never counts as part of the pack and is overwritten next time.
        self._close()


@dataclass(frozen=True)
class StoredRecord:
    """What a shard knows of one record: digest of what is stored with its padding, bytes of that without, digest of the
    record itself."""

    digest: bytes
    size: int
    content: bytes

    def to_json(self) -> list[Any]:
        return [self.digest.hex(), self.size, self.content.hex()]

    @classmethod
    def from_json(cls, data: Any) -> StoredRecord:
        """Raises ``FormatError``."""
        match data:
            case [str(stored), int(size), str(content)]:
                if all(re.fullmatch("[0-9a-f]{64}", text) for text in (stored, content)):
                    return cls(bytes.fromhex(stored), size, bytes.fromhex(content))
        raise FormatError("not what is known of a record")


class RecordDigests:
    """What a shard's writer learns from its records, in the order of experts; writes nothing itself.

    ``table``: uint32 [experts, 2] rows (kind, row), needed where experts differ in their record kind.
    """

    def __init__(self, layer: Layer, kinds: Sequence[RecordKind], table: NDArray[np.uint32] | None = None) -> None:
        self.layout = ShardLayout(layer, tuple(kinds))
        self._table = self.layout.default_table() if table is None else table
        self.layout.check_table(self._table)
        self.stored: list[StoredRecord] = []
        self._frames = 0

    def add(self, expert: int, record: memoryview) -> tuple[int, bytes | memoryview]:
        """Take one record (``stride`` bytes, padding included); returns where and what is stored of it."""
        path, stride = self.layout.layer.path, self._stride(expert)
        if expert != len(self.stored) or expert >= self.layout.layer.experts:
            raise FormatError(f"{path}: expert {expert}: records come once each, in order")
        if len(record) != stride:
            raise FormatError(f"{path}: expert {expert}: {len(record)} bytes, not {stride}")
        content = digest(record)
        if self.layout.layer.codec == "raw":
            return self.restore(StoredRecord(content, len(record), content)), record
        frame = codecs.compress(record)
        stored = bytes(frame).ljust(align(len(frame), C.PAGE), b"\0")
        return self.restore(StoredRecord(digest(stored), len(frame), content)), stored

    def restore(self, record: StoredRecord) -> int:
        """Take the next record as known; returns where it is stored."""
        place = self.place(len(self.stored))
        self.stored.append(record)
        if self.layout.layer.codec != "raw":
            self._frames += align(record.size, C.PAGE)
        return place

    def place(self, expert: int) -> int:
        """Where the record of the next expert is stored."""
        layout = self.layout
        if layout.layer.codec != "raw":
            return len(layout.header_bytes) + self._frames
        kind, row = map(int, self._table[expert])
        return layout.record_offsets[kind] + row * layout.stride(kind)

    def fits(self, record: StoredRecord) -> bool:
        """Whether it can be the next one."""
        expert = len(self.stored)
        if expert >= self.layout.layer.experts:
            return False
        stride = self._stride(expert)
        return record.size == stride if self.layout.layer.codec == "raw" else 0 < record.size <= stride

    def _stride(self, expert: int) -> int:
        return self.layout.stride(int(self._table[expert, 0])) if expert < len(self._table) else 0

    def finish(self) -> tuple[ShardLayout, bytes, FileEntry]:
        """The final layout, the bytes behind the records, and the shard's row of the manifest."""
        layer = self.layout.layer
        if len(self.stored) != layer.experts:
            raise FormatError(f"{layer.path}: expert {len(self.stored)} was never written")
        tail = self._table.astype("<u4").tobytes() if layer.mixed else b""
        if layer.codec != "raw":
            tail += np.array([r.size for r in self.stored], "<u4").tobytes() + b"".join(r.content for r in self.stored)
        tail += b"".join(r.digest for r in self.stored)
        layout = ShardLayout(layer, self.layout.kinds, self._frames)
        digests = {"header": hexdigest(layout.header_bytes), "tail": hexdigest(tail)}
        return layout, tail, FileEntry(layer.path, "experts", layout.size, digests)


class ShardWriter(_PackFile):
    """Writes the experts of one layer, in order, then ``finish``. Continues after the first ``done`` ones."""

    def __init__(
        self,
        pack: Path,
        layer: Layer,
        kinds: Sequence[RecordKind],
        table: NDArray[np.uint32] | None = None,
        earlier: Sequence[StoredRecord] = (),
        token: str = "",
    ) -> None:
        self._records = RecordDigests(layer, kinds, table)
        size = self._records.layout.size if layer.codec == "raw" else 0
        super().__init__(pack, layer.path, size=size, earlier=earlier, token=token)

    def _prove(self, earlier: Sequence[Any]) -> int:
        end = 0
        for record in earlier:
            if not self._records.fits(record):
                break
            place, span = self._records.place(self.done), align(record.size, C.PAGE)
            if not self._holds(place, span, hasher(), record.digest.hex()):
                break
            self._records.restore(record)
            self.done += 1
            end = max(end, place + span)
        return end

    @property
    def stored(self) -> list[StoredRecord]:
        """What is known of the records so far."""
        return self._records.stored

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
    """Writes one file of dense tensors; each tensor may arrive in pieces, in order.

    ``earlier``: tensors that belong together, name -> digest, in order. The first ``done`` of these are there already.
    """

    def __init__(
        self,
        pack: Path,
        path: str,
        specs: Sequence[TensorSpec],
        earlier: Sequence[Mapping[str, str]] = (),
        token: str = "",
    ) -> None:
        self._header, self._layout = dense_header(specs, path)
        self._tensors = {t.name: t for t in self._layout.tensors if not t.hidden}
        self._hashers: dict[str, Hasher] = {name: hasher() for name in self._tensors}
        self._written = dict.fromkeys(self._tensors, 0)
        super().__init__(pack, path, self._header, self._layout.size, earlier, token)

    def _prove(self, earlier: Sequence[Any]) -> int:
        end, waiting = 0, iter(self._layout.tensors)
        for group in earlier:
            found: dict[str, Hasher] = {}
            for tensor in waiting:
                expected = group.get(tensor.name, "")
                if tensor.hidden:
                    expected = hexdigest(bytes(tensor.nbytes))
                hashed = hasher()
                if not self._holds(tensor.offset, tensor.nbytes, hashed, expected):
                    return end
                if not tensor.hidden:
                    found[tensor.name] = hashed
                if found.keys() == group.keys():
                    break
            if found.keys() != group.keys():
                return end
            self._hashers |= found
            self._written |= {name: self._tensors[name].nbytes for name in found}
            self.done += 1
            end = tensor.offset + tensor.nbytes
        return end

    def append(self, name: str, data: memoryview) -> None:
        """Write the next bytes of tensor ``name``."""
        tensor = self._tensors[name]
        raw = data.cast("B")
        if self._written[name] + len(raw) > tensor.nbytes:
            raise FormatError(f"{self.path}: tensor {name}: more than its {tensor.nbytes} bytes")
        self._hashers[name].update(raw)
        self._write(raw, tensor.offset + self._written[name])
        self._written[name] += len(raw)

    def digests(self) -> dict[str, str]:
        """Digests of the tensors as far as they have been written."""
        return {name: hashed.hexdigest() for name, hashed in self._hashers.items()}

    def finish(self) -> tuple[FileEntry, list[TensorEntry]]:
        """Make the file durable and give it its name."""
        for name, tensor in self._tensors.items():
            if self._written[name] != tensor.nbytes:
                raise FormatError(f"{self.path}: tensor {name}: {self._written[name]} of {tensor.nbytes} bytes written")
        self._publish()
        entries = [
            TensorEntry(t.name, self.path, t.dtype, t.shape, t.offset, self._hashers[t.name].hexdigest())
            for t in self._tensors.values()
        ]
        return FileEntry(self.path, "dense", self._layout.size, {"header": hexdigest(self._header)}), entries


class RecordBuffer:
    """A record in memory: one array [rows, values of a row] per section, all views of the same zeroed bytes."""

    def __init__(self, kind: RecordKind) -> None:
        self.data = np.frombuffer(mmap.mmap(-1, kind.stride), dtype=np.uint8)  # aligned, for writes past the cache
        self.sections: Mapping[str, np.ndarray] = {
            s.name: self.data[s.offset : s.offset + s.nbytes]
            .view(f"<u{ITEMSIZE[s.dtype]}")
            .reshape(-1, math.prod(s.shape[1:]))
            for s in kind.sections
        }


def write_copy(pack: Path, path: str, data: bytes) -> FileEntry:
    """Write a small file that is copied through (config, tokenizer, ...)."""
    write_durably(pack, path, data, C.PARTIAL_SUFFIX)
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
    write_durably(pack, C.MANIFEST_DIGEST, f"{identity}\n".encode(), C.PARTIAL_SUFFIX)
    write_durably(pack, C.MANIFEST, manifest, C.PARTIAL_SUFFIX)
    return identity
