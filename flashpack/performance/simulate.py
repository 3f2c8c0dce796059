"""Recorded routing through cache policies: which share of the experts asked for would have been in memory.

Records of several sizes have a cache each, as in the store, and share no slots. Reading ahead is not simulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flashpack.errors import MemoryBudgetError, UsageError
from flashpack.formats.routing import Routing
from flashpack.performance.policies import MakePolicy, Request, Runtime, replay
from flashpack.runtime import budget as budgets


@dataclass(frozen=True)
class Hits:
    """Of the requests for single experts (``asked``), those that found it in memory (``found``)."""

    found: int
    asked: int

    @property
    def rate(self) -> float:
        """Their share; 0 if nothing was asked for."""
        return self.found / self.asked if self.asked else 0.0


@dataclass(frozen=True)
class Simulated:
    """Hits of decoded tokens, and of chunks of prompts, which ask for every expert that one of their tokens uses."""

    decoded: Hits
    prompt: Hits

    @property
    def total(self) -> Hits:
        return Hits(self.decoded.found + self.prompt.found, self.decoded.asked + self.prompt.asked)


def requests(routing: Routing) -> Iterator[Request]:
    """What the store is asked for, in this order: a request for each layer of each step."""
    width = routing.record_bytes.shape[1]
    first_keys = np.arange(len(routing.layers))[:, None] * width
    ends = [*(np.flatnonzero(np.diff(routing.steps)) + 1).tolist(), len(routing.steps)]
    begin = 0
    for step, end in enumerate(ends):
        chosen = routing.experts[begin:end].astype(np.int64)
        if end - begin == 1:
            rows = np.sort(chosen[0], axis=1)
            whole = bool(rows.max() != routing.none)
            for keys, row in zip((rows + first_keys).tolist(), rows.tolist(), strict=True):
                yield step, keys if whole else keys[: row.index(routing.none) if routing.none in row else None]
        else:
            for at in range(chosen.shape[1]):
                used = np.unique(chosen[:, at])
                yield step, (used[used != routing.none] + at * width).tolist()
        begin = end


def simulate(routing: Routing, slots: dict[int, int], policy: MakePolicy) -> Simulated:
    """Hits of ``policy`` with ``slots`` for each record size, from empty caches."""
    prompt = routing.prompt[np.flatnonzero(np.diff(routing.steps, prepend=np.int32(-1)))].tolist()
    found, asked = [0, 0], [0, 0]
    for stride, one_size in _by_size(routing).items():
        cache = policy(slots[stride], routing.record_bytes.shape[1], one_size)
        for (step, keys), hits in zip(one_size, replay(cache, one_size), strict=True):
            found[prompt[step]] += hits
            asked[prompt[step]] += len(keys)
    return Simulated(*(Hits(*pair) for pair in zip(found, asked, strict=True)))


def hit_rate(routing: Routing, slots: dict[int, int] | int) -> float:
    """Share of the experts asked for by decoded tokens that the runtime's own cache has, from an empty cache.

    ``slots``: for each record size, or a number where there is only one size. Prompts in between are served as well.
    """
    if isinstance(slots, int):
        strides = routing.stride_counts()
        if len(strides) > 1:
            raise UsageError(f"the experts are of {len(strides)} sizes: give the slots of each")
        slots = dict.fromkeys(strides, slots)
    return simulate(routing, slots, Runtime).decoded.rate


def slots_of_share(routing: Routing, share: float) -> dict[int, int]:
    """Slots that hold ``share`` (0 to 1) of the experts of each size."""
    counts = routing.stride_counts()
    return {stride: min(count, max(budgets.MIN_SLOTS, round(share * count))) for stride, count in counts.items()}


def slots_of_memory(routing: Routing, memory: int) -> dict[int, int]:
    """Slots of a process of ``memory`` bytes that has as much beside them as the recorded one had.

    Raises ``UsageError`` if nothing is known of that, ``MemoryBudgetError`` if it is too little.
    """
    if routing.run is None or not routing.sized:
        raise UsageError("this file does not say how large experts are; give --memory in per cent of them, as in 10%")
    counts = routing.stride_counts()
    least = budgets.smallest(routing.run.beside, 0, 0, 0, counts)
    if memory < least.total:
        raise MemoryBudgetError(
            f"--memory {memory / 1e9:.2f} GB is too small: the recorded process needs {least.total / 1e9:.2f} GB"
        )
    return budgets._slots(counts, least.slots, memory - least.total)


def arena_bytes(slots: dict[int, int]) -> int:
    """Bytes of experts in ``slots``."""
    return sum(stride * count for stride, count in slots.items())


def fits(routing: Routing, slots: dict[int, int]) -> bool:
    """Whether every request has a slot for each of its experts: then a run's hits are those of a simulation."""
    return all(len(keys) <= slots[stride] for stride, one_size in _by_size(routing).items() for _, keys in one_size)


def _by_size(routing: Routing) -> dict[int, list[Request]]:
    """The requests of each record size."""
    sizes = routing.record_bytes.reshape(-1)
    strides = list(routing.stride_counts())
    if len(strides) == 1:
        return {strides[0]: list(requests(routing))}
    found: dict[int, list[Request]] = {stride: [] for stride in strides}
    stride_of = sizes.tolist()
    for step, keys in requests(routing):
        parts: dict[int, list[int]] = {}
        for key in keys:
            parts.setdefault(stride_of[key], []).append(key)
        for stride, part in parts.items():
            found[stride].append((step, part))
    return found
