"""Reading packs: the manifest, mapped dense tensors, and where each expert's record lies."""

from __future__ import annotations

import mmap
import os
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from flashpack.errors import FormatError, IntegrityError, NotAPackError
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.dtypes import NUMPY
from flashpack.formats.files import pread
from flashpack.formats.header import Header, read_header
from flashpack.formats.manifest import FileEntry, Layer, Manifest, TensorEntry
from flashpack.formats.records import RecordKind
from flashpack.formats.shard import ShardLayout


def read_manifest(folder: Path) -> tuple[Manifest, bytes]:
    """Read and check the manifest and its digest; returns it with its bytes."""
    path = folder / C.MANIFEST
    if not folder.is_dir():
        raise NotAPackError(f"{folder}: no such folder")
    if not path.is_file():
        if (folder / C.JOURNAL).exists():
            raise NotAPackError(f"{folder}: an unfinished conversion; run the same convert command again to finish it")
        raise NotAPackError(f"{folder}: not a pack: no {C.MANIFEST}; make one with 'flashpack convert'")
    if path.stat().st_size > C.MAX_MANIFEST_BYTES:
        raise FormatError(f"{path}: larger than {C.MAX_MANIFEST_BYTES} bytes")
    raw = path.read_bytes()
    manifest = Manifest.from_bytes(raw)
    digest_path = folder / C.MANIFEST_DIGEST
    expected = digest_path.read_bytes() if digest_path.is_file() else b""
    if expected != f"{hexdigest(raw)}\n".encode():
        raise IntegrityError(
            f"{path}: its digest {hexdigest(raw)} is not the one in {C.MANIFEST_DIGEST}; the manifest is damaged"
        )
    return manifest, raw


class Pack:
    """An open pack. Opening reads the manifest and checks that every file is there with its size."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest, raw = read_manifest(self.folder)
        self.identity = hexdigest(raw)
        self.files: dict[str, FileEntry] = {f.path: f for f in self.manifest.files}
        for entry in self.manifest.files:
            path = self.folder / entry.path
            size = path.stat().st_size if path.is_file() else None
            if size != entry.size:
                found = "is missing" if size is None else f"has {size} bytes, not {entry.size}"
                raise IntegrityError(f"{path}: {found}; run 'flashpack verify {self.folder}' to see all damage")
        self._maps: dict[str, mmap.mmap] = {}

    def layer(self, index: int) -> Layer:
        """The MoE layer with this index."""
        return next(layer for layer in self.manifest.layers if layer.index == index)

    def open_shard(self, layer: Layer) -> Shard:
        """Open a layer's shard for reading; checks its header against the manifest."""
        return Shard(self.folder, layer, self.manifest.record_kinds, self.files[layer.path])

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Dense tensors by name."""
        return {t.name: t for t in self.manifest.tensors}

    def map_tensor(self, name: str) -> NDArray[np.generic]:
        """A dense tensor as a read-only array over the mapped file, without a copy.

        bfloat16 appears as uint16, fp8 as uint8 (``dtypes.NUMPY``).
        """
        entry = self.tensors[name]
        if entry.path not in self._maps:
            with open(self.folder / entry.path, "rb") as f:
                check_header(f.fileno(), self.files[entry.path], str(self.folder / entry.path))
                self._maps[entry.path] = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
        count = entry.nbytes // np.dtype(NUMPY[entry.dtype]).itemsize
        flat = np.frombuffer(self._maps[entry.path], NUMPY[entry.dtype], count, entry.offset)
        return flat.reshape(entry.shape)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all dense files: what is mapped when the model runs."""
        return sum(f.size for f in self.manifest.files if f.role == "dense")

    @property
    def expert_bytes(self) -> int:
        """Bytes of all expert records, padding included."""
        kinds = self.manifest.record_kinds
        return sum(count * kinds[k].stride for layer in self.manifest.layers for k, count in layer.kinds)


class Shard:
    """One layer's experts, open for positional reads."""

    def __init__(self, folder: Path, layer: Layer, kinds: tuple[RecordKind, ...], entry: FileEntry) -> None:
        self.layout = ShardLayout(layer, kinds)
        self.path = folder / layer.path
        self.fd = os.open(self.path, os.O_RDONLY)
        try:
            header = check_header(self.fd, entry, str(self.path))
            if header != self.layout.built[1]:
                raise FormatError(f"{self.path}: its header does not follow from the manifest")
            tail = bytes(pread(self.fd, header.size - self.layout.tail, self.layout.tail, str(self.path)))
            if hexdigest(tail) != entry.digests["tail"]:
                raise IntegrityError(f"{self.path}: the digest table is damaged; run 'flashpack verify'")
            self.table = self.layout.table(tail)
        except BaseException:
            os.close(self.fd)
            raise
        start = len(tail) - layer.experts * C.DIGEST_BYTES
        self.digests = [tail[start + C.DIGEST_BYTES * e :][: C.DIGEST_BYTES] for e in range(layer.experts)]

    def kind(self, expert: int) -> RecordKind:
        """The record kind of ``expert``."""
        return self.layout.kinds[int(self.table[expert, 0])]

    def extent(self, expert: int) -> tuple[int, int]:
        """(offset, stride) of the record of ``expert`` in the file."""
        kind, row = map(int, self.table[expert])
        return self.layout.extent(kind, row)

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_header(fd: int, entry: FileEntry, what: str) -> Header:
    """Read a pack file's header and compare its bytes with the manifest's digest."""
    header = read_header(fd, what)
    found = hexdigest(pread(fd, header.data_start, 0, what))
    if found != entry.digests["header"]:
        raise IntegrityError(f"{what}: the header is damaged: digest {found}, expected {entry.digests['header']}")
    return header
