"""Reading ahead: the gate that switches it off, what counts as a right guess, and priorities in the pool."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from flashpack.formats import Pack
from flashpack.kernels import get_kernels
from flashpack.runtime import prefetch
from flashpack.runtime.budget import stride_counts
from flashpack.runtime.prefetch import Gate, Guesses
from flashpack.runtime.reads import AHEAD_DEPTH, FIRST_DEPTH, Read, ReadPool
from flashpack.runtime.store import ExpertStore
from tests.conftest import PackOf
from tests.runtime.test_store import stream, wait_for

TRIAL = 2 * prefetch.TRIAL_STEPS * prefetch.TRIAL_TURNS


def drive_gate(gate: Gate, steps: int, with_guesses: float, without: float) -> list[bool]:
    """Steps of these times; whether the gate was on at each."""
    on = []
    for _ in range(steps):
        on.append(gate.on)
        gate.step(with_guesses if gate.on else without)
    return on


def test_guessing_stays_on_where_it_is_faster_and_is_tried_again() -> None:
    gate = Gate()
    on = drive_gate(gate, TRIAL, 0.8, 1.0)
    assert sum(on) == TRIAL // 2
    assert on[: prefetch.TRIAL_STEPS] == [False] * prefetch.TRIAL_STEPS
    assert all(drive_gate(gate, prefetch.FIRST_PAUSE, 0.8, 1.0))
    # The next trial finds that it does not pay any more.
    drive_gate(gate, TRIAL, 1.2, 1.0)
    assert not any(drive_gate(gate, prefetch.FIRST_PAUSE, 1.2, 1.0))


def test_guessing_that_loses_is_tried_ever_more_rarely() -> None:
    gate = Gate()
    tried = sum(drive_gate(gate, 40_000, 1.3, 1.0))
    assert tried < 0.02 * 40_000
    assert sum(drive_gate(gate, prefetch.LAST_PAUSE + TRIAL, 1.3, 1.0)) >= TRIAL // 2


def test_a_gain_smaller_than_noise_is_none() -> None:
    gate = Gate()
    drive_gate(gate, TRIAL, 0.99, 1.0)
    assert not any(drive_gate(gate, 100, 0.99, 1.0))


def test_one_slow_step_does_not_decide() -> None:
    gate = Gate()
    for step in range(TRIAL):
        gate.step(50.0 if step in (9, 10) else 0.8 if gate.on else 1.0)
    assert gate.on


def test_mostly_wrong_guesses_end_at_once() -> None:
    guesses = Guesses()
    guesses.gate.on = True
    for step in range(8):
        for expert in range(4):
            guesses.add((step % 2, expert))
        right, wrong = guesses.judge(step % 2, [0, 9])
        assert right == {(step % 2, 0)}
        assert len(wrong) == 3
        assert guesses.gate.on == (step < 7)
    assert guesses.judge(0, [0]) == (set(), set())


def read(number: int, wanted: bool) -> Read:
    return Read((0, number), 0, 1, wanted, not wanted)


def test_nothing_is_read_ahead_while_somebody_waits_and_little_afterwards() -> None:
    pool = ReadPool()
    gates: dict[int, threading.Event] = {n: threading.Event() for n in range(20)}
    begun: list[int] = []

    def work(r: Read) -> None:
        begun.append(r.key[1])
        gates[r.key[1]].wait(30)

    wanted, ahead = read(0, True), [read(n, False) for n in range(1, 12)]
    pool.start(wanted, work)
    for r in ahead:
        pool.start_ahead(r, work)
    assert pool.take_back(ahead[0]) is ahead[0]  # none has begun
    assert pool.take_back(wanted) is None
    assert pool.take_back() is ahead[-1]
    gates[0].set()
    assert pool.landed.get(timeout=30) is wanted
    for n in range(2, 11):
        gates[n].set()
        assert pool.landed.get(timeout=30).key[1] == n
        # Never more at once than the depth: those that landed, and so many more, have begun.
        assert len(begun) - 1 <= (n - 1) + AHEAD_DEPTH
    assert begun == list(range(11))[:1] + list(range(2, 11))
    pool.close()
    pool.close()


def test_before_anybody_has_waited_more_is_read_ahead_at_once() -> None:
    pool = ReadPool()
    all_at_once = threading.Barrier(FIRST_DEPTH)
    for n in range(FIRST_DEPTH):
        pool.start_ahead(read(n, False), lambda _: all_at_once.wait(30) and None)
    landed = [pool.landed.get(timeout=30) for _ in range(FIRST_DEPTH)]
    assert [r.error for r in landed] == [None] * FIRST_DEPTH
    pool.close()


@pytest.fixture
def guessing(pack_of: PackOf) -> Callable[[int], ExpertStore]:
    def make(slots: int) -> ExpertStore:
        pack = Pack(pack_of("qwen3_moe"))
        store = ExpertStore(pack, get_kernels("cpu"), dict.fromkeys(stride_counts(pack.manifest), slots), prefetch=True)
        assert store._guesses is not None
        store._guesses.gate.on = True
        store._guesses.gate._decide = lambda pays: None  # type: ignore[method-assign]
        store._guesses.gate.step = lambda seconds: None  # type: ignore[method-assign]
        return store

    return make


def test_a_right_guess_is_a_hit_and_is_counted(guessing: Callable[[int], ExpertStore]) -> None:
    store = guessing(12)
    list(stream(store, 0, [1]))
    store.prefetch(1, [4, 5, 6])
    wait_for(store, 3)
    assert [e for e, _ in stream(store, 1, [4, 5, 7])] == [4, 5, 7]
    stats = store.stats.layers[1]
    assert (stats.hits, stats.misses, stats.guesses, stats.right_guesses) == (2, 1, 3, 2)
    assert stats.ahead_bytes == 3 * stats.bytes_read // 4
    store.close()


def test_guesses_never_take_the_slots_that_a_layer_needs(guessing: Callable[[int], ExpertStore]) -> None:
    for slots in (1, 2, 3, 5):
        store = guessing(slots)
        for step in range(12):
            layer = step % 3
            experts = [step % 8, (step + 3) % 8, (step + 5) % 8]
            seen = []
            for e, _ in stream(store, layer, experts):
                seen.append(e)
                store.prefetch((layer + 1) % 3, [(e + 1) % 8, (e + 2) % 8, 0])
            assert sorted(seen) == sorted(experts)
        store.close()


def test_a_guess_in_between_does_not_swallow_what_was_asked_for(guessing: Callable[[int], ExpertStore]) -> None:
    """``prefetch`` takes note of all complete reads; those of the request being served are kept for it."""
    for abandon in (False, True):
        store = guessing(12)
        list(stream(store, 0, [1]))
        batches = store.batches(0, [1, 2, 3])
        assert [e for e, _ in next(batches)] == [1]
        wait_for(store, 2)
        store.prefetch(1, [5])
        assert len(store._arrived) == 2
        if abandon:
            batches.close()  # type: ignore[attr-defined]
        else:
            assert sorted(e for batch in batches for e, _ in batch) == [2, 3]
        # No pin is left: every slot can be had.
        list(stream(store, 1, [5]))
        assert len(list(stream(store, 2, list(range(8))))) == 8
        assert not any(cache._pins for cache in store._caches.values())
        store.close()


def test_guesses_that_fill_the_arena_give_way(guessing: Callable[[int], ExpertStore]) -> None:
    store = guessing(2)
    store.prefetch(1, [4, 5])
    wait_for(store, 2)
    assert sorted(e for e, _ in stream(store, 0, [1, 2])) == [1, 2]
    assert not store._caches[next(iter(store._caches))]._pins
    store.close()


def test_reads_of_an_abandoned_request_are_pinned_only_until_they_land(
    guessing: Callable[[int], ExpertStore],
) -> None:
    store = guessing(12)
    list(stream(store, 0, [1]))
    batches = store.batches(0, [1, 2, 3])
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    wait_for(store, 2)
    list(stream(store, 1, [5]))
    assert not any(cache._pins for cache in store._caches.values())
    store.close()


def test_without_the_switch_nothing_is_guessed(pack_of: PackOf) -> None:
    pack = Pack(pack_of("qwen3_moe"))
    store = ExpertStore(pack, get_kernels("cpu"), dict.fromkeys(stride_counts(pack.manifest), 12))
    store.prefetch(1, [1, 2, 3])
    list(stream(store, 0, [0]))
    assert store.stats.total().ahead_bytes == 0
    assert store.stats.layers[1].guesses == 0
    store.close()
