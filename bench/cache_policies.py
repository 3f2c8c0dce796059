"""Hit rates of expert cache policies on recorded routing: python bench/cache_policies.py TRACES_DIR

TRACES_DIR has files ``routing_KIND.npz`` or ``routing_KIND.routing`` (``flashpack trace``), each of one stream of text;
every token is taken as decoded. The first half of each stream is for choosing (half-lives, mixtures), the second, from
an empty cache, for judging; both tables name the half. Policies that ``flashpack trace --simulate`` compares are in
``flashpack.performance.policies``, which says what a request is; here are those that were tried beside them.
"""

from __future__ import annotations

import argparse
import heapq
import random
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt

from flashpack.formats.routing import Routing, read_routing
from flashpack.performance.policies import Belady, Lru, MakePolicy, Policy, Request, Runtime, S3Fifo, lfu
from flashpack.performance.policies import replay as hits_of
from flashpack.performance.simulate import Requests
from flashpack.runtime import cache as runtime_cache
from flashpack.runtime.cache import ExpertCache

SIZES = (5, 10, 20, 30, 40, 50, 70)
"""Per cent of all experts."""
HALF_LIVES = (16, 64, 256, 1024)
MIXTURES = {
    "8, 64, 512 tokens": ((8, 64, 512), (0.15, 0.35, 0.5)),
    "4 to 1024, middle": ((4, 16, 64, 256, 1024), (0.1, 0.2, 0.3, 0.2, 0.2)),
    "4 to 2048, long": ((4, 32, 256, 2048), (0.1, 0.2, 0.3, 0.4)),
    "2 to 512, long": ((2, 8, 32, 128, 512), (0.05, 0.1, 0.2, 0.25, 0.4)),
    "2 to 512, longer": ((2, 8, 32, 128, 512), (0.03, 0.07, 0.2, 0.3, 0.4)),
}

Keys = npt.NDArray[np.int64]


class PerLayer:
    """Each layer has its share of the slots, and a cache of its own."""

    def __init__(self, make: MakePolicy, slots: int, width: int, requests: Sequence[Request]) -> None:
        layers = max(keys[0] for _, keys in requests if keys) // width + 1
        shares = [slots * (i + 1) // layers - slots * i // layers for i in range(layers)]
        self._width = width
        self._caches = [make(share, width, requests) for share in shares]

    def request(self, step: int, keys: Sequence[int]) -> int:
        return self._caches[keys[0] // self._width].request(step, keys) if keys else 0


def per_layer(make: MakePolicy) -> MakePolicy:
    return lambda slots, width, requests: PerLayer(make, slots, width, requests)


class LeastStale:
    """After SpecMD: first go experts of layers done with in this token that the token did not use; each time the one
    used longest ago."""

    def __init__(self, slots: int, width: int, requests: Sequence[Request]) -> None:
        keys = (max(keys[-1] for _, keys in requests if keys) // width + 1) * width
        self._slots, self._width = slots, width
        self._layer_of = np.arange(keys) // width
        self._here = np.zeros(keys, np.bool_)
        self._last = np.zeros(keys, np.int64)
        self._at = self._count = self._begun = 0
        self._step = -1

    def request(self, step: int, keys: Sequence[int]) -> int:
        if step != self._step:
            self._step, self._begun = step, self._at
        request = np.array(keys, np.int64)
        missing = request[~self._here[request]]
        self._last[request] = self._at
        spare = self._count + len(missing) - self._slots
        if spare > 0:
            loose = loose_ones(self._here, request)
            stale = (self._layer_of[loose] <= keys[0] // self._width) & (self._last[loose] < self._begun)
            costs = self._last[loose] - 2**40 * stale
            self._here[loose[np.argpartition(costs, spare - 1)[:spare]]] = False
            self._count -= spare
        self._here[missing] = True
        self._count += len(missing)
        self._at += 1
        return len(request) - len(missing)


def loose_ones(here: npt.NDArray[np.bool_], request: Keys) -> Keys:
    """Keys that are ``here`` and not in the request."""
    held = request[here[request]]
    here[held] = False
    loose = np.flatnonzero(here)
    here[held] = True
    return loose


class LeCaR:
    """Vietri et al., HotStorage 2018: recency or frequency, by regret over two ghost lists."""

    def __init__(self, slots: int, width: int, requests: Sequence[Request]) -> None:
        self._slots = slots
        self._chance = random.Random(1)
        self._here: OrderedDict[int, int] = OrderedDict()
        self._ghosts: tuple[OrderedDict[int, tuple[int, int]], ...] = (OrderedDict(), OrderedDict())
        self._weight = [0.5, 0.5]
        self._heap: list[tuple[int, int, int]] = []
        self._discount = 0.005 ** (1 / slots)
        self._clock = 0

    def request(self, step: int, keys: Sequence[int]) -> int:
        here, held, missing = self._here, set(keys), []
        for key in keys:
            self._clock += 1
            if key in here:
                here[key] += 1
                here.move_to_end(key)
                heapq.heappush(self._heap, (here[key], self._clock, key))
            else:
                missing.append(key)
        for key in missing:
            count = self._regret(key)
            if len(here) >= self._slots:
                self._evict(held)
            here[key] = count
            heapq.heappush(self._heap, (count, self._clock, key))
        return len(keys) - len(missing)

    def _regret(self, key: int) -> int:
        """Learn from a miss whose key was evicted lately; the uses it begins with."""
        count = 1
        for who, ghost in enumerate(self._ghosts):
            if key in ghost:
                when, count = ghost.pop(key)
                self._weight[1 - who] *= np.exp(0.45 * self._discount ** (self._clock - when))
                self._weight = [w / sum(self._weight) for w in self._weight]
                count += 1
        return count

    def _evict(self, held: set[int]) -> None:
        here, heap = self._here, self._heap
        who = int(self._chance.random() > self._weight[0])
        old = next(k for k in here if k not in held)
        if who:
            aside = []
            while (top := heapq.heappop(heap))[2] in held or here.get(top[2]) != top[0]:
                if top[2] in held and here.get(top[2]) == top[0]:
                    aside.append(top)
            old = top[2]
            for entry in aside:
                heapq.heappush(heap, entry)
        self._ghosts[who][old] = self._clock, here.pop(old)
        if len(self._ghosts[who]) > self._slots:
            self._ghosts[who].popitem(last=False)


class Mixture:
    """Evicts by a score made of use rates with several half-lives, one row each; vectorised over all experts."""

    def __init__(self, slots: int, width: int, requests: Sequence[Request]) -> None:
        keys = (max(keys[-1] for _, keys in requests if keys) // width + 1) * width
        self._slots = slots
        self._decay = 0.5 ** (1 / np.array(runtime_cache.HALF_LIVES, np.float64))[:, None]
        self._mixture = np.array(runtime_cache.MIXTURE)
        self._rates = np.zeros((len(self._decay), keys))
        self._before = self._rates.copy()
        self._score = np.zeros(keys)
        self._here = np.zeros(keys, np.bool_)
        self._count, self._step = 0, 0
        self._used: list[int] = []

    def learn(self, rates: npt.NDArray[np.float64], used: list[int]) -> None:
        """Change the mixture; ``rates`` are those before ``used``, the keys of the step before, were."""

    def request(self, step: int, keys: Sequence[int]) -> int:
        if step != self._step:
            self.learn(self._before, self._used)
            self._before = self._rates.copy()
            self._rates *= self._decay
            self._score = self._mixture @ self._rates
            self._step, self._used = step, []
        self._used += keys
        request = np.array(keys, np.int64)
        missing = request[~self._here[request]]
        self._rates[:, request] += 1 - self._decay
        self._score[request] = self._mixture @ self._rates[:, request]
        spare = self._count + len(missing) - self._slots
        if spare > 0:
            loose = loose_ones(self._here, request)
            self._here[loose[np.argpartition(self._score[loose], spare - 1)[:spare]]] = False
            self._count -= spare
        self._here[missing] = True
        self._count += len(missing)
        return len(request) - len(missing)


class Fitted(Mixture):
    """The mixture is the least-squares forecast of the next token's uses, fitted as the text goes."""

    def __init__(self, slots: int, width: int, requests: Sequence[Request]) -> None:
        super().__init__(slots, width, requests)
        size = len(self._decay)
        self._products, self._targets, self._tokens = np.zeros((size, size)), np.zeros(size), 0

    def learn(self, rates: npt.NDArray[np.float64], used: list[int]) -> None:
        keep = 0.5 ** (1 / 512)
        self._products = self._products * keep + rates @ rates.T
        self._targets = self._targets * keep + rates[:, used].sum(1)
        self._tokens += 1
        if self._tokens > 64 and self._tokens % 8 == 0:
            ridge = 1e-3 * np.diag(np.diag(self._products))
            self._mixture = np.linalg.solve(self._products + ridge, self._targets)


class FollowBest:
    """Of ``shadows`` the one that had the most hits in the 256 tokens before, in a cache of its own.

    A bound in its favour: when another is chosen, its cache is taken over for nothing.
    """

    BLOCK = 256

    def __init__(self, shadows: list[MakePolicy], slots: int, width: int, requests: Sequence[Request]) -> None:
        hits = [hits_of(make(slots, width, requests), requests) for make in shadows]
        blocks = np.array([step for step, _ in requests]) // self.BLOCK
        gains = [np.bincount(blocks, weights=row) for row in hits]
        self._chosen: list[int] = [1, *np.argmax(gains, axis=0)[:-1].tolist()]
        self._hits = [iter(row) for row in hits]

    def request(self, step: int, keys: Sequence[int]) -> int:
        return [next(row) for row in self._hits][self._chosen[step // self.BLOCK]]


class _Unfitted(ExpertCache):
    def _fit(self) -> None:
        pass


class _Unweighted(ExpertCache):
    """A use in a chunk counts like a token's."""

    def _weight(self) -> float:
        return 1.0


class Other(Runtime):
    """The runtime's policy with another cache: mixtures are set when it is made."""

    def __init__(self, kind: type[ExpertCache], slots: int, width: int) -> None:
        super().__init__(slots, width)
        self._cache = kind(list(range(slots)))


def unfitted(half_lives: tuple[float, ...], mixture: tuple[float, ...]) -> MakePolicy:
    """The runtime's own cache with this mixture, for good."""

    def make(slots: int, width: int, requests: Sequence[Request]) -> Policy:
        with (
            mock.patch.object(runtime_cache, "HALF_LIVES", half_lives),
            mock.patch.object(runtime_cache, "MIXTURE", mixture),
        ):
            return Other(_Unfitted, slots, width)

    return make


def part(routing: Routing, begin: int, end: int, chunk: int = 0) -> Requests:
    """Tokens of a stream. ``chunk``: turns of so many tokens of a prompt, asked for as one, and as many decoded."""
    count = np.arange(end - begin, dtype=np.int32)
    prompt = count % (2 * chunk) < chunk if chunk else np.zeros(len(count), np.bool_)
    first = ~prompt | (count % max(1, 2 * chunk) == 0)
    steps = np.cumsum(first, dtype=np.int32) - 1
    cut = {name: getattr(routing, name)[begin:end] for name in ("tokens", "positions", "weights", "experts")}
    return Requests(replace(routing, **cut, steps=steps.astype(np.int32), prompt=prompt, run=None))


def table(
    title: str, streams: dict[str, Requests], sizes: list[int], policies: dict[str, MakePolicy], share: bool
) -> None:
    """Print hit rates in %; if ``share``, with their share of Belady's in % behind."""
    print(f"\n### {title}\n\n| stream | size % | slots | {' | '.join(policies)} |\n|{'---|' * (3 + len(policies))}")
    for kind, stream in streams.items():
        for size in sizes:
            slots = slots_of(stream, size)
            best = 100 * stream.simulate(slots, Belady).decoded.rate
            cells = []
            for policy in policies.values():
                rate = best if policy is Belady else 100 * stream.simulate(slots, policy).decoded.rate
                cells.append(
                    f"{rate:.1f} ({100 * rate / best:.0f})" if share and policy is not Belady else f"{rate:.1f}"
                )
            print(f"| {kind} | {size} | {sum(slots.values())} | {' | '.join(cells)} |", flush=True)


def slots_of(stream: Requests, size: int) -> dict[int, int]:
    """Slots for ``size`` per cent of the experts of each size."""
    return {stride: round(count * size / 100) for stride, count in stream.counts.items()}


def cost(stream: Requests, slots: dict[int, int]) -> float:
    """Microseconds of processor time a request of one expert takes, get to release, with the loop around it."""
    ((stride, asked),) = stream.by_size.items()
    cache = Runtime(slots[stride], stream.width)
    hits_of(cache, asked[: len(asked) // 4])
    rest = asked[len(asked) // 4 :]
    begun = time.process_time()
    hits_of(cache, rest)
    return (time.process_time() - begun) * 1e6 / sum(len(keys) for _, keys in rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, metavar="TRACES_DIR")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="arena, per cent of all experts")
    parser.add_argument("--choose", action="store_true", help="only what was chosen from, on the first halves")
    args = parser.parse_args()
    paths = sorted(p for p in args.traces.glob("routing_*") if p.suffix in (".npz", ".routing"))
    if not paths:
        parser.error(f"{args.traces}: no routing_*.npz or routing_*.routing here")
    streams = {path.stem.removeprefix("routing_"): read_routing(path) for path in paths}
    for kind, routing in streams.items():
        if len(routing.tokens) < 1024:
            parser.error(
                f"{args.traces}: {kind} has {len(routing.tokens)} tokens; a prompt and an answer in each half need 1024"
            )
    half = {kind: len(routing.tokens) // 2 for kind, routing in streams.items()}
    first = {kind: part(routing, 0, half[kind]) for kind, routing in streams.items()}
    second = {kind: part(routing, half[kind], len(routing.tokens)) for kind, routing in streams.items()}
    lfus = {f"LFU {h}": lfu(h) for h in HALF_LIVES}
    if args.choose:
        mixtures = {name: unfitted(*mixture) for name, mixture in MIXTURES.items()}
        table("Choosing (first half)", first, [5, 30, 50], {"LRU": Lru, **lfus, **mixtures}, share=False)
        return
    shadows = list(lfus.values())
    policies: dict[str, MakePolicy] = {
        "LRU": Lru,
        "LRU per layer": per_layer(Lru),
        "S3-FIFO": S3Fifo,
        "least stale": LeastStale,
        "LeCaR": LeCaR,
        **lfus,
        "LFU 64 per layer": per_layer(lfu(64)),
        "best LFU so far": lambda slots, width, requests: FollowBest(shadows, slots, width, requests),
        "fitted mixture": Fitted,
        "mixture": Mixture,
        "mixture and turn": unfitted(runtime_cache.HALF_LIVES, runtime_cache.MIXTURE),
        "ExpertCache": Runtime,
        "Belady": Belady,
    }
    table("Judging (second half): hit rate % (share of Belady's %)", second, args.sizes, policies, share=True)
    print("\n### A prompt of 256 tokens in one chunk, 256 tokens decoded, in turns (second half)\n")
    print("| stream | size % | chunk counts | hits of the decoded % | loads of the prompts |\n|---|---|---|---|---|")
    for kind, routing in streams.items():
        stream = part(routing, half[kind], len(routing.tokens), chunk=256)
        for size in (10, 30, 50):
            for name, cache in (("in full", _Unweighted), ("as a token", ExpertCache)):
                found = stream.simulate(
                    slots_of(stream, size), lambda slots, width, asked, cache=cache: Other(cache, slots, width)
                )
                loads = found.prompt.asked - found.prompt.found
                print(f"| {kind} | {size} | {name} | {100 * found.decoded.rate:.1f} | {loads} |", flush=True)
    print("\n### Processor time of a request, us\n\n| size % | us |\n|---|---|")
    kind, routing = next(iter(streams.items()))
    for size in (5, 30, 50, 100):
        stream = part(routing, half[kind], min(half[kind] + 2048, len(routing.tokens)))
        print(f"| {size} | {cost(stream, slots_of(stream, size)):.2f} |", flush=True)


if __name__ == "__main__":
    main()
