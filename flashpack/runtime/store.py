"""The expert store: an arena of records, filled by parallel positional reads.

``batches`` answers a layer's request: experts already here at once, the others as their reads complete, so that
kernels work while the drive does. The order in which experts come depends on the cache and the drive; callers must not
let it reach the result.

One thread asks at a time. Reading threads touch only the bytes of their own slot: the caches and all counters belong to
the thread that asks, which hears of complete reads through ``ReadPool.landed``.
"""

from __future__ import annotations

import mmap
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from queue import Empty

from flashpack.errors import IntegrityError
from flashpack.formats import Pack
from flashpack.formats.files import pread_into
from flashpack.kernels import Kernels, RecordView
from flashpack.runtime.arena import Arena
from flashpack.runtime.cache import Key, LruCache
from flashpack.runtime.drive import open_for_reading
from flashpack.runtime.reads import READ_THREADS, Read, ReadPool, parts
from flashpack.runtime.stats import LayerStats, StoreStats

_MAX_GUESSES = 4
"""Records that may be on their way for a layer that has not asked yet."""


def scratch_bytes(pack: Pack) -> int:
    """Memory the readers of a compressed pack need for stored records before they are decoded."""
    layers = pack.manifest.layers
    strides = [pack.manifest.record_kinds[k].stride for x in layers if x.codec != "raw" for k, _ in x.kinds]
    return READ_THREADS * max(strides, default=0)


@dataclass(slots=True)
class _Request:
    """What one layer asked for and has not got yet. ``here``: (expert, slot) of the batch in use, pinned."""

    layer: int
    here: list[tuple[int, int]] = field(default_factory=list)
    missing: deque[int] = field(default_factory=deque)
    reading: dict[Key, Read] = field(default_factory=dict)


class ExpertStore:
    """Experts of an open pack, in memory as far as the arena goes.

    ``slots``: number of records of each stride that the arena holds (``Budget.slots``). ``check``: ``"first"``
    compares a record with its digest when it is first read, ``"always"`` at every read, ``"never"`` not at all; a
    record that fails never reaches a kernel, and its read raises ``IntegrityError``. ``prefetch``: whether
    ``prefetch`` reads anything.
    """

    def __init__(
        self, pack: Pack, kernels: Kernels, slots: dict[int, int], check: str = "first", prefetch: bool = False
    ) -> None:
        self._pack = pack
        self._kernels = kernels
        self._check = check
        self._prefetch = prefetch
        self._checked: set[Key] = set()
        self._scratch = threading.local()
        self._shards = {layer.index: pack.open_shard(layer) for layer in pack.manifest.layers}
        size = sum(stride * count for stride, count in slots.items())
        self._arena = Arena(size)
        self._caches: dict[int, LruCache] = {}
        self._free = dict(slots)
        start = 0
        for stride, count in slots.items():
            self._caches[stride] = LruCache([start + i * stride for i in range(count)])
            start += stride * count
        self._views: dict[tuple[int, int], RecordView] = {}
        self._reading: dict[Key, Read] = {}
        self._drive = open_for_reading(pack, size)
        self.stats = StoreStats(self._drive.io, {layer: LayerStats() for layer in self._shards})
        self._pool = ReadPool()
        weakref.finalize(self, self._pool.close)

    def batches(self, layer: int, experts: list[int]) -> Iterator[list[tuple[int, RecordView]]]:
        """Yield each of ``experts`` once with its record, in batches: first those in the arena, while the others are
        being read; then, each time, all whose reads have completed by now.

        The records of a batch are valid until the next batch is asked for. Where slots are few, there are more batches.
        """
        stats = self.stats.layers[layer]
        request = _Request(layer)
        self._settle()
        for e in experts:
            key = layer, e
            slot = self._cache(key).get(key)
            if slot is None:
                request.missing.append(e)
            elif key in self._reading:
                self._adopt(request, self._reading[key])
            else:
                request.here.append((e, slot))
        stats.hits += len(request.here)
        stats.misses += len(experts) - len(request.here)
        try:
            self._start(request)
            while request.here or request.reading or request.missing:
                if not request.here:
                    self._wait(request, stats)
                yield [(e, self._view((layer, e), slot)) for e, slot in request.here]
                self._release(request)
                self._start(request)
        finally:
            # Reached early only by an error or an abandoned loop: leave no pin behind. What is being read goes on
            # as if it had been read ahead.
            self._release(request)
            for read in request.reading.values():
                if read.ahead:
                    self._cache(read.key).release(read.key)
                read.wanted, read.ahead = False, True

    def prefetch(self, layer: int, experts: Iterable[int]) -> None:
        """Begin to read those of ``experts``, likeliest first, that are not here, as far as the drive is idle.

        ``layer`` has not asked for them yet. They never take the drive from what a layer waits for, and at most
        ``_MAX_GUESSES`` are on their way at once.
        """
        if not self._prefetch:
            return
        self._settle()
        for e in experts:
            if sum(not read.wanted for read in self._reading.values()) >= _MAX_GUESSES:
                return
            self._start_ahead((layer, e))

    def close(self) -> None:
        """Stop reading and close the files; harmless if repeated."""
        self._pool.close()
        for shard in self._shards.values():
            shard.close()
        self._drive.close()
        self._shards = {}

    def _stride(self, key: Key) -> int:
        return self._shards[key[0]].kind(key[1]).stride

    def _cache(self, key: Key) -> LruCache:
        return self._caches[self._stride(key)]

    def _claim(self, key: Key) -> int | None:
        """A slot for ``key``, pinned: without a record, or with one that the cache gives up; None if all are in use."""
        slot = self._cache(key).claim(key)
        if slot is not None and self._free[self._stride(key)]:
            self._free[self._stride(key)] -= 1
        return slot

    def _forget(self, key: Key) -> None:
        """The slot of ``key``, pinned once, has no record after all."""
        self._cache(key).forget(key)
        self._free[self._stride(key)] += 1

    def _start(self, request: _Request) -> None:
        """Start as many reads as there are slots that nobody uses."""
        started = []
        while request.missing:
            key = request.layer, request.missing[0]
            # A guess that has not begun gives way before a record that is here does.
            while not self._free[self._stride(key)] and (guess := self._pool.take_back()) is not None:
                del self._reading[guess.key]
                self._forget(guess.key)
            slot = self._claim(key)
            if slot is None:
                break
            request.missing.popleft()
            started.append(self._read(key, slot, wanted=True))
            request.reading[key] = started[-1]
        for read in started:
            self._begin(read, len(started))

    def _begin(self, read: Read, together: int) -> None:
        compressed = self._shards[read.key[0]].compressed
        pieces = [(0, read.size)] if compressed else parts(read.size, together)
        self._pool.start(read, pieces, self._fill, self._finish)

    def _start_ahead(self, key: Key) -> bool:
        """Have a record read that nobody asked for, if it is not here and a slot can be had."""
        slot = None if self._cache(key).contains(key) else self._claim(key)
        if slot is None:
            return False
        self._pool.start_ahead(self._read(key, slot, wanted=False), self._fill, self._finish)
        return True

    def _read(self, key: Key, slot: int, wanted: bool) -> Read:
        read = Read(key, slot, self._shards[key[0]].extent(key[1])[1], wanted, not wanted)
        self._reading[key] = read
        return read

    def _adopt(self, request: _Request, read: Read) -> None:
        """A record that is on its way already is wanted now; it is pinned by the request and by whoever began it."""
        request.reading[read.key] = read
        read.wanted = True
        if self._pool.take_back(read) is not None:
            read.ahead = False
            self._cache(read.key).release(read.key)
            self._begin(read, 1)

    def _wait(self, request: _Request, stats: LayerStats) -> None:
        """Wait until something of the request has been read; all that has been is in ``here`` then."""
        begun = time.perf_counter()
        error = None
        while not request.here and error is None:
            for read in self._landed(wait=True):
                if request.reading.pop(read.key, None) is None:
                    continue
                if read.error is None:
                    request.here.append((read.key[1], read.slot))
                error = error or read.error
            self._start(request)  # where slots are few, one that was awaited may be free now
        stats.wait_seconds += time.perf_counter() - begun
        if error is not None:
            raise error

    def _settle(self) -> None:
        """Take note of reads that have completed with nobody waiting."""
        for _ in self._landed(wait=False):
            pass

    def _landed(self, wait: bool) -> Iterator[Read]:
        """Reads that have completed by now, at least one if ``wait``; wanted ones are pinned by their request."""
        landed = self._pool.landed
        try:
            read = landed.get(block=wait)
            while True:
                self._land(read)
                yield read
                read = landed.get_nowait()
        except Empty:
            return

    def _land(self, read: Read) -> None:
        del self._reading[read.key]
        cache, stats = self._cache(read.key), self.stats.layers[read.key[0]]
        if read.error is None:
            stats.bytes_read += read.size
        if read.ahead and (read.wanted or read.error is None):
            cache.release(read.key)
        if read.error is not None:
            self._forget(read.key)

    def _release(self, request: _Request) -> None:
        for e, _ in request.here:
            key = request.layer, e
            self._cache(key).release(key)
        request.here.clear()

    # What follows runs in reading threads.

    def _fill(self, read: Read, start: int, end: int) -> None:
        layer, expert = read.key
        shard = self._shards[layer]
        offset = shard.extent(expert)[0] + start
        try:
            pread_into(self._drive.fds[layer], self._stored(read)[start:end], offset, str(shard.path))
        except OSError as e:
            raise self._damaged(read.key, f"reading at byte {offset} failed: {e.strerror}") from e

    def _finish(self, read: Read) -> None:
        layer, expert = read.key
        shard = self._shards[layer]
        stored = self._stored(read)
        if self._check == "always" or (self._check == "first" and read.key not in self._checked):
            if not shard.intact(expert, stored):
                raise self._damaged(read.key, f"the record at byte {shard.extent(expert)[0]} is damaged")
            self._checked.add(read.key)
        if shard.compressed:
            shard.decode(expert, stored, self._arena.bytes[read.slot : read.slot + self._stride(read.key)])

    def _stored(self, read: Read) -> memoryview:
        """Where the bytes of the file go: into the slot, or, to be decoded, into page-aligned memory of the thread."""
        if not self._shards[read.key[0]].compressed:
            return self._arena.bytes[read.slot : read.slot + read.size]
        if not hasattr(self._scratch, "buffer"):
            self._scratch.buffer = memoryview(mmap.mmap(-1, scratch_bytes(self._pack) // READ_THREADS))
        buffer: memoryview = self._scratch.buffer
        return buffer[: read.size]

    def _damaged(self, key: Key, what: str) -> IntegrityError:
        layer, expert = key
        folder = self._pack.folder
        return IntegrityError(
            f"{self._shards[layer].path}: layer {layer}, expert {expert}: {what}; "
            f"repair it with 'flashpack repair {folder} --from COPY_OR_SOURCE'"
        )

    def _view(self, key: Key, slot: int) -> RecordView:
        kind = self._shards[key[0]].kind(key[1])
        place = (slot, id(kind))
        view = self._views.get(place)
        if view is None:
            view = self._kernels.view_record(self._arena.tensor[slot : slot + kind.stride], kind)
            self._views[place] = view
        return view
