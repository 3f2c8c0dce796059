"""Policies of expert caches: the runtime's own, those of the literature, and Belady's optimum.

A request is what the store asks for one layer of one step (a token, or a chunk of a prompt): distinct experts, in
ascending order. All are looked up, hits first, then the missing ones are loaded, each in a slot; none of them may evict
another of the same request, unless there are fewer slots than the request needs. Every miss is loaded.

Experts are numbered over all layers (keys): row of the layer * experts of a layer + expert.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

from flashpack.runtime.cache import ExpertCache, Key

Request: TypeAlias = tuple[int, list[int]]
"""Number of the step, and keys, ascending."""


class Policy(Protocol):
    """A cache of some number of slots, empty at first."""

    def request(self, step: int, keys: Sequence[int]) -> int:
        """Serve a request; how many of ``keys`` were there."""


MakePolicy: TypeAlias = Callable[[int, int, Sequence[Request]], Policy]
"""(slots, experts of a layer, all requests to come) -> an empty cache; only ``Belady`` looks at the requests."""


class Runtime:
    """``ExpertCache``, asked in the order in which ``ExpertStore.batches`` asks it.

    Where a request needs more slots than there are, the store gives back what has been computed as reads complete; here
    they complete one by one, in the order in which they began. In a run they may not, and then what is left in memory
    may be something else; where slots are enough, the order does not matter, and hits are those of a run.
    """

    def __init__(self, slots: int, width: int, requests: Sequence[Request] = ()) -> None:
        self._cache = ExpertCache(list(range(slots)))
        self._width = width

    def request(self, step: int, keys: Sequence[int]) -> int:
        cache, width = self._cache, self._width
        pairs = [divmod(key, width) for key in keys]
        missing: list[Key] = []
        pinned: list[Key] = []
        for pair in pairs:
            (missing if cache.get(pair) is None else pinned).append(pair)
        hits, at, reading = len(pinned), 0, 0  # missing[reading:at] are being read
        while True:
            while at < len(missing) and cache.claim(missing[at]) is not None:
                at += 1
            if pinned:
                for pair in pinned:
                    cache.release(pair)
                pinned = []
            elif reading < at:
                # All at once where nothing waits for a slot: the order of releases makes no difference then.
                end = at if at == len(missing) else reading + 1
                pinned, reading = missing[reading:end], end
            else:
                return hits


class Lru:
    """Evicts what was used longest ago."""

    def __init__(self, slots: int, width: int = 0, requests: Sequence[Request] = ()) -> None:
        self._slots = slots
        self._here: OrderedDict[int, None] = OrderedDict()

    def request(self, step: int, keys: Sequence[int]) -> int:
        here = self._here
        missing = []
        for key in keys:
            if key in here:
                here.move_to_end(key)
            else:
                missing.append(key)
        for key in missing:
            if len(here) >= self._slots:
                here.popitem(last=False)
            here[key] = None
        return len(keys) - len(missing)


class Lfu:
    """Evicts what was used least often, uses counting half as much every ``half_life`` steps; counts outlive eviction.

    That is in-memory LFU with aging. Of equal counts the one used longest ago goes first.
    """

    def __init__(self, half_life: float, slots: int, width: int = 0, requests: Sequence[Request] = ()) -> None:
        self._slots, self._half_life = slots, half_life
        # Logarithms of counts as they would be in the last step, so that ageing the others is not needed.
        self._counts: dict[int, float] = {}
        self._here: dict[int, int] = {}  # with the time of the last use
        self._heap: list[tuple[float, int, int]] = []
        self._time = 0

    def request(self, step: int, keys: Sequence[int]) -> int:
        here, heap = self._here, self._heap
        missing = []
        for key in keys:
            self._count(step, key)
            if key in here:
                self._hold(key)
            else:
                missing.append(key)
        held = set(keys)
        for key in missing:
            if len(here) >= self._slots:
                self._evict(held)
            self._hold(key)
        if len(heap) > 8 * self._slots + 64:
            self._heap = [entry for entry in heap if here.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
        return len(keys) - len(missing)

    def _count(self, step: int, key: int) -> None:
        now = step / self._half_life
        before = self._counts.get(key)
        self._counts[key] = now if before is None else now + math.log2(1 + 2 ** (before - now))

    def _hold(self, key: int) -> None:
        self._time += 1
        self._here[key] = self._time
        heapq.heappush(self._heap, (self._counts[key], self._time, key))

    def _evict(self, held: set[int]) -> None:
        aside = []
        while self._heap:
            entry = heapq.heappop(self._heap)
            if self._here.get(entry[2]) != entry[1]:
                continue
            if entry[2] not in held:
                break
            aside.append(entry)
        else:
            entry = aside.pop(0)  # the request alone is more than there are slots
        del self._here[entry[2]]
        for kept in aside:
            heapq.heappush(self._heap, kept)


class S3Fifo:
    """Yang et al., FIFO queues are all you need for cache eviction (SOSP 2023).

    A small queue (a tenth) for newcomers, of which those go on that were used again; a main queue, whose entries come
    round again as often as they were used, up to three times; a ghost queue of as many evicted keys as there are slots,
    which skip the small queue if they are back.
    """

    def __init__(self, slots: int, width: int = 0, requests: Sequence[Request] = ()) -> None:
        self._slots = slots
        self._small_slots = max(1, slots // 10)
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._ghost: OrderedDict[int, None] = OrderedDict()
        self._counts: dict[int, int] = {}

    def request(self, step: int, keys: Sequence[int]) -> int:
        counts = self._counts
        missing = []
        for key in keys:
            if key in counts:
                counts[key] = min(3, counts[key] + 1)
            else:
                missing.append(key)
        held = set(keys) if len(keys) <= self._slots else set()
        for key in missing:
            while len(counts) >= self._slots:
                self._advance(held)
            (self._main if key in self._ghost else self._small).append(key)
            self._ghost.pop(key, None)
            counts[key] = 0
        return len(keys) - len(missing)

    def _advance(self, held: set[int]) -> None:
        """Move, or evict, the oldest of a queue; ``held`` stay."""
        counts = self._counts
        if len(self._small) >= self._small_slots or not self._main:
            key = self._small.popleft()
            if counts[key] or key in held:
                counts[key] = 0
                self._main.append(key)
            else:
                del counts[key]
                self._ghost[key] = None
                if len(self._ghost) > self._slots:
                    self._ghost.popitem(last=False)
        else:
            key = self._main.popleft()
            if counts[key] or key in held:
                counts[key] = max(0, counts[key] - 1)
                self._main.append(key)
            else:
                del counts[key]


class Belady:
    """Evicts what is used furthest in the future (Belady 1966, MIN): no policy that loads every miss has more hits."""

    def __init__(self, slots: int, width: int, requests: Sequence[Request]) -> None:
        self._slots = slots
        later: dict[int, int] = {}
        self._uses: list[list[int]] = []  # by request, the last one first: when each of its keys is asked for next
        for at in range(len(requests) - 1, -1, -1):
            keys = requests[at][1]
            self._uses.append([later.get(key, len(requests)) for key in keys])
            later.update(dict.fromkeys(keys, at))
        self._here: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []

    def request(self, step: int, keys: Sequence[int]) -> int:
        here, heap = self._here, self._heap
        hits = sum(key in here for key in keys)
        uses = self._uses.pop()
        here.update(zip(keys, uses, strict=True))
        for key, use in zip(keys, uses, strict=True):
            heapq.heappush(heap, (-use, key))
        held = set(keys) if len(keys) <= self._slots else set()
        aside = []
        while len(here) > self._slots:
            use, key = heapq.heappop(heap)
            if here.get(key) != -use:
                continue
            if key in held:
                aside.append((use, key))
            else:
                del here[key]
        for entry in aside:
            heapq.heappush(heap, entry)
        return hits


def lfu(half_life: float) -> MakePolicy:
    """``Lfu`` of this half-life."""
    return lambda slots, width, requests: Lfu(half_life, slots, width, requests)


POLICIES: dict[str, MakePolicy] = {
    "LRU": Lru,
    "LFU 64": lfu(64),
    "LFU 1024": lfu(1024),
    "S3-FIFO": S3Fifo,
    "flashpack": Runtime,
    "Belady": Belady,
}
"""What ``simulate`` compares, by name."""


def replay(policy: Policy, requests: Iterable[Request]) -> list[int]:
    """Hits of each request, one after the other."""
    return [policy.request(step, keys) for step, keys in requests]
