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

from flashpack.errors import FormatError, IdentityError, IntegrityError, NotAPackError
from flashpack.formats import codecs
from flashpack.formats import constants as C
from flashpack.formats.checksums import digest, hexdigest, hexdigest_of
from flashpack.formats.dtypes import NUMPY
from flashpack.formats.entries import FileEntry, Layer, TensorEntry
from flashpack.formats.files import chunks, open_inside, pread, read_ahead
from flashpack.formats.manifest import Manifest
from flashpack.formats.records import RecordKind


def read_manifest(folder: Path) -> tuple[Manifest, bytes]:
    """Read and check the manifest and its digest; returns it with its bytes."""
    path = folder / C.MANIFEST
    raw = manifest_bytes(folder)
    if digest_file_bytes(folder) != f"{hexdigest(raw)}\n".encode():
        raise IntegrityError(
            f"{path}: its digest {hexdigest(raw)} is not the one in {C.MANIFEST_DIGEST}; one of the two is damaged"
        )
    return Manifest.from_bytes(raw), raw


def require_folder(folder: Path) -> None:
    """Raises ``NotAPackError`` if ``folder`` is none."""
    if not folder.is_dir():
        raise NotAPackError(f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}")


def manifest_bytes(folder: Path) -> bytes:
    """The bytes of the manifest; raises ``NotAPackError`` if there is none."""
    path = folder / C.MANIFEST
    require_folder(folder)
    try:
        fd = open_inside(folder, C.MANIFEST)
    except FileNotFoundError as e:
        if (folder / C.JOURNAL).exists():
            raise NotAPackError(
                f"{folder}: an unfinished conversion; run the same convert command again to finish it"
            ) from e
        raise NotAPackError(f"{folder}: not a pack: no {C.MANIFEST}; make one with 'flashpack convert'") from e
    except OSError as e:
        raise NotAPackError(f"{path}: cannot be opened as a plain file: {e.strerror}") from e
    try:
        size = os.fstat(fd).st_size
        if size > C.MAX_MANIFEST_BYTES:
            raise FormatError(f"{path}: larger than {C.MAX_MANIFEST_BYTES} bytes")
        return bytes(pread(fd, size, 0, str(path)))
    finally:
        os.close(fd)


def digest_file_bytes(folder: Path) -> bytes:
    """The beginning of the file with the manifest's digest; empty if there is none."""
    try:
        fd = open_inside(folder, C.MANIFEST_DIGEST)
    except OSError:
        return b""
    try:
        return os.pread(fd, 2 * C.DIGEST_BYTES + 2, 0)
    finally:
        os.close(fd)


class Pack:
    """An open pack. Opening reads the manifest and checks that every file is there with its size.

    ``expect``: the identity the pack must have; any other pack is refused with ``IdentityError``.
    """

    def __init__(self, folder: str | os.PathLike[str], expect: str | None = None) -> None:
        self.folder = Path(folder)
        self.manifest, raw = read_manifest(self.folder)
        self.identity = hexdigest(raw)
        check_identity(self.folder, self.identity, expect)
        self.files: dict[str, FileEntry] = self.manifest.by_path
        for entry in self.manifest.files:
            fd = self.open(entry.path)
            size = os.fstat(fd).st_size
            os.close(fd)
            if size != entry.size:
                raise self._damaged(entry.path, f"has {size} bytes, not {entry.size}")
        self._maps: dict[str, mmap.mmap] = {}

    def open(self, path: str, flags: int = 0) -> int:
        """A descriptor of a file of the pack, for reading; never one outside it."""
        try:
            return open_inside(self.folder, path, flags)
        except FileNotFoundError as e:
            raise self._damaged(path, "is missing") from e
        except OSError as e:
            raise self._damaged(path, f"cannot be opened as a plain file ({e.strerror})") from e

    def _damaged(self, path: str, what: str) -> IntegrityError:
        return IntegrityError(f"{self.folder / path}: {what}; run 'flashpack verify {self.folder}' to see all damage")

    def check_copies(self) -> None:
        """Compare the copied files (config, tokenizer, ...) with their digests, and refuse files nobody listed.

        Libraries read these by name, so all that they could find must be what the manifest says.
        """
        for entry in self.manifest.files:
            if entry.role == "copy":
                fd = self.open(entry.path)
                try:
                    found = hexdigest_of(chunks(fd, 0, entry.size, entry.path))
                finally:
                    os.close(fd)
                if found != entry.digests["file"]:
                    raise self._damaged(entry.path, "is damaged")
        for path in unlisted(self.folder, self.manifest):
            raise FormatError(f"{self.folder / path}: not listed in the manifest; remove it, it is no part of the pack")

    def layer(self, index: int) -> Layer:
        """The MoE layer with this index."""
        return next(layer for layer in self.manifest.layers if layer.index == index)

    def open_shard(self, layer: Layer) -> Shard:
        """Open a layer's shard for reading; checks its header against the manifest."""
        return Shard(self, layer)

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
            fd = self.open_dense(entry.path)
            try:
                self._maps[entry.path] = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
            finally:
                os.close(fd)
        count = entry.nbytes // np.dtype(NUMPY[entry.dtype]).itemsize
        flat = np.frombuffer(self._maps[entry.path], NUMPY[entry.dtype], count, entry.offset)
        return flat.reshape(entry.shape)

    def read_ahead(self) -> None:
        """Have the system read the dense files in the background: a mapped page comes only when it is touched."""
        for path in self.manifest.dense_tensors:
            fd = self.open(path)
            try:
                read_ahead(fd, self.files[path].size)
            finally:
                os.close(fd)

    def open_dense(self, path: str) -> int:
        """A descriptor of a dense file whose header is as the manifest says."""
        fd = self.open(path)
        try:
            check_header(fd, self.manifest.dense_layout(path)[0], self.files[path], self.folder)
        except BaseException:
            os.close(fd)
            raise
        return fd

    @property
    def dense_bytes(self) -> int:
        """Bytes of all dense files: what is mapped when the model runs."""
        return sum(f.size for f in self.manifest.files if f.role == "dense")

    @property
    def expert_bytes(self) -> int:
        """Bytes of all expert records, padding included, as they lie in memory."""
        kinds = self.manifest.record_kinds
        return sum(count * kinds[k].stride for layer in self.manifest.layers for k, count in layer.kinds)


class Shard:
    """One layer's experts, open for positional reads."""

    def __init__(self, pack: Pack, layer: Layer) -> None:
        self.layout = pack.manifest.shard_layout(layer)
        self.path = pack.folder / layer.path
        entry = pack.files[layer.path]
        self.fd = pack.open(layer.path)
        try:
            check_header(self.fd, self.layout.header_bytes, entry, pack.folder)
            tail = bytes(pread(self.fd, self.layout.tail_bytes, self.layout.tail, str(self.path)))
            if hexdigest(tail) != entry.digests["tail"]:
                raise IntegrityError(f"{self.path}: the digest table is damaged; run 'flashpack verify {pack.folder}'")
            self.tail = self.layout.parse_tail(tail)
        except BaseException:
            os.close(self.fd)
            raise

    def kind(self, expert: int) -> RecordKind:
        """The record kind of ``expert``."""
        return self.layout.kinds[int(self.tail.table[expert, 0])]

    def extent(self, expert: int) -> tuple[int, int]:
        """(offset, bytes) of the stored record of ``expert``: whole pages, to be read at once."""
        return self.tail.offsets[expert], self.tail.spans[expert]

    @property
    def compressed(self) -> bool:
        """Whether stored records must be decoded."""
        return self.layout.layer.codec != "raw"

    def intact(self, expert: int, stored: memoryview) -> bool:
        """Whether the bytes of the extent are those that were written."""
        return digest(stored) == self.tail.digests[expert]

    def decode(self, expert: int, stored: memoryview, record: memoryview) -> None:
        """Fill ``record`` (stride bytes) from the bytes of the extent; check them with ``intact`` before."""
        what = f"{self.path}: layer {self.layout.layer.index}, expert {expert}"
        codecs.decode(stored[: self.tail.sizes[expert]], record, what)

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_header(fd: int, expected: bytes, entry: FileEntry, folder: Path) -> None:
    """A large file must begin with the header that follows from the manifest."""
    what = f"{folder / entry.path}"
    if bytes(pread(fd, len(expected), 0, what)) != expected:
        raise IntegrityError(f"{what}: the header is damaged; run 'flashpack verify {folder}' to see all damage")


def check_identity(folder: Path, identity: str, expect: str | None) -> None:
    """Refuse a pack that is not the one its user wants."""
    if expect is not None and identity != expect.strip().lower():
        raise IdentityError(f"{folder}: its identity is {identity}, not the expected {expect}: another pack")


def unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """Files in the folder that the manifest does not know, except hidden ones (systems leave them) and the journal.

    A link is a file here, wherever it leads; a folder that cannot be looked into (too deep, not readable) also.
    """
    known = {*manifest.by_path, C.MANIFEST, C.MANIFEST_DIGEST, C.JOURNAL}
    found, todo = [], [""]
    while todo:  # a loop, because a stranger's folders may be deeper than calls can be
        inside = todo.pop()
        try:
            for entry in os.scandir(folder / inside):
                path = f"{inside}/{entry.name}".lstrip("/")
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    todo.append(path)
                elif path not in known:
                    found.append(path)
        except OSError as e:
            if not inside:
                raise FormatError(f"{folder}: its files cannot be listed: {e.strerror}") from e
            found.append(inside)
    return sorted(found)
