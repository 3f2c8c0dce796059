"""The cache policy: slots and pins, what is evicted, what is learnt."""

from __future__ import annotations

from flashpack.runtime.cache import ExpertCache


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
    cache.release((0, 1))
    assert cache.claim((0, 4)) == 100
    cache.forget((0, 4))
    assert cache.get((0, 4)) is None
    assert cache.claim((0, 5)) == 100
