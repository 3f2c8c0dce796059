"""The expert store: an arena of records, filled by parallel positional reads.

``batches`` answers a layer's request: experts already here at once, the others as their reads complete, so that
kernels work while the drive does. The order in which experts come depends on the cache and the drive; callers must not
let it reach the result.

One thread asks at a time. Reading threads touch only the bytes of their own slot: the caches and all counters belong to
the thread that asks, which hears of complete reads through ``ReadPool.landed``.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import Empty

from flashpack.errors import CancelledError
from flashpack.formats import Pack
from flashpack.kernels import Kernels, RecordView
from flashpack.kernels.cpu.arena import PrefaultedMemory
from flashpack.runtime.cache import ExpertCache, Key
from flashpack.runtime.memory import available
from flashpack.runtime.prefetch import Guesses
from flashpack.runtime.profile import Profile
from flashpack.runtime.reads import Read, ReadPool
from flashpack.runtime.records import Records
from flashpack.runtime.stats import LayerStats, StoreStats

_MAX_GUESSES = 4
"""Records that may be on their way for a layer that has not asked yet."""


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
    ``prefetch`` reads anything. ``profile``: how files are read. ``early``: memory for the arena.
    ``cancelled``, if somebody sets it, is asked before each request, which raises ``CancelledError`` when it says yes.
    """

    def __init__(
        self,
        pack: Pack,
        kernels: Kernels,
        slots: dict[int, int],
        check: str = "first",
        prefetch: bool = False,
        profile: Profile | None = None,
        early: PrefaultedMemory | None = None,
    ) -> None:
        profile = profile or Profile()
        self._kernels = kernels
        room = available() + (early.taken if early else 0)
        self._arena = kernels.arena(sum(stride * count for stride, count in slots.items()), early)
        self._early = early
        self._records = Records(pack, check, self._arena, room, kernels.asynchronous, profile.io)
        self._caches: dict[int, ExpertCache] = {}
        self._free = dict(slots)
        start = 0
        for stride, count in slots.items():
            self._caches[stride] = ExpertCache([start + i * stride for i in range(count)])
            start += stride * count
        self._only = next(iter(self._caches.items())) if len(self._caches) == 1 else None
        self._views: dict[tuple[int, int], RecordView] = {}
        self._held: dict[int, Key] = {}  # by slot: the record that kernels may read
        self._watcher: Callable[[Key, RecordView | None], None] | None = None
        self._unread: set[int] = set()  # slots that kernels may still read, where they are asynchronous
        self._reading: dict[Key, Read] = {}
        self._arrived: list[Read] = []
        self._guesses = Guesses() if prefetch else None
        self._lacked = [True, True]  # whether the last step asked for a record that was not here, and this one
        self._last_layer, self._step_begun = -1, time.perf_counter()
        layers = {layer.index: LayerStats() for layer in pack.manifest.layers}
        self.stats = StoreStats(self._records.drive.io, self._records.drive.why, layers)
        self.cancelled: Callable[[], bool] | None = None
        self._pool = ReadPool(profile.readers)
        weakref.finalize(self, self._pool.close)

    def batches(self, layer: int, experts: list[int]) -> Iterator[list[tuple[int, RecordView]]]:
        """Yield each of ``experts`` once with its record, in batches: first those in the arena, while the others are
        being read; then, each time, all whose reads have completed by now.

        The records of a batch are valid until the next batch is asked for. Where slots are few, there are more batches.
        Where kernels are asynchronous, the caller has waited for them to have the router's choice: of what they were
        asked for before, nothing is left to do.
        """
        if self.cancelled is not None and self.cancelled():
            raise CancelledError("cancelled")
        begun = time.perf_counter()
        if self._early is not None:
            self._early.stop()  # from now on the reads take what they need
            self._early = None
        self._unread.clear()
        if layer <= self._last_layer or not self.stats.steps:
            self._step(begun)
        self._last_layer = layer
        stats = self.stats.layers[layer]
        request = self._request(layer, experts)
        stats.hits += len(request.here)
        stats.misses += len(experts) - len(request.here)
        found, waited, used = bool(request.here), stats.wait_seconds, 0.0
        try:
            self._start(request)
            while request.here or request.reading or request.missing:
                if not request.here:
                    self._kernels.commit()
                    self._wait(request, stats)
                batch = [(e, self._view((layer, e), slot)) for e, slot in request.here]
                handed = time.perf_counter()
                yield batch
                seconds = time.perf_counter() - handed
                used += seconds
                if found:
                    stats.hit_seconds += seconds
                else:
                    stats.miss_seconds += seconds
                found = False
                self._release(request)
                self._start(request)
        finally:
            # Reached early only by an error or an abandoned loop: leave no pin behind. What is being read goes on
            # as if it had been read ahead.
            self._release(request)
            for read in request.reading.values():
                arrived = read in self._arrived
                if read.error is None if arrived else read.ahead:
                    self._cache(read.key).release(read.key)
                read.wanted, read.ahead = False, True
            self._arrived.clear()
            stats.own_seconds += time.perf_counter() - begun - used - (stats.wait_seconds - waited)

    def watch(self, watcher: Callable[[Key, RecordView | None], None]) -> None:
        """Have ``watcher`` told of each record that has been read into the arena, before now or later, and of each that
        is not there any more (None), before its memory is read into. It is called by the thread that asks."""
        self._watcher = watcher
        for slot, key in self._held.items():
            watcher(key, self._view(key, slot))

    def begin(self) -> None:
        """A step begins, before any layer asks: a watcher knows from now on of all that has been read. Raises
        ``CancelledError``."""
        if self.cancelled is not None and self.cancelled():
            raise CancelledError("cancelled")
        self._settle()
        if self._last_layer >= 0 or not self.stats.steps:
            self._step(time.perf_counter())
        self._last_layer = -1

    def found(self, layer: int, experts: list[int], seconds: float) -> None:
        """What ``batches`` takes note of, for experts that were all in the arena and were used for ``seconds``, of a
        step that has begun."""
        begun = time.perf_counter()
        self._last_layer = layer
        stats = self.stats.layers[layer]
        for stride, cache in self._caches.items():
            if some := [e for e in experts if self._stride((layer, e)) == stride]:
                cache.use(layer, some)
        self._judge(layer, experts)
        stats.hits += len(experts)
        stats.hit_seconds += seconds
        stats.own_seconds += time.perf_counter() - begun

    def holds(self, layer: int, expert: int) -> bool:
        """Whether an expert is in the arena, or being read; it does not count as used."""
        return self._cache((layer, expert)).contains((layer, expert))

    @property
    def asynchronous(self) -> bool:
        """Whether kernels may still run when a call has returned."""
        return self._kernels.asynchronous

    @property
    def prefetches(self) -> bool:
        """Whether ``prefetch`` is ever of use."""
        return self._guesses is not None

    @property
    def guessing(self) -> bool:
        """Whether ``prefetch`` would read anything now: not where the last step found all that it asked for."""
        return self._guesses is not None and self._guesses.gate.on and self._lacked[0]

    def prefetch(self, layer: int, experts: Iterable[int]) -> None:
        """Begin to read those of ``experts``, likeliest first, that are not here: ``layer`` is going to ask for them.

        They are read only while the drive has nothing to do that somebody waits for, and few at a time. Whether at all,
        ``Gate`` decides.
        """
        if self._guesses is None or not self.guessing:
            return
        self._settle()
        for e in experts:
            if sum(not read.wanted for read in self._reading.values()) >= _MAX_GUESSES:
                return
            if self._start_ahead((layer, e), urgent=True):
                self._guesses.add((layer, e))

    def warm(self, scores: Mapping[Key, float]) -> None:
        """Begin with what is known of earlier runs: the chance of experts to be asked for, hottest first.

        As many as there are free slots are read, when nobody waits for the drive.
        """
        for stride, cache in self._caches.items():
            cache.seed({key: score for key, score in scores.items() if self._stride(key) == stride})
        for key in scores:
            if self._free[self._stride(key)]:
                self._start_ahead(key, urgent=False)

    def resident(self) -> list[Key]:
        """The experts that are in the arena, or being read; any thread may ask."""
        return [key for cache in self._caches.values() for key in cache.resident()]

    def used(self) -> list[Key]:
        """The experts that the step under way, or the last one, has asked for so far; any thread may ask."""
        return [key for cache in self._caches.values() for key in cache.used()]

    def ranking(self) -> list[tuple[Key, float]]:
        """Experts with their chance to be asked for at the next step, as ``warm`` wants them; empty if none was."""
        ranked = [one for cache in self._caches.values() for one in cache.ranking()]
        return sorted(ranked, key=lambda one: (-one[1], one[0])) if self.stats.steps else []

    def close(self) -> None:
        """Stop reading and close the files; harmless if repeated."""
        if self._early is not None:
            self._early.stop()
        self._pool.close()
        self._records.close()

    def _step(self, now: float) -> None:
        """The first layer asks again: a token, or a chunk of a prompt, is done."""
        if self._guesses is not None and self.stats.steps:
            self._guesses.gate.step(now - self._step_begun)
        self.stats.steps += 1
        self._step_begun = now
        self._lacked = [self._lacked[1], False]

    def _stride(self, key: Key) -> int:
        return self._only[0] if self._only else self._records.kind(key).stride

    def _cache(self, key: Key) -> ExpertCache:
        return self._only[1] if self._only else self._caches[self._records.kind(key).stride]

    def _request(self, layer: int, experts: list[int]) -> _Request:
        """What is here, pinned; what is on its way already; and what is missing."""
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
        if len(request.here) < len(experts):
            self._lacked[1] = True
        self._judge(layer, experts)
        return request

    def _judge(self, layer: int, experts: list[int]) -> None:
        """What was read ahead for a layer's request is not kept for it any longer."""
        if self._guesses is None:
            return
        right, wrong = self._guesses.judge(layer, experts)
        if right:
            self._lacked[1] = True
        self.stats.layers[layer].guesses += len(right) + len(wrong)
        self.stats.layers[layer].right_guesses += len(right)
        self._let_go(right | wrong)

    def _start(self, request: _Request) -> None:
        """Start as many reads as there are slots that nobody uses."""
        while request.missing:
            key = request.layer, request.missing[0]
            slot = self._claim(key)
            if slot is None:
                return
            request.missing.popleft()
            request.reading[key] = self._read(key, slot, wanted=True)
            self._pool.start(request.reading[key], self._fill)

    def _claim(self, key: Key) -> int | None:
        """A slot for ``key``, pinned: without a record, or with one that the cache gives up; None if all are in use.

        What was to be read ahead and has not begun gives way before a record that is here does.
        """
        stride, cache = self._stride(key), self._cache(key)
        while not self._free[stride] and (guess := self._pool.take_back()) is not None:
            self._drop(guess)
        slot = cache.claim(key)
        if slot is None and self._guesses is not None:
            self._let_go(self._guesses.clear())
            slot = cache.claim(key)
        if slot is not None and self._free[stride]:
            self._free[stride] -= 1
        if slot in self._unread:
            self._kernels.wait()
            self._unread.clear()
        return slot

    def _start_ahead(self, key: Key, urgent: bool) -> bool:
        """Have a record read that nobody asked for, if it is not here and a slot can be had."""
        stride, cache = self._stride(key), self._cache(key)
        slot = None if cache.contains(key) else cache.claim(key, urgent)
        if slot is None:
            return False
        if self._free[stride]:
            self._free[stride] -= 1
        self._pool.start_ahead(self._read(key, slot, wanted=False), self._fill)
        return True

    def _read(self, key: Key, slot: int, wanted: bool) -> Read:
        before = self._held.pop(slot, None)
        if before is not None and self._watcher is not None:
            self._watcher(before, None)
        read = Read(key, slot, self._records.size(key), wanted, not wanted)
        self._reading[key] = read
        return read

    def _adopt(self, request: _Request, read: Read) -> None:
        """A record that is on its way already is wanted now; it is pinned by the request and by whoever began it."""
        request.reading[read.key] = read
        read.wanted = True
        if self._pool.take_back(read) is not None:
            read.ahead = False
            self._cache(read.key).release(read.key)
            self._pool.start(read, self._fill)

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
        """Take note of reads that have completed; those of the request being served are kept for it."""
        self._arrived = [read for read in self._landed(wait=False) if read.wanted]

    def _landed(self, wait: bool) -> Iterator[Read]:
        """Reads that have completed by now, at least one if ``wait``; wanted ones are pinned by their request."""
        arrived, self._arrived = self._arrived, []
        yield from arrived
        landed = self._pool.landed
        try:
            read = landed.get(block=wait and not arrived)
            while True:
                self._land(read)
                yield read
                read = landed.get_nowait()
        except Empty:
            return

    def _land(self, read: Read) -> None:
        key, stats = read.key, self.stats.layers[read.key[0]]
        del self._reading[key]
        if read.error is not None:
            if read.ahead and read.wanted:
                self._cache(key).release(key)
            self._forget(key)
            return
        self._held[read.slot] = key
        if self._watcher is not None:
            self._watcher(key, self._view(key, read.slot))
        stats.reads += 1
        stats.bytes_read += read.size
        if read.ahead:
            stats.ahead_bytes += read.size
            if self._guesses is None or key not in self._guesses:  # a guess stays until its layer asks
                self._cache(key).release(key)

    def _drop(self, read: Read) -> None:
        """Forget a read that was taken back."""
        del self._reading[read.key]
        self._forget(read.key)

    def _forget(self, key: Key) -> None:
        """The slot of ``key``, pinned once, has no record after all."""
        if self._guesses is not None:
            self._guesses.discard(key)
        self._cache(key).forget(key)
        self._free[self._stride(key)] += 1

    def _let_go(self, guesses: Iterable[Key]) -> None:
        """Those that have been read are pinned no more; those on their way will be let go when they land."""
        for key in guesses:
            if key not in self._reading:
                self._cache(key).release(key)

    def _release(self, request: _Request) -> None:
        if self._kernels.asynchronous:
            self._unread.update(slot for _, slot in request.here)
        for e, _ in request.here:
            key = request.layer, e
            self._cache(key).release(key)
        request.here.clear()

    def _fill(self, read: Read) -> None:
        """In a reading thread: the record into its slot."""
        record = self._arena.room(read.slot, self._stride(read.key))
        self._records.read_into(read.key, record)
        self._arena.landed(read.slot, record)

    def _view(self, key: Key, slot: int) -> RecordView:
        kind = self._records.kind(key)
        place = (slot, id(kind))
        view = self._views.get(place)
        if view is None:
            view = self._kernels.view_record(self._arena.tensor[slot : slot + kind.stride], kind)
            self._views[place] = view
        return view
