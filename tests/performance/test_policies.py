"""Cache policies against other people's, and against what they are defined as."""

from __future__ import annotations

import random
from functools import lru_cache
from itertools import combinations

import pytest

from flashpack.performance.policies import POLICIES, Belady, Lfu, Lru, MakePolicy, Request, Runtime, S3Fifo, replay
from flashpack.runtime.cache import ExpertCache

WIDTH = 8


def hits(make: MakePolicy, slots: int, requests: list[Request]) -> int:
    return sum(replay(make(slots, WIDTH, requests), requests))


def text(seed: int, tokens: int, layers: int = 3, top_k: int = 2) -> list[Request]:
    """Requests of tokens, some experts hotter than others."""
    rng = random.Random(seed)
    requests = []
    for step in range(tokens):
        for layer in range(layers):
            chosen: set[int] = set()
            while len(chosen) < top_k:
                chosen.add(rng.choices(range(WIDTH), [1 / (1 + (e + step // 40) % WIDTH) for e in range(WIDTH)])[0])
            requests.append((step, sorted(layer * WIDTH + e for e in chosen)))
    return requests


@pytest.mark.parametrize(
    ("slots", "lru", "belady", "s3_fifo"), [(10, 993, 2033, None), (40, 2371, 3139, 2716), (120, 3474, 3711, 3519)]
)
def test_single_requests_are_as_in_libcachesim(slots: int, lru: int, belady: int, s3_fifo: int | None) -> None:
    """Hits that libcachesim 0.3.5 counts (S3-FIFO with a ghost of all slots, and one reuse to get on). It divides the
    slots of S3-FIFO in another way: there it is close, and not where slots are few."""
    rng = random.Random(5)
    keys = rng.choices(range(200), [1 / (1 + i % 97) for i in range(200)], k=4000)
    requests = [(step, [key]) for step, key in enumerate(keys)]
    assert hits(Lru, slots, requests) == lru
    assert hits(Belady, slots, requests) == belady
    if s3_fifo is not None:
        assert abs(hits(S3Fifo, slots, requests) - s3_fifo) <= 0.01 * s3_fifo


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_lru_is_functools_own(slots: int) -> None:
    requests = [(step, [key]) for step, key in enumerate(random.Random(slots).choices(range(12), k=600))]
    cached = lru_cache(maxsize=slots)(lambda key: key)
    for _, (key,) in requests:
        cached(key)
    assert hits(Lru, slots, requests) == cached.cache_info().hits


def best(requests: list[Request], slots: int) -> int:
    """The most hits of any policy that has all of a request in memory when it is served, by trying everything."""
    found = {frozenset[int](): 0}
    for _, keys in requests:
        after: dict[frozenset[int], int] = {}
        for here, count in found.items():
            now = count + sum(key in here for key in keys)
            others = here - set(keys)
            room = min(slots - len(keys), len(others))
            for kept in combinations(sorted(others), room):
                state = frozenset(kept) | set(keys)
                after[state] = max(after.get(state, 0), now)
        found = after
    return max(found.values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slots", [2, 4, 6])
def test_nothing_is_better_than_belady(seed: int, slots: int) -> None:
    requests = text(seed, 9, layers=2)
    assert hits(Belady, slots, requests) == best(requests, slots)


@pytest.mark.parametrize("slots", [1, 2, 6, 13])
def test_every_policy_is_between_nothing_and_belady(slots: int) -> None:
    requests = text(1, 200)
    most = hits(Belady, slots, requests)
    found = {name: hits(make, slots, requests) for name, make in POLICIES.items()}
    assert all(0 <= count <= most for count in found.values())
    if slots > 2:
        assert found["flashpack"] > 0


def test_with_slots_for_all_only_the_first_uses_miss() -> None:
    requests = text(2, 100)
    different = {key for _, keys in requests for key in keys}
    asked = sum(len(keys) for _, keys in requests)
    for name, make in POLICIES.items():
        assert hits(make, 3 * WIDTH, requests) == asked - len(different), name


@pytest.mark.parametrize("half_life", [3, 50])
@pytest.mark.parametrize("slots", [3, 9])
def test_lfu_is_what_it_is_defined_as(half_life: int, slots: int) -> None:
    requests = text(3, 150)
    uses: dict[int, list[int]] = {}
    here: dict[int, int] = {}
    expected = []
    for time, (step, keys) in enumerate(requests):
        for key in keys:
            uses.setdefault(key, []).append(step)
        expected.append(sum(key in here for key in keys))
        missing = [key for key in keys if key not in here]
        here.update((key, time * 10 + i) for i, key in enumerate(keys) if key in here)
        for i, key in enumerate(missing):
            if len(here) == slots:
                counts = {k: sum(0.5 ** ((step - s) / half_life) for s in uses[k]) for k in here if k not in keys}
                del here[min(counts, key=lambda k: (round(counts[k], 9), here[k]))]
            here[key] = time * 10 + len(keys) + i
    assert replay(Lfu(half_life, slots), requests) == expected


def test_requests_larger_than_the_cache_are_served_by_all() -> None:
    """A chunk of a prompt asks for more than there are slots; what is left in the cache is used afterwards."""
    chunk = list(range(WIDTH))
    for name, make in POLICIES.items():
        requests: list[Request] = [(0, chunk), (1, chunk), (2, [0]), (3, [0])]
        found = replay(make(3, WIDTH, requests), requests)
        assert found[0] == 0, name
        assert found[1] <= 3, name
        assert found[3] == 1, name


def test_a_missing_expert_does_not_evict_one_of_its_own_request() -> None:
    requests: list[Request] = [(0, [0, 1, 2]), (1, [0, 3, 4]), (2, [0, 3, 4])]
    for name, make in POLICIES.items():
        assert replay(make(3, WIDTH, requests), requests) == [0, 1, 3], name


@pytest.mark.parametrize("slots", [5, 10, 12])
def test_all_of_a_request_is_in_memory_when_it_has_been_served(slots: int) -> None:
    """So the same request again finds all of it."""
    twice = [(2 * step + again, keys) for step, keys in text(6, 60, top_k=5) for again in (0, 1)]
    for name, make in POLICIES.items():
        assert replay(make(slots, WIDTH, twice), twice)[1::2] == [5] * 180, name


def test_the_runtime_s_policy_is_its_cache() -> None:
    """Its decisions are ``ExpertCache``'s, which is tested against its own definition; here: what it evicts."""
    requests = text(4, 120)
    policy, cache, expected = Runtime(7, WIDTH), ExpertCache(list(range(7))), []
    for _, keys in requests:
        pairs = [divmod(key, WIDTH) for key in keys]
        here = [pair for pair in pairs if cache.get(pair) is not None]
        for pair in pairs:
            assert pair in here or cache.claim(pair) is not None
        for pair in pairs:
            cache.release(pair)
        expected.append(len(here))
    assert replay(policy, requests) == expected
    assert sum(expected) > 0
