"""Hit rates of expert cache policies on recorded routing: python bench/cache_policies.py TRACES_DIR

TRACES_DIR has files ``routing_KIND.npz``, each with ``experts``, integers [tokens, layers, top-k]: the experts of one
stream of text. The first half of each stream is for choosing (half-lives, mixtures), the second, from an empty cache,
for judging; both tables name the half. A request is what the store asks for one layer of one token: all its experts are
looked up, then the missing ones loaded, none of which may evict another of the same request.
"""

from __future__ import annotations

import argparse
import heapq
import random
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol
from unittest import mock

import numpy as np
import numpy.typing as npt

from flashpack.runtime import cache as runtime_cache
from flashpack.runtime.cache import ExpertCache

Trace = npt.NDArray[np.int64]
"""[tokens, layers, top-k], experts numbered over all layers: layer * experts + expert."""

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


class Shape(Protocol):
    """What a policy may know of the model."""

    layers: int
    experts: int


class Model:
    def __init__(self, layers: int, experts: int) -> None:
        self.layers, self.experts = layers, experts


Policy = Callable[[Trace, int, Shape], int]
"""(trace, slots, shape) -> hits"""


def requests(trace: Trace) -> Iterator[list[int]]:
    for token in trace.tolist():
        yield from token


def lru(trace: Trace, slots: int, shape: Shape) -> int:
    here: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in requests(trace):
        missing = []
        for key in request:
            if key in here:
                here.move_to_end(key)
                hits += 1
            else:
                missing.append(key)
        for key in missing:
            if len(here) >= slots:
                here.popitem(last=False)
            here[key] = None
    return hits


def lru_per_layer(trace: Trace, slots: int, shape: Shape) -> int:
    """Each layer has its share of the slots."""
    shares = [slots * (i + 1) // shape.layers - slots * i // shape.layers for i in range(shape.layers)]
    return sum(lru(trace[:, [i]], share, shape) for i, share in enumerate(shares))


def s3_fifo(trace: Trace, slots: int, shape: Shape) -> int:
    """Yang et al., SOSP 2023: a small queue (10 %) for newcomers, a main queue with two bits, a ghost queue."""
    small: deque[int] = deque()
    main: deque[int] = deque()
    ghost: OrderedDict[int, None] = OrderedDict()
    counts: dict[int, int] = {}
    target = max(1, slots // 10)
    hits = 0
    for request in requests(trace):
        missing = [key for key in request if key not in counts]
        hits += len(request) - len(missing)
        for key in request:
            if key in counts:
                counts[key] = min(3, counts[key] + 1)
        for key in missing:
            while len(counts) >= slots:
                if len(small) >= target or not main:
                    old = small.popleft()
                    if counts[old]:
                        counts[old] = 0
                        main.append(old)
                    else:
                        del counts[old]
                        ghost[old] = None
                        if len(ghost) > slots:
                            ghost.popitem(last=False)
                else:
                    old = main.popleft()
                    if counts[old]:
                        counts[old] -= 1
                        main.append(old)
                    else:
                        del counts[old]
            (main if key in ghost else small).append(key)
            ghost.pop(key, None)
            counts[key] = 0
    return hits


def least_stale(trace: Trace, slots: int, shape: Shape) -> int:
    """After SpecMD: first go experts of layers done with in this token that the token did not use; each time the one
    used longest ago."""
    keys = shape.layers * shape.experts
    layer_of = np.arange(keys) // shape.experts
    here = np.zeros(keys, np.bool_)
    last = np.zeros(keys, np.int64)
    hits = count = 0
    for at, request in enumerate(trace.reshape(-1, trace.shape[2])):
        token, layer = divmod(at, shape.layers)
        missing = request[~here[request]]
        hits += len(request) - len(missing)
        last[request] = at
        spare = count + len(missing) - slots
        if spare > 0:
            held = request[here[request]]
            here[held] = False
            loose = np.flatnonzero(here)
            here[held] = True
            stale = (layer_of[loose] <= layer) & (last[loose] < token * shape.layers)
            costs = last[loose] - 2 * trace.size * stale
            here[loose[np.argpartition(costs, spare - 1)[:spare]]] = False
            count -= spare
        here[missing] = True
        count += len(missing)
    return hits


def lecar(trace: Trace, slots: int, shape: Shape) -> int:
    """Vietri et al., HotStorage 2018: recency or frequency, by regret over two ghost lists."""
    chance = random.Random(1)
    here: OrderedDict[int, int] = OrderedDict()
    ghosts: tuple[OrderedDict[int, tuple[int, int]], ...] = (OrderedDict(), OrderedDict())
    weight = [0.5, 0.5]
    heap: list[tuple[int, int, int]] = []
    discount = 0.005 ** (1 / slots)
    hits = clock = 0
    for request in requests(trace):
        held = set(request)
        missing = []
        for key in request:
            clock += 1
            if key in here:
                hits += 1
                here[key] += 1
                here.move_to_end(key)
                heapq.heappush(heap, (here[key], clock, key))
            else:
                missing.append(key)
        for key in missing:
            count = 1
            for who, ghost in enumerate(ghosts):
                if key in ghost:
                    when, count = ghost.pop(key)
                    weight[1 - who] *= np.exp(0.45 * discount ** (clock - when))
                    weight = [w / sum(weight) for w in weight]
                    count += 1
            if len(here) >= slots:
                who = int(chance.random() > weight[0])
                old = next(k for k in here if k not in held)
                if who:
                    aside = []
                    while (top := heapq.heappop(heap))[2] in held or here.get(top[2]) != top[0]:
                        if top[2] in held and here.get(top[2]) == top[0]:
                            aside.append(top)
                    old = top[2]
                    for entry in aside:
                        heapq.heappush(heap, entry)
                ghosts[who][old] = clock, here.pop(old)
                if len(ghosts[who]) > slots:
                    ghosts[who].popitem(last=False)
            here[key] = count
            heapq.heappush(heap, (count, clock, key))
    return hits


def belady(trace: Trace, slots: int, shape: Shape) -> int:
    """Evicts what is used furthest in the future."""
    flat = trace.reshape(-1)
    following = np.empty(len(flat), np.int64)
    later: dict[int, int] = {}
    for at in range(len(flat) - 1, -1, -1):
        key = int(flat[at])
        following[at] = later.get(key, len(flat))
        later[key] = at
    nexts = following.reshape(-1, trace.shape[2]).tolist()
    here: dict[int, int] = {}
    heap: list[tuple[int, int]] = []
    hits = 0
    for request, uses in zip(requests(trace), nexts, strict=True):
        count = sum(key in here for key in request)
        hits += count
        spare = len(here) + len(request) - count - slots
        for key, use in zip(request, uses, strict=True):
            if key in here:
                here[key] = use
        held = set(request)
        while spare > 0:
            use, key = heapq.heappop(heap)
            if here.get(key) == -use and key not in held:
                del here[key]
                spare -= 1
        for key, use in zip(request, uses, strict=True):
            here[key] = use
            heapq.heappush(heap, (-use, key))
    return hits


class Scored:
    """Evicts by a score made of use rates with several half-lives, one row each; vectorised over all experts."""

    def __init__(self, half_lives: tuple[int, ...], mixture: tuple[float, ...], per_layer: bool = False) -> None:
        self.decay = 0.5 ** (1 / np.array(half_lives, np.float64))[:, None]
        self.mixture = np.array(mixture)
        self.per_layer = per_layer
        self.replayed = (0, 0)
        self.hits: list[int] = []  # by token, of the last replay

    def __call__(self, trace: Trace, slots: int, shape: Shape) -> int:
        if self.per_layer:
            shares = [slots * (i + 1) // shape.layers - slots * i // shape.layers for i in range(shape.layers)]
            lone = Model(1, shape.experts)
            parts = [trace[:, [i]] - i * shape.experts for i in range(shape.layers)]
            return sum(self._replay(part, share, lone) for part, share in zip(parts, shares, strict=True))
        return self._replay(trace, slots, shape)

    def learn(self, rates: npt.NDArray[np.float64], used: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The mixture from now on; ``rates`` are those before ``used`` were."""
        return self.mixture

    def _replay(self, trace: Trace, slots: int, shape: Shape) -> int:
        keys = shape.layers * shape.experts
        rates = np.zeros((len(self.decay), keys))
        here = np.zeros(keys, np.bool_)
        count = 0
        self.hits, self.replayed = [], (id(trace), slots)
        for token in trace:
            self.hits.append(0)
            mixture = self.learn(rates, token.reshape(-1))
            rates *= self.decay
            score = mixture @ rates
            for request in token:
                missing = request[~here[request]]
                self.hits[-1] += len(request) - len(missing)
                rates[:, request] += 1 - self.decay
                score[request] = mixture @ rates[:, request]
                if not len(missing):
                    continue
                spare = count + len(missing) - slots
                if spare > 0:
                    held = request[here[request]]
                    here[held] = False
                    loose = np.flatnonzero(here)
                    here[held] = True
                    spare = min(spare, len(loose))
                    if spare:
                        here[loose[np.argpartition(score[loose], spare - 1)[:spare]]] = False
                    count -= spare
                missing = missing[: slots - count]
                here[missing] = True
                count += len(missing)
        return sum(self.hits)


class Fitted(Scored):
    """The mixture is the least-squares forecast of the next token's uses, fitted as the text goes."""

    def __call__(self, trace: Trace, slots: int, shape: Shape) -> int:
        size = len(self.decay)
        self.products, self.targets, self.tokens = np.zeros((size, size)), np.zeros(size), 0
        return super().__call__(trace, slots, shape)

    def learn(self, rates: npt.NDArray[np.float64], used: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        keep = 0.5 ** (1 / 512)
        self.products = self.products * keep + rates @ rates.T
        self.targets = self.targets * keep + rates[:, used].sum(1)
        self.tokens += 1
        if self.tokens > 64 and self.tokens % 8 == 0:
            ridge = 1e-3 * np.diag(np.diag(self.products))
            self.mixture = np.linalg.solve(self.products + ridge, self.targets)
        return self.mixture


def follow_best(shadows: list[Scored]) -> Policy:
    """Of these the one whose own cache, kept as a shadow, had the most hits in the 256 tokens before.

    A bound in its favour: when another is chosen, its cache is taken over for nothing.
    """
    block = 256

    def policy(trace: Trace, slots: int, shape: Shape) -> int:
        gains = []
        for shadow in shadows:
            if shadow.replayed != (id(trace), slots):
                shadow(trace, slots, shape)
            gains.append([sum(shadow.hits[at : at + block]) for at in range(0, len(trace), block)])
        table = np.array(gains)
        chosen = [1, *np.argmax(table[:, :-1], axis=0).tolist()]
        return int(table[chosen, np.arange(table.shape[1])].sum())

    return policy


def expert_cache(half_lives: tuple[float, ...], mixture: tuple[float, ...], fitted: bool) -> Policy:
    """The runtime's own cache with this mixture, fitted as it goes or for good."""

    def policy(trace: Trace, slots: int, shape: Shape) -> int:
        with (
            mock.patch.object(runtime_cache, "HALF_LIVES", half_lives),
            mock.patch.object(runtime_cache, "MIXTURE", mixture),
            mock.patch.object(runtime_cache, "FIT_AFTER", runtime_cache.FIT_AFTER if fitted else len(trace) + 1),
        ):
            cache = ExpertCache(list(range(slots)))
            return sum(serve(cache, keys) for keys in by_layer(trace, shape))

    return policy


def by_layer(trace: Trace, shape: Shape) -> Iterator[list[tuple[int, int]]]:
    for request in requests(trace):
        yield [divmod(key, shape.experts) for key in request]


def serve(cache: ExpertCache, keys: list[tuple[int, int]]) -> int:
    """One request as the store makes it: hits first, then the misses; slots are given back as they are needed."""
    missing = [key for key in keys if cache.get(key) is None]
    pinned = [key for key in keys if cache.contains(key)]
    hits = len(pinned)
    for key in missing:
        while cache.claim(key) is None:
            cache.release(pinned.pop(0))
        pinned.append(key)
    for key in pinned:
        cache.release(key)
    return hits


def with_prompts(trace: Trace, slots: int, shape: Shape, weighted: bool, length: int = 256) -> tuple[int, int, int]:
    """Turns of a prompt, asked for as one chunk, and as many decoded tokens: hits of the decoded, their uses, loads of
    the prompts. Not ``weighted``: a chunk's use counts like a token's."""
    cache = ExpertCache(list(range(slots)))
    full = (lambda self: 1.0) if not weighted else ExpertCache._weight
    hits = uses = loads = 0
    with mock.patch.object(ExpertCache, "_weight", full):
        for at in range(0, len(trace), 2 * length):
            for layer in range(shape.layers):
                keys = [divmod(int(k), shape.experts) for k in np.unique(trace[at : at + length, layer])]
                loads += len(keys) - serve(cache, keys)
            decoded = trace[at + length : at + 2 * length]
            uses += decoded.size
            hits += sum(serve(cache, keys) for keys in by_layer(decoded, shape))
    return hits, uses, loads


def load(path: Path) -> tuple[Trace, Model]:
    experts = np.load(path)["experts"].astype(np.int64)
    width = int(experts.max()) + 1
    return experts + np.arange(experts.shape[1])[:, None] * width, Model(experts.shape[1], width)


def table(
    title: str, traces: dict[str, Trace], shape: Shape, sizes: list[int], policies: dict[str, Policy], share: bool
) -> None:
    """Print hit rates in %; if ``share``, with their share of Belady's in % behind."""
    print(f"\n### {title}\n\n| stream | size % | slots | {' | '.join(policies)} |\n|{'---|' * (3 + len(policies))}")
    for kind, trace in traces.items():
        for size in sizes:
            slots = round(shape.layers * shape.experts * size / 100)
            best = 100 * belady(trace, slots, shape) / trace.size
            cells = []
            for policy in policies.values():
                rate = best if policy is belady else 100 * policy(trace, slots, shape) / trace.size
                cells.append(
                    f"{rate:.1f} ({100 * rate / best:.0f})" if share and policy is not belady else f"{rate:.1f}"
                )
            print(f"| {kind} | {size} | {slots} | {' | '.join(cells)} |", flush=True)


def cost(trace: Trace, shape: Shape, slots: int) -> float:
    """Microseconds of processor time a request of one expert takes, get to release, with the loop around it."""
    cache = ExpertCache(list(range(slots)))
    requests_ = list(by_layer(trace, shape))
    for keys in requests_[: len(requests_) // 4]:
        serve(cache, keys)
    rest = requests_[len(requests_) // 4 :]
    begun = time.process_time()
    for keys in rest:
        serve(cache, keys)
    return (time.process_time() - begun) * 1e6 / sum(map(len, rest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, metavar="TRACES_DIR")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="arena, per cent of all experts")
    parser.add_argument("--choose", action="store_true", help="only what was chosen from, on the first halves")
    args = parser.parse_args()
    paths = sorted(args.traces.glob("routing_*.npz"))
    if not paths:
        parser.error(f"{args.traces}: no routing_*.npz here")
    streams = {path.stem.removeprefix("routing_"): load(path) for path in paths}
    shape = next(iter(streams.values()))[1]
    if any((s.layers, s.experts) != (shape.layers, shape.experts) for _, s in streams.values()):
        parser.error(f"{args.traces}: the streams are of different models")
    for kind, (trace, _) in streams.items():
        if len(trace) < 1024:
            parser.error(
                f"{args.traces}: {kind} has {len(trace)} tokens; a prompt and an answer in each half need 1024"
            )
    first = {kind: trace[: len(trace) // 2] for kind, (trace, _) in streams.items()}
    second = {kind: trace[len(trace) // 2 :] for kind, (trace, _) in streams.items()}
    lfu = {f"LFU {h}": Scored((h,), (1.0,)) for h in HALF_LIVES}
    if args.choose:
        mixtures = {name: expert_cache(*mixture, fitted=False) for name, mixture in MIXTURES.items()}
        table("Choosing (first half)", first, shape, [5, 30, 50], {"LRU": lru, **lfu, **mixtures}, share=False)
        return
    policies: dict[str, Policy] = {
        "LRU": lru,
        "LRU per layer": lru_per_layer,
        "S3-FIFO": s3_fifo,
        "least stale": least_stale,
        "LeCaR": lecar,
        **lfu,
        "LFU 64 per layer": Scored((64,), (1.0,), per_layer=True),
        "best LFU so far": follow_best(list(lfu.values())),
        "fitted mixture": Fitted(runtime_cache.HALF_LIVES, runtime_cache.MIXTURE),
        "mixture": Scored(runtime_cache.HALF_LIVES, runtime_cache.MIXTURE),
        "mixture and turn": expert_cache(runtime_cache.HALF_LIVES, runtime_cache.MIXTURE, fitted=False),
        "ExpertCache": expert_cache(runtime_cache.HALF_LIVES, runtime_cache.MIXTURE, fitted=True),
        "Belady": belady,
    }
    table("Judging (second half): hit rate % (share of Belady's %)", second, shape, args.sizes, policies, share=True)
    print("\n### A prompt of 256 tokens in one chunk, 256 tokens decoded, in turns (second half)\n")
    print("| stream | size % | chunk counts | hits of the decoded % | loads of the prompts |\n|---|---|---|---|---|")
    for kind, trace in second.items():
        for size in (10, 30, 50):
            slots = round(shape.layers * shape.experts * size / 100)
            for name, weighted in (("in full", False), ("as a token", True)):
                hits, uses, loads = with_prompts(trace, slots, shape, weighted)
                print(f"| {kind} | {size} | {name} | {100 * hits / uses:.1f} | {loads} |", flush=True)
    print("\n### Processor time of a request, us\n\n| size % | us |\n|---|---|")
    for size in (5, 30, 50, 100):
        slots = round(shape.layers * shape.experts * size / 100)
        print(f"| {size} | {cost(next(iter(second.values()))[:2048], shape, slots):.2f} |", flush=True)


if __name__ == "__main__":
    main()
