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


class Requests:
    """What the store was asked for, in this order: a request for each layer of each step.

    ``by_size``: those for the records of each size. ``counts``: how many experts have it. ``width``: experts of a
    layer, for ``policies``. ``prompt``: which steps are chunks of prompts.
    """

    def __init__(self, routing: Routing) -> None:
        self.counts = routing.stride_counts()
        self.width = routing.record_bytes.shape[1]
        self.prompt: list[bool] = routing.prompt[np.diff(routing.steps, prepend=np.int32(-1)) == 1].tolist()
        if len(self.counts) == 1:
            (stride,) = self.counts
            self.by_size = {stride: list(_requests(routing))}
            return
        self.by_size = {stride: [] for stride in self.counts}
        stride_of = routing.record_bytes.reshape(-1).tolist()
        for step, keys in _requests(routing):
            parts: dict[int, list[int]] = {}
            for key in keys:
                parts.setdefault(stride_of[key], []).append(key)
            for stride, part in parts.items():
                self.by_size[stride].append((step, part))

    def fit(self, slots: dict[int, int]) -> bool:
        """Whether every request has a slot for each of its experts: then a run's hits are those of a simulation."""
        return all(len(keys) <= slots[stride] for stride, asked in self.by_size.items() for _, keys in asked)

    def simulate(self, slots: dict[int, int], policy: MakePolicy, start: int = 0) -> Simulated:
        """Hits of ``policy`` with ``slots`` for each record size, from empty caches; those of the step ``start`` and
        later ones are counted."""
        found, asked = [0, 0], [0, 0]
        for stride, wanted in self.by_size.items():
            cache = policy(slots[stride], self.width, wanted)
            for (step, keys), hits in zip(wanted, replay(cache, wanted), strict=True):
                if step >= start:
                    found[self.prompt[step]] += hits
                    asked[self.prompt[step]] += len(keys)
        return Simulated(*(Hits(*pair) for pair in zip(found, asked, strict=True)))


def _requests(routing: Routing) -> Iterator[Request]:
    width = routing.record_bytes.shape[1]
    first_keys = np.arange(len(routing.layers))[:, None] * width
    ends = [*(np.flatnonzero(np.diff(routing.steps)) + 1).tolist(), len(routing.steps)]
    begin = 0
    for step, end in enumerate(ends):
        chosen = routing.experts[begin:end].astype(np.int64)
        if end - begin == 1 and chosen.max() != routing.none:
            for keys in (np.sort(chosen[0], axis=1) + first_keys).tolist():
                yield step, keys
        else:
            for at in range(chosen.shape[1]):
                used = np.unique(chosen[:, at])
                yield step, (used[used != routing.none] + at * width).tolist()
        begin = end


def hit_rate(routing: Routing, slots: dict[int, int] | int, warmed_up: bool = False) -> float:
    """Share of the experts asked for by decoded tokens that the runtime's own cache has, from an empty cache.

    ``slots``: for each record size, or a number where there is only one size. Prompts in between are served as well.
    ``warmed_up``: the first half of the steps only fills the cache.
    """
    if isinstance(slots, int):
        strides = routing.stride_counts()
        if len(strides) > 1:
            raise UsageError(f"the experts are of {len(strides)} sizes: give the slots of each")
        slots = dict.fromkeys(strides, slots)
    requests = Requests(routing)
    return requests.simulate(slots, Runtime, len(requests.prompt) // 2 if warmed_up else 0).decoded.rate


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
    return budgets.spread(counts, least.slots, memory - least.total)


def overlap(routing: Routing) -> float:
    """Mean share of a token's experts of a layer that the token before it, of the same context, used there as well."""
    follows = np.flatnonzero(np.diff(routing.positions) == 1) + 1
    shares = []
    for layer, count in _layers(routing):
        used = np.zeros((len(layer), count + 1), np.bool_)
        np.put_along_axis(used, np.minimum(layer, count).astype(np.intp), True, axis=1)
        used = used[:, :count]  # behind it is no expert
        both = np.count_nonzero(used[follows] & used[follows - 1], axis=1)
        shares.append(both / np.maximum(1, np.count_nonzero(used[follows], axis=1)))
    return float(np.mean(shares)) if len(follows) else 0.0


def busiest_tenth(routing: Routing) -> float:
    """Share of all uses that go to the most used tenth of a layer's experts; mean over layers."""
    shares = []
    for layer, count in _layers(routing):
        uses = np.sort(np.bincount(layer[layer < count], minlength=count))
        shares.append(uses[-max(1, round(count / 10)) :].sum() / max(1, uses.sum()))
    return float(np.mean(shares))


def _layers(routing: Routing) -> Iterator[tuple[np.ndarray, int]]:
    """Experts [tokens, top_k] of each layer, and how many it has."""
    counts = np.count_nonzero(routing.record_bytes, axis=1).tolist()
    return zip(np.moveaxis(routing.experts, 1, 0), counts, strict=True)
