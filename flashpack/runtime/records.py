"""Records of a pack: from the drive into memory, checked and decoded. Called by several reading threads at once."""

from __future__ import annotations

import mmap
import threading

from flashpack.errors import IntegrityError
from flashpack.formats import Pack
from flashpack.formats.files import pread_into
from flashpack.formats.records import RecordKind
from flashpack.kernels import Arena
from flashpack.runtime.cache import Key
from flashpack.runtime.drive import open_for_reading


def scratch_bytes(pack: Pack, readers: int) -> int:
    """Memory that so many readers of a compressed pack need for stored records before they are decoded."""
    layers = pack.manifest.layers
    strides = [pack.manifest.record_kinds[k].stride for x in layers if x.codec != "raw" for k, _ in x.kinds]
    return readers * max(strides, default=0)


class Records:
    """The open shards of a pack.

    ``check``: ``"first"`` compares a record with its digest when it is first read, ``"always"`` at every read,
    ``"never"`` not at all. ``arena``, ``available``, ``page_cache``, ``io``: see ``open_for_reading``.
    """

    def __init__(
        self, pack: Pack, check: str, arena: Arena, available: int, page_cache: bool = False, io: str | None = None
    ) -> None:
        self._pack = pack
        self._check = check
        self._checked: set[Key] = set()
        self._scratch = threading.local()
        self._shards = {layer.index: pack.open_shard(layer) for layer in pack.manifest.layers}
        self._kinds: dict[Key, RecordKind] = {}
        self.drive = open_for_reading(pack, self._shards, arena, available, page_cache, io)

    def kind(self, key: Key) -> RecordKind:
        """The record kind of an expert."""
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = self._shards[key[0]].kind(key[1])
        return kind

    def size(self, key: Key) -> int:
        """Bytes that are read for an expert."""
        return self._shards[key[0]].extent(key[1])[1]

    def read_into(self, key: Key, record: memoryview) -> None:
        """Fill ``record`` (stride bytes, page-aligned). Raises ``IntegrityError`` or ``FormatError``."""
        layer, expert = key
        shard = self._shards[layer]
        offset, size = shard.extent(expert)
        # A frame is decoded from memory of its reader into the record; a plain record is read where it will be used.
        stored = self._buffer()[:size] if shard.compressed else record
        try:
            pread_into(self.drive.fds[layer], stored, offset, str(shard.path))
        except OSError as e:
            raise self._damaged(key, f"reading at byte {offset} failed: {e.strerror}") from e
        if self._check == "always" or (self._check == "first" and key not in self._checked):
            if not shard.intact(expert, stored):
                raise self._damaged(key, f"the record at byte {offset} is damaged")
            self._checked.add(key)
        if shard.compressed:
            shard.decode(expert, stored, record)

    def close(self) -> None:
        """Close the files; harmless if repeated."""
        for shard in self._shards.values():
            shard.close()
        self.drive.close()
        self._shards = {}

    def _buffer(self) -> memoryview:
        """This thread's page-aligned memory for a stored record, as direct reads need it."""
        if not hasattr(self._scratch, "buffer"):
            self._scratch.buffer = memoryview(mmap.mmap(-1, scratch_bytes(self._pack, 1)))
        buffer: memoryview = self._scratch.buffer
        return buffer

    def _damaged(self, key: Key, what: str) -> IntegrityError:
        layer, expert = key
        folder = self._pack.folder
        return IntegrityError(
            f"{self._shards[layer].path}: layer {layer}, expert {expert}: {what}; "
            f"repair it with 'flashpack repair {folder} --from COPY_OR_SOURCE'"
        )
