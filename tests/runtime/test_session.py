"""A session: its memory, its turns, its seeds."""

from __future__ import annotations

import itertools
import threading

import pytest

import flashpack
from flashpack.runtime.sampling import Sampling
from flashpack.runtime.session import Session
from tests.conftest import PackOf

IDS = [5, 6, 7, 90, 42]


@pytest.fixture
def session(pack_of: PackOf) -> Session:
    return Session(pack_of("trained"), memory="smallest", context=256)


def test_answers_differ_unless_they_have_the_same_seed(session: Session) -> None:
    session.sampling = Sampling(2.0)
    assert len({tuple(session.complete(IDS, max_tokens=12).tokens) for _ in range(4)}) == 4
    seeded = [session.complete(IDS, max_tokens=12, sampling=Sampling(2.0, seed=3)).tokens for _ in range(2)]
    assert seeded[0] == seeded[1]


def test_threads_take_turns(session: Session) -> None:
    texts = [[*IDS, last] for last in (8, 9, 10)]
    expected = [session.complete(ids, max_tokens=20, sampling=Sampling()).tokens for ids in texts]
    said: list[int] = []
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        result = session.complete(texts[number], lambda piece: said.append(number), max_tokens=20, sampling=Sampling())
        found[number] = result.tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(i) for i in range(3)] == expected
    changes = sum(a != b for a, b in itertools.pairwise(said))
    assert changes == 2, said  # nobody was heard between two pieces of another


def test_memory_for_read_texts_is_in_the_budget(pack_of: PackOf) -> None:
    pack = pack_of("trained")
    none, least, more = (
        flashpack.load(pack, memory="smallest", context=256, prefix_memory=size).flashpack
        for size in (None, 0, 50_000_000)
    )
    assert none.prefix_memory == 0 < least.prefix_memory < more.prefix_memory == 50_000_000
    for one in (least, more):
        assert one.budget.kv - none.budget.kv == one.prefix_memory
