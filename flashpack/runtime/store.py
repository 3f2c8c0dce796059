"""The expert store: parallel positional reads of records into a fixed, page-aligned arena.

``stream`` answers a layer's request: experts already here at once, the others as their reads complete, so that
kernels work while the drive does. The order in which experts come depends on the cache; callers must not let it
reach the result.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from flashpack.errors import IntegrityError
from flashpack.formats import Pack
from flashpack.formats.entries import Layer
from flashpack.formats.files import open_inside, pread_into
from flashpack.kernels import Kernels, RecordView
from flashpack.runtime.cache import Key, LruCache
from flashpack.runtime.stats import LayerStats, StoreStats

READ_THREADS = 8
"""Reads in flight. A drive reaches its rate only with several large reads queued."""


def scratch_bytes(pack: Pack) -> int:
    """Memory the readers of a compressed pack need for stored records before they are decoded."""
    layers = pack.manifest.layers
    strides = [pack.manifest.record_kinds[k].stride for x in layers if x.codec != "raw" for k, _ in x.kinds]
    return READ_THREADS * max(strides, default=0)


class ExpertStore:
    """Experts of an open pack, in memory as far as the arena goes.

    ``slots``: number of records of each stride that the arena holds (``Budget.slots``). ``check``: ``"first"``
    compares a record with its digest when it is first read, ``"always"`` at every read, ``"never"`` not at all; a
    record that fails never reaches a kernel, and its read raises ``IntegrityError``.
    """

    def __init__(self, pack: Pack, kernels: Kernels, slots: dict[int, int], check: str = "first") -> None:
        self._pack = pack
        self._kernels = kernels
        self._check = check
        self._checked: set[Key] = set()
        self._scratch = threading.local()
        self._shards = {layer.index: pack.open_shard(layer) for layer in pack.manifest.layers}
        size = sum(stride * count for stride, count in slots.items())
        # Private anonymous memory: page-aligned, as direct reads need it, and given back when the store is closed.
        self._arena = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = memoryview(self._arena)
        self._tensor = torch.frombuffer(self._arena, dtype=torch.uint8)
        self._caches: dict[int, LruCache] = {}
        start = 0
        for stride, count in slots.items():
            self._caches[stride] = LruCache([start + i * stride for i in range(count)])
            start += stride * count
        self._views: dict[tuple[int, int], RecordView] = {}
        fits = size >= pack.expert_bytes
        io, self._fds = _open_for_reading(pack, direct=not fits)
        self.stats = StoreStats(io, {layer: LayerStats() for layer in self._shards})
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="flashpack-read")

    def stream(self, layer: int, experts: list[int]) -> Iterator[tuple[int, RecordView]]:
        """Yield each of ``experts`` once with its record: first those in the arena, then the others as they are read.

        A record is valid until the next one is asked for.
        """
        shard, stats = self._shards[layer], self.stats.layers[layer]
        here: deque[tuple[int, int]] = deque()
        missing: deque[int] = deque()
        reading: deque[tuple[int, int, Future[None]]] = deque()
        for e in experts:
            slot = self._cache(layer, e).get((layer, e))
            if slot is None:
                missing.append(e)
            else:
                here.append((e, slot))
        stats.hits += len(here)
        stats.misses += len(missing)
        try:
            self._start_reads(layer, missing, reading)
            while here:
                e, slot = here[0]
                yield e, self._view(layer, e, slot)
                here.popleft()
                self._cache(layer, e).release((layer, e))
                self._start_reads(layer, missing, reading)
            while reading:
                e, slot, future = reading[0]
                begun = time.perf_counter()
                future.result()
                stats.wait_seconds += time.perf_counter() - begun
                stats.bytes_read += shard.extent(e)[1]
                yield e, self._view(layer, e, slot)
                reading.popleft()
                self._cache(layer, e).release((layer, e))
                self._start_reads(layer, missing, reading)
        finally:
            # Reached early only by an error or an abandoned loop: leave no pin and no half-read record behind.
            for e, _ in here:
                self._cache(layer, e).release((layer, e))
            for e, _, future in reading:
                future.cancel()
                if not future.cancelled():
                    future.exception()
                self._cache(layer, e).forget((layer, e))

    def close(self) -> None:
        """Stop reading and close the files; harmless if repeated."""
        self._pool.shutdown()
        for shard in self._shards.values():
            shard.close()
        for fd in self._fds.values():
            os.close(fd)
        self._shards, self._fds = {}, {}

    def _cache(self, layer: int, expert: int) -> LruCache:
        return self._caches[self._shards[layer].kind(expert).stride]

    def _start_reads(self, layer: int, missing: deque[int], reading: deque[tuple[int, int, Future[None]]]) -> None:
        """Start as many reads as there are slots that nobody uses."""
        while missing:
            e = missing[0]
            slot = self._cache(layer, e).claim((layer, e))
            if slot is None:
                return
            missing.popleft()
            reading.append((e, slot, self._pool.submit(self._read, (layer, e), slot)))

    def _read(self, key: Key, slot: int) -> None:
        layer, expert = key
        shard = self._shards[layer]
        offset, size = shard.extent(expert)
        record = self._bytes[slot : slot + shard.kind(expert).stride]
        # A frame is decoded from a buffer of its reader into the slot; a plain record is read where it will be used.
        stored = self._buffer()[:size] if shard.compressed else record
        try:
            pread_into(self._fds[layer], stored, offset, str(shard.path))
        except OSError as e:
            raise self._damaged(key, f"reading at byte {offset} failed: {e.strerror}") from e
        if self._check == "always" or (self._check == "first" and key not in self._checked):
            if not shard.intact(expert, stored):
                raise self._damaged(key, f"the record at byte {offset} is damaged")
            self._checked.add(key)
        if shard.compressed:
            shard.decode(expert, stored, record)

    def _buffer(self) -> memoryview:
        """This thread's page-aligned memory for a stored record, as direct reads need it."""
        if not hasattr(self._scratch, "buffer"):
            self._scratch.buffer = memoryview(mmap.mmap(-1, scratch_bytes(self._pack) // READ_THREADS))
        buffer: memoryview = self._scratch.buffer
        return buffer

    def _damaged(self, key: Key, what: str) -> IntegrityError:
        layer, expert = key
        folder = self._pack.folder
        return IntegrityError(
            f"{self._shards[layer].path}: layer {layer}, expert {expert}: {what}; "
            f"repair it with 'flashpack repair {folder} --from COPY_OR_SOURCE'"
        )

    def _view(self, layer: int, expert: int, slot: int) -> RecordView:
        kind = self._shards[layer].kind(expert)
        key = (slot, id(kind))
        view = self._views.get(key)
        if view is None:
            view = self._kernels.view_record(self._tensor[slot : slot + kind.stride], kind)
            self._views[key] = view
        return view


def _open_for_reading(pack: Pack, direct: bool) -> tuple[str, dict[int, int]]:
    """Descriptors by layer, and how they read. Direct: past the page cache, which would only hold what the arena
    has or has dropped; where the file system cannot, buffered."""
    if direct and sys.platform == "linux":
        try:
            return "direct", _open_all(pack, os.O_DIRECT)
        except OSError:
            pass  # tmpfs and some network file systems have no direct I/O; `io` in the statistics says so
    fds = _open_all(pack, 0)
    if direct and sys.platform == "darwin":
        import fcntl

        for fd in fds.values():
            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        return "direct", fds
    return "buffered", fds


def _open_all(pack: Pack, flags: int) -> dict[int, int]:
    fds: dict[int, int] = {}
    layers: tuple[Layer, ...] = pack.manifest.layers
    try:
        for layer in layers:
            fds[layer.index] = open_inside(pack.folder, layer.path, flags)
    except OSError:
        for fd in fds.values():
            os.close(fd)
        raise
    return fds
