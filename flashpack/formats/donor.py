"""Another copy of a pack, in a folder or behind a URL, as a donor for a repair.

Pieces are found by the digest of their content, so the copy may have another codec, or share only a part. fsspec
reads it: http(s), and what else is installed for it (s3, hf, ...).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flashpack.errors import FlashpackError, NotAPackError, SourceError
from flashpack.formats import codecs
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.entries import FileEntry, Layer, TensorEntry
from flashpack.formats.files import READ_CHUNK
from flashpack.formats.findings import Region
from flashpack.formats.layout import Tail
from flashpack.formats.manifest import Manifest
from flashpack.formats.repair import Bytes, encode_stored


class PackDonor:
    """The pack at ``where``, called ``name`` in messages.

    Raises ``SourceError`` if it cannot be read, ``NotAPackError`` if it is none.
    """

    def __init__(self, where: str, name: str | None = None) -> None:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        self.name = name or where
        try:
            self._fs, self._root = url_to_fs(where)
        except (ValueError, ImportError) as e:
            raise SourceError(f"{self.name}: cannot be opened: {e}") from e
        self._open: dict[str, Any] = {}
        self._raw = self._read_manifest()
        self._manifest = Manifest.from_bytes(self._raw)
        self._layers = {layer.index: layer for layer in self._manifest.layers}
        self._tensors = {t.digest: t for t in self._manifest.tensors}
        self._tails: dict[int, Tail | None] = {}

    def manifest_bytes(self) -> bytes | None:
        return self._raw

    def tail(self, layer: Layer) -> bytes | None:
        mine = self._layers.get(layer.index)
        if mine is None:
            return None
        layout = self._manifest.shard_layout(mine)
        return self._read(mine.path, layout.tail, layout.tail_bytes)

    def stored(self, region: Region, layer: Layer) -> Iterator[Bytes]:
        content = bytes.fromhex(region.expected if region.frame is None else region.frame[2])
        mine, tail = self._layers.get(layer.index), self._parsed(layer)
        if mine is None or tail is None or content not in tail.contents:
            return
        expert = tail.contents.index(content)
        data = memoryview(self._read(mine.path, tail.offsets[expert], tail.spans[expert]))
        yield data
        if (mine.codec, layer.codec) != ("raw", "raw"):
            stride = self._manifest.shard_layout(mine).stride(int(tail.table[expert, 0]))
            record = memoryview(bytearray(stride))
            if hexdigest(data) == tail.digests[expert].hex():
                codecs.decode(data[: tail.sizes[expert]], record, self.name)
                yield encode_stored(record, layer.codec)

    def tensor(self, entry: TensorEntry) -> Iterator[Bytes] | None:
        mine = self._tensors.get(entry.digest)
        return None if mine is None or mine.nbytes != entry.nbytes else self._pieces(mine)

    def copy(self, entry: FileEntry) -> bytes | None:
        for mine in self._manifest.files:
            if mine.digests.get("file") == entry.digests["file"] and mine.size == entry.size:
                return self._read(mine.path, 0, mine.size)
        return None

    def close(self) -> None:
        """Close all files."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _pieces(self, tensor: TensorEntry) -> Iterator[Bytes]:
        for at in range(0, tensor.nbytes, READ_CHUNK):
            yield self._read(tensor.path, tensor.offset + at, min(READ_CHUNK, tensor.nbytes - at))

    def _parsed(self, layer: Layer) -> Tail | None:
        if layer.index not in self._tails:
            raw, mine = self.tail(layer), self._layers.get(layer.index)
            self._tails[layer.index] = None
            if raw is not None and mine is not None:
                try:
                    self._tails[layer.index] = self._manifest.shard_layout(mine).parse_tail(raw)
                except FlashpackError:
                    return None  # damaged here, too
        return self._tails[layer.index]

    def _read_manifest(self) -> bytes:
        try:
            size = self._fs.size(f"{self._root}/{C.MANIFEST}")
        except Exception as e:  # whatever the file system's library raises
            # fsspec says "not found" of a server that does not answer, too; its cause tells them apart.
            if isinstance(e, FileNotFoundError) and (e.__cause__ is None or getattr(e.__cause__, "status", 0) == 404):
                raise NotAPackError(f"{self.name}: no {C.MANIFEST} there: not a pack") from e
            raise SourceError(f"{self.name}: cannot be read: {e.__cause__ or e}") from e
        if size is None or size > C.MAX_MANIFEST_BYTES:
            raise SourceError(f"{self.name}: the server does not tell the size of {C.MANIFEST}, or it is too large")
        return self._read(C.MANIFEST, 0, size)

    def _read(self, path: str, offset: int, size: int) -> bytes:
        """Bytes of a file there; ``SourceError`` says why not."""
        where = f"{self._root}/{path}"
        try:
            if path not in self._open:
                self._open[path] = self._fs.open(where, "rb", cache_type="none")
            self._open[path].seek(offset)
            data: bytes = self._open[path].read(size)
        except Exception as e:  # whatever the file system's library raises
            raise SourceError(f"{self.name}/{path}: reading at byte {offset} failed: {e or type(e).__name__}") from e
        return data
