"""Memory of records, taken early or when it is written to."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from flashpack.kernels.cpu.arena import HostArena, PrefaultedMemory
from flashpack.runtime import budget as budgets
from flashpack.runtime import load
from flashpack.runtime.memory import usage
from tests.conftest import PackOf

MIB = 2**20

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can take memory without writing to it")


def wait_for(early: PrefaultedMemory, size: int) -> None:
    end = time.monotonic() + 30
    while early.taken < size and time.monotonic() < end:
        time.sleep(0.005)
    early.stop()


@linux
def test_early_memory_is_taken_as_far_as_asked_and_is_the_arena() -> None:
    before = usage().anonymous
    early = PrefaultedMemory(64 * MIB)
    early.mapping[MIB] = 7
    early.take(30 * MIB)
    wait_for(early, 30 * MIB)
    early.take(30 * MIB - 1)  # less than there is, and no whole pages
    early.stop()
    if not early.taken:
        pytest.skip("this kernel cannot take memory without writing to it")
    assert early.taken == 30 * MIB
    assert 25 * MIB < usage().anonymous - before < 40 * MIB
    arena = HostArena(20 * MIB, early)
    assert arena.tensor.shape == (20 * MIB,)
    assert arena.tensor[MIB] == 7
    assert early.taken == 20 * MIB  # the rest was given back
    assert usage().anonymous - before < 26 * MIB
    arena.room(0, 4096)[:3] = b"abc"
    assert arena.tensor[:3].tolist() == [97, 98, 99]
    early.take(2**40)
    wait_for(early, 20 * MIB)
    assert early.taken == 20 * MIB  # no more than the arena has
    assert arena.tensor[MIB] == 7


def test_an_arena_that_early_memory_is_too_small_for_is_its_own() -> None:
    early = PrefaultedMemory(MIB)
    early.take(MIB)
    if early._thread is not None:
        early._thread.join(30)
    arena = HostArena(2 * MIB, early)
    assert early.taken == 0
    early.take(MIB)
    early.stop()
    assert early.taken == 0
    arena.tensor.fill_(1)
    assert early.mapping[0] == 0
    early.stop()
    early.stop()


@linux
def test_what_is_no_whole_number_of_pages_is_taken_step_by_step() -> None:
    early = PrefaultedMemory(64 * MIB)
    for size in (10**7 + 1, 40 * MIB + 1):
        early.take(size)
        wait_for(early, size // 4096 * 4096)
        assert early.taken in (0, size // 4096 * 4096)
    arena = HostArena(20 * MIB + 1, early)
    assert arena.tensor.shape == (20 * MIB + 1,)
    assert early.taken in (0, 20 * MIB + 4096)


def test_a_system_that_cannot_do_it_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def madvise(self, *arguments: Any) -> int:
            return -1

    monkeypatch.setattr("flashpack.kernels.cpu.arena.ctypes.CDLL", lambda name: Library())
    early = PrefaultedMemory(MIB)
    early.take(MIB)
    if early._thread is not None:
        early._thread.join(timeout=30)
    early.stop()
    assert early.taken == 0


@linux
def test_taking_stops() -> None:
    early = PrefaultedMemory(2**33)
    early.take(2**33)
    early.stop()
    taken = early.taken
    time.sleep(0.05)
    assert early.taken == taken < 2**33


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's memory")
def test_what_is_taken_early_is_not_counted_twice(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pack_of("trained", experts="source", dense="source")
    monkeypatch.setattr(sys.modules[load.__module__], "_EARLY_LEAST", 1)
    seen: list[Any] = []

    class Seen(PrefaultedMemory):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            seen.append(self)

        def stop(self) -> None:
            if self._thread is not None and not self.taken:
                wait = time.monotonic() + 5
                while not self.taken and self._thread.is_alive() and time.monotonic() < wait:
                    time.sleep(0.005)
            super().stop()

    def base(early: bool) -> int:
        monkeypatch.setattr("flashpack.kernels.cpu.arena.PrefaultedMemory", Seen)
        model: Any = load(folder, memory="60GB" if early else "smallest", context=64)
        return int(model.flashpack.budget.base)

    base(False)
    assert not seen  # the smallest takes nothing early
    without = base(False)
    with_it = base(True)
    assert seen
    assert abs(with_it - without) < 8 * MIB
    (arena,) = {len(one.mapping) for one in seen}
    assert arena <= 60 * 10**9


def test_requests_end_the_taking(pack_of: PackOf) -> None:
    model: Any = load(pack_of("trained"), memory="60GB", context=64)
    store = model.flashpack.store
    store._early = early = PrefaultedMemory(2**33)
    early.take(2**33)
    list(store.batches(0, [0]))
    assert store._early is None
    assert early._thread is None
    assert early.taken < 2**33


@pytest.fixture
def prefaulted(monkeypatch: pytest.MonkeyPatch) -> list[PrefaultedMemory]:
    """All that ``load`` makes, also of small packs."""
    monkeypatch.setattr(sys.modules[load.__module__], "_EARLY_LEAST", 1)
    seen: list[PrefaultedMemory] = []

    class Seen(PrefaultedMemory):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            seen.append(self)

    monkeypatch.setattr("flashpack.kernels.cpu.arena.PrefaultedMemory", Seen)
    return seen


def test_small_arenas_are_not_taken_early(pack_of: PackOf) -> None:
    model: Any = load(pack_of("trained"), memory="60GB", context=64)
    assert model.flashpack.store._early is None


@linux
def test_what_is_taken_is_still_to_be_had_and_goes_on_until_experts_are_asked_for(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, prefaulted: list[PrefaultedMemory]
) -> None:
    asked: list[Any] = []
    divide = budgets.divide

    def spied(pack: Any, base: int, kv: int, work: int, total: Any, spare: int) -> Any:
        asked.append((spare, prefaulted[0].taken))
        return divide(pack, base, kv, work, total, spare)

    monkeypatch.setattr(budgets, "divide", spied)
    monkeypatch.setattr(sys.modules[load.__module__], "spare", lambda: 10**10)
    model: Any = load(pack_of("trained", experts="source", dense="source"), context=64)
    ((spare, taken),) = asked
    assert spare == 10**10 + taken
    store = model.flashpack.store
    assert store._early is prefaulted[0]
    monkeypatch.setattr(sys.modules[load.__module__], "_prefaulted", lambda *args: (PrefaultedMemory(2**26), 0))
    model = load(pack_of("trained"), memory="60GB", context=64)
    early, arena = model.flashpack.store._early, model.flashpack.budget.arena
    wait_for(early, arena)
    assert early.taken in (0, arena)
    assert bool(early.taken) == bool(taken)  # where the system can do it


def test_a_load_that_fails_takes_no_more(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, prefaulted: list[PrefaultedMemory]
) -> None:
    def failing(*arguments: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr("flashpack.runtime.dense.fill", failing)
    with pytest.raises(ValueError, match="no"):
        load(pack_of("trained"), memory="60GB", context=64)
    assert [one._thread for one in prefaulted] == [None]
