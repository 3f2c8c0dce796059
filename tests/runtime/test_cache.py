"""The cache policy: slots and pins, what is evicted, what is learnt."""

from __future__ import annotations

import random
from collections import OrderedDict

import numpy as np
import pytest

from flashpack.runtime.cache import HALF_LIVES, MIXTURE, ExpertCache, Key


def serve(cache: ExpertCache, layer: int, experts: list[int]) -> int:
    """One request as the store makes it; how many were here."""
    missing = [e for e in experts if cache.get((layer, e)) is None]
    pinned = [e for e in experts if e not in missing]
    hits = len(pinned)
    for e in missing:
        while cache.claim((layer, e)) is None:
            cache.release((layer, pinned.pop(0)))
        pinned.append(e)
    for e in pinned:
        cache.release((layer, e))
    return hits


def lru_hits(slots: int, requests: list[tuple[int, list[int]]]) -> int:
    here: OrderedDict[Key, None] = OrderedDict()
    hits = 0
    for layer, experts in requests:
        missing = [e for e in experts if (layer, e) not in here]
        hits += len(experts) - len(missing)
        for e in experts:
            if (layer, e) in here:
                here.move_to_end((layer, e))
        for e in missing:
            if len(here) == slots:
                here.popitem(last=False)
            here[layer, e] = None
    return hits


def skewed(seed: int, tokens: int, layers: int = 6, experts: int = 32, top_k: int = 4) -> list[tuple[int, list[int]]]:
    """Requests of a text: a few experts of each layer are hot, some everywhere, some for 150 tokens."""
    rng = random.Random(seed)
    order = [rng.sample(range(experts), experts) for _ in range(layers)]
    requests = []
    for token in range(tokens):
        for layer in range(layers):
            if token % 150 == 0:
                kept = order[layer][: experts // 4]
                rest = order[layer][experts // 4 :]
                order[layer] = kept + rng.sample(rest, len(rest))
            weights = [1 / (rank + 2) for rank in range(experts)]
            chosen: dict[int, None] = {}
            while len(chosen) < top_k:
                chosen[rng.choices(order[layer], weights)[0]] = None
            requests.append((layer, list(chosen)))
    return requests


class Model:
    """The policy by its definition: looks at every expert, keeps nothing sorted."""

    def __init__(self, slots: list[int]) -> None:
        self.free = slots[::-1]
        self.slots: dict[Key, int] = {}
        self.pins: dict[Key, int] = {}
        self.rates: dict[Key, list[float]] = {}
        self.uses: dict[Key, float] = {}
        self.layers: set[int] = set()
        self.layer, self.usual, self.steps = -1, 0.0, 0
        self.mixture = np.array(MIXTURE)
        self.products, self.targets = np.zeros((5, 5)), np.zeros(5)

    def fit(self) -> None:
        self.steps += 1
        if self.steps % 4:
            return
        self.products *= 0.5 ** (4 / 512)
        self.targets *= 0.5 ** (4 / 512)
        for key, rates in self.rates.items():
            self.products += np.outer(rates, rates)
            self.targets += np.array(rates) * (key in self.uses)
        if self.steps >= 64:
            self.mixture = np.linalg.solve(self.products * (1 + 0.001 * np.eye(5)), self.targets)

    def chance(self, key: Key) -> float:
        rates = self.rates.get(key, [0.0] * len(MIXTURE))
        p = sum(m * r for m, r in zip(self.mixture, rates, strict=True))
        gain = sum(m * (1 - 0.5 ** (1 / h)) for m, h in zip(self.mixture, HALF_LIVES, strict=True))
        return float(min(1.0, max(1e-4, p)) + max(0.0, gain) * self.uses.get(key, 0.0))

    def expected(self, key: Key) -> float:
        known = sorted(self.layers)
        turn = (known.index(key[0]) - known.index(self.layer) - 1) % len(known) + 1
        return 1 / self.chance(key) + turn / len(known)

    def ask(self, layer: int, experts: list[int]) -> list[int | None]:
        if layer <= self.layer:
            if all(weight == 1 for weight in self.uses.values()):
                self.fit()
            for key in self.rates.keys() | self.uses.keys():
                use, old = self.uses.get(key, 0.0), self.rates.get(key, [0.0] * len(HALF_LIVES))
                self.rates[key] = [
                    (r + (1 - 0.5 ** (1 / h)) * use) * 0.5 ** (1 / h) for r, h in zip(old, HALF_LIVES, strict=True)
                ]
            self.uses = {}
        self.layer = layer
        self.layers.add(layer)
        count = len(experts)
        weight = self.usual / count if count > 2 * self.usual > 0 else 1.0
        self.uses.update(((layer, e), weight) for e in experts)
        if count > self.usual:
            self.usual = min(count, self.usual * 1.01) if self.usual else count
        else:
            self.usual = max(count, self.usual / 1.01)
        for e in experts:
            if (layer, e) in self.slots:
                self.pins[layer, e] = self.pins.get((layer, e), 0) + 1
        return [self.slots.get((layer, e)) for e in experts]

    def loose(self) -> list[Key]:
        return [key for key in self.slots if key not in self.pins]

    def release(self, key: Key) -> None:
        self.pins[key] -= 1
        if not self.pins[key]:
            del self.pins[key]


@pytest.mark.parametrize("slots", [2, 5, 17, 40])
@pytest.mark.parametrize("seed", range(3))
def test_every_decision_is_that_of_a_slow_model(slots: int, seed: int) -> None:
    rng = random.Random(100 * slots + seed)
    cache, model = ExpertCache(list(range(slots))), Model(list(range(slots)))
    text = skewed(seed, 110, layers=4, experts=24)
    evictions = refusals = 0

    def claim(key: Key, urgent: bool) -> None:
        nonlocal evictions, refusals
        model.layers.add(key[0])
        slot = cache.claim(key, urgent)
        if model.free:
            assert slot == model.free.pop()
        else:
            loose = model.loose()
            latest = max(map(model.expected, loose), default=-1.0)
            if slot is None:
                assert not loose or (not urgent and latest <= model.expected(key) + 1e-6)
                refusals += 1
                return
            gone = [k for k in model.slots if not cache.contains(k)]
            assert len(gone) == 1
            assert gone[0] in loose
            assert model.expected(gone[0]) == pytest.approx(latest, rel=1e-6)
            assert urgent or latest >= model.expected(key) - 1e-6
            assert model.slots.pop(gone[0]) == slot
            evictions += 1
        model.slots[key] = slot
        model.pins[key] = 1

    def release(key: Key) -> None:
        cache.release(key)
        model.release(key)

    for at, (layer, experts) in enumerate(text):
        if 150 <= at < 156:  # a chunk of a prompt
            experts = list(range(24))
        found = [cache.get((layer, e)) for e in experts]
        assert found == model.ask(layer, experts)
        pinned = [(layer, e) for e, slot in zip(experts, found, strict=True) if slot is not None]
        for e, slot in zip(experts, found, strict=True):
            if slot is not None:
                continue
            while pinned and not model.free and not model.loose():
                release(pinned.pop(0))
            claim((layer, e), urgent=True)
            if rng.random() < 0.05:
                cache.forget((layer, e))
                model.free.append(model.slots.pop((layer, e)))
                del model.pins[layer, e]
            else:
                pinned.append((layer, e))
        guess = (layer + 1) % 4, rng.randrange(24)
        if not cache.contains(guess):
            claim(guess, urgent=False)
            if guess in model.pins:
                pinned.append(guess)
        rng.shuffle(pinned)
        for key in pinned:
            release(key)
    assert evictions > 100
    assert refusals > 10


@pytest.mark.parametrize("slots", [40, 96])
def test_a_request_used_at_once_is_one_asked_for_and_released(slots: int) -> None:
    """Where all is here, some of it pinned by others; evictions and chances after it are the same."""
    rng = random.Random(slots)
    caches = ExpertCache(list(range(slots))), ExpertCache(list(range(slots)))
    at_once = evicted = 0
    for layer, experts in [*skewed(3, 150, layers=4, experts=24), *[(2, [1, 2]), (2, [3, 4]), (2, [4, 5])] * 20]:
        first, second = caches
        pinned = (layer + 1) % 4, rng.randrange(24)
        slot = first.claim(pinned, urgent=False) if not first.contains(pinned) else None
        if slot is not None:
            assert second.claim(pinned, urgent=False) == slot
        if all(first.contains((layer, e)) for e in experts):
            at_once += 1
            second.use(layer, experts)
            serve(first, layer, experts)
        else:
            evicted += not first._free
            serve(first, layer, experts)
            serve(second, layer, experts)
        if slot is not None:
            for cache in caches:
                cache.release(pinned)
        assert set(first.resident()) == set(second.resident())
    assert caches[0].ranking() == caches[1].ranking()
    assert at_once > 50
    assert evicted > 50 or slots == 96


def test_a_pinned_expert_is_never_evicted_and_slots_come_back() -> None:
    cache = ExpertCache([0, 100])
    assert cache.claim((0, 1)) == 0
    assert cache.claim((0, 2)) == 100
    assert cache.claim((0, 3)) is None
    cache.release((0, 2))
    assert cache.claim((0, 3)) == 100
    cache.release((0, 1))
    cache.release((0, 3))
    assert cache.get((0, 1)) == 0
    assert cache.get((1, 0)) is None
    assert cache.get((0, 1)) == 0
    cache.release((0, 1))
    assert cache.claim((0, 4)) == 100  # (0, 1) still has one user
    assert cache.claim((0, 5)) is None
    cache.release((0, 1))
    cache.forget((0, 4))
    assert cache.get((0, 4)) is None
    assert cache.claim((0, 5)) == 100
    assert cache.claim((0, 6)) == 0
    assert not cache.contains((0, 1))


def test_looking_whether_an_expert_is_here_changes_nothing() -> None:
    text = skewed(5, 60)
    cache, watched = ExpertCache(list(range(30))), ExpertCache(list(range(30)))
    for layer, experts in text:
        assert not any(watched.contains((layer + 7, e)) for e in range(40))
        here = sum(watched.contains((layer, e)) for e in experts)
        assert serve(cache, layer, experts) == serve(watched, layer, experts) == here
    assert cache.ranking() == watched.ranking()


def test_the_same_calls_give_the_same_slots() -> None:
    def slots() -> list[int | None]:
        cache = ExpertCache(list(range(40)))
        found = []
        for layer, experts in skewed(3, 100):
            serve(cache, layer, experts)
            found += [cache.get((layer, e)) for e in range(32)]
            for e in range(32):
                if cache.contains((layer, e)):
                    cache.release((layer, e))
        return found

    assert slots() == slots()


def test_it_beats_least_recently_used_by_four_points_on_a_skewed_drifting_text() -> None:
    text = skewed(1, 900)
    for slots in (58, 96):  # 30 and 50 % of 6 * 32
        cache = ExpertCache(list(range(slots)))
        rate = sum(serve(cache, layer, experts) for layer, experts in text) / (4 * len(text))
        assert rate > lru_hits(slots, text) / (4 * len(text)) + 0.04


def test_an_arena_below_the_demand_of_one_token_still_hits() -> None:
    text = skewed(2, 400)
    for slots, least in ((12, 0.12), (20, 0.2)):  # one token asks for 24
        assert lru_hits(slots, text) == 0
        cache = ExpertCache(list(range(slots)))
        assert sum(serve(cache, layer, experts) for layer, experts in text) > least * 4 * len(text)


def test_a_long_prompt_leaves_hot_experts_hot() -> None:
    cache = ExpertCache(list(range(64)))
    for layer, experts in skewed(4, 600):
        serve(cache, layer, experts)
    hottest = [key for key, _ in cache.ranking()[:24]]
    for _ in range(4):  # chunks
        for layer in range(6):
            serve(cache, layer, list(range(32)))
    assert all(cache.contains(key) for key in hottest)
    assert len(set(hottest) & {key for key, _ in cache.ranking()[:24]}) >= 20


def test_a_guess_takes_no_slot_from_an_expert_that_is_expected_sooner() -> None:
    cache = ExpertCache([0, 1])
    cache.seed({(0, 0): 0.5, (0, 1): 0.3, (0, 2): 0.4, (0, 3): 0.2})
    for e in (0, 1):
        assert cache.claim((0, e)) is not None
        cache.release((0, e))
    assert cache.claim((0, 3), urgent=False) is None
    assert cache.contains((0, 1))
    assert cache.claim((0, 2), urgent=False) == 1
    assert not cache.contains((0, 1))
    assert cache.claim((0, 3)) == 0


def test_seeding_a_cache_in_use_changes_who_is_evicted_next() -> None:
    cache = ExpertCache([0, 1, 2])
    cache.seed({(0, 0): 0.5, (0, 1): 0.3, (0, 2): 0.4, (0, 4): 0.2})
    for e in range(3):
        cache.claim((0, e))
        cache.release((0, e))
    assert cache.claim((0, 3)) == 1  # the lists of victims are there now
    cache.seed({(0, 0): 0.1})
    assert cache.claim((0, 4)) == 0


def test_a_ranking_seeds_another_cache() -> None:
    text = skewed(6, 700)
    cache = ExpertCache(list(range(40)))
    for layer, experts in text[:3000]:
        serve(cache, layer, experts)
    ranking = cache.ranking()
    scores = [score for _, score in ranking]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score <= 1 for score in scores)
    assert sum(scores) == pytest.approx(6 * 4, rel=0.15)  # four of each layer at a step
    other, cold = ExpertCache(list(range(40))), ExpertCache(list(range(40)))
    other.seed(dict(ranking))
    assert [key for key, _ in other.ranking()] == [key for key, _ in ranking]
    for key, _ in ranking[:40]:
        assert other.claim(key) is not None
        other.release(key)
    first = text[3000:3120]
    assert sum(serve(other, *x) for x in first) > 1.2 * sum(serve(cold, *x) for x in first)


@pytest.mark.parametrize("score", [-0.1, 1.5, float("nan")])
def test_a_score_that_is_no_chance_is_refused(score: float) -> None:
    cache = ExpertCache([0])
    with pytest.raises(ValueError, match=r"layer 3, expert 9: the score .* is not a chance"):
        cache.seed({(3, 8): 0.5, (3, 9): score})
    assert cache.ranking() == []
