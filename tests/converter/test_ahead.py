"""Work done ahead: the order, who owns a slot, and that nothing runs on after the end."""

from __future__ import annotations

import contextlib
import random
import threading
import time

import pytest

from flashpack.converter.ahead import in_order


@pytest.mark.parametrize("count", [0, 1, 2, 3, 20])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_results_come_in_order_each_in_the_slot_it_was_made_in(count: int, slots: int) -> None:
    rng = random.Random(count * slots)

    def task(i: int, slot: list[int]) -> int:
        time.sleep(rng.random() / 500)
        slot[:] = [i]
        return i * i

    seen = []
    for i, slot, result in in_order(task, count, [[-1] for _ in range(slots)]):
        time.sleep(0.001)  # the slot must not be given to another task meanwhile
        assert slot == [i]
        seen.append((i, result))
    assert seen == [(i, i * i) for i in range(count)]


def test_as_many_tasks_run_at_once_as_there_are_slots() -> None:
    together = threading.Barrier(3)

    def task(i: int, slot: None) -> None:
        together.wait(timeout=30)

    assert len(list(in_order(task, 9, [None] * 3))) == 9


def test_a_failure_comes_when_its_turn_comes_and_ends_the_rest() -> None:
    begun = []

    def task(i: int, slot: None) -> int:
        begun.append(i)
        if i == 2:
            raise ValueError("two")
        return i

    items = in_order(task, 100, [None, None])
    assert [next(items)[0], next(items)[0]] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(items)
    assert max(begun) <= 3


def test_when_it_is_closed_no_task_is_running() -> None:
    running: set[int] = set()

    def task(i: int, slot: None) -> None:
        running.add(i)
        time.sleep(0.02)
        running.remove(i)

    with contextlib.closing(in_order(task, 100, [None] * 4)) as items:
        next(items)
    assert not running
