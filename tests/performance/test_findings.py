"""Mistakes that were found by using bench, tune and plan."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from flashpack.errors import UsageError
from flashpack.formats import Pack
from flashpack.performance import bench as benches
from flashpack.performance import roofline, speed
from flashpack.performance import tune as tuning
from flashpack.performance.measure import apart, tokens_for
from flashpack.performance.roofline import Weights
from flashpack.runtime.budget import Budget
from flashpack.runtime.rates import Rate
from tests.conftest import PackOf


def never(*arguments: object) -> None:
    raise AssertionError("measured before the arguments were looked at")


def test_a_text_without_tokens_is_refused_before_anything_is_measured(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benches, "apart", never)
    monkeypatch.setattr(tuning, "apart", never)
    with pytest.raises(UsageError, match="the text has no tokens"):
        benches.bench(pack_of("trained"), "", [], 2, 1)
    with pytest.raises(UsageError, match="the text has no tokens"):
        tuning.tune(pack_of("trained"), "", 10**9, 30, 4, 8)


def test_more_tokens_than_the_default_context_has_are_refused(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget has a KV cache for the context only."""
    monkeypatch.setattr(benches, "apart", never)
    with pytest.raises(UsageError, match="measuring needs 200018 tokens"):
        benches.bench(pack_of("trained"), "some text", [], 1, 100_000)


def test_a_text_that_is_repeated_is_told_of(pack_of: PackOf) -> None:
    pack, said = Pack(pack_of("trained")), list[str]()
    ids = tokens_for(pack, "a short text", 20, said.append)
    assert 0 < len(ids) < 20
    assert f"the text has {len(ids)} tokens of the 20" in said[0]
    assert tokens_for(pack, "a short text", len(ids), never) == ids


def test_budgets_that_are_the_same_are_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure", lambda *rest: [Rate(4096, 1e9, 1e9, 0.0)])
    monkeypatch.setattr(speed, "memory_rate", lambda threads: 1e10)
    least = Budget(300 * 10**6, 0, 0, 0, {4096: 1})
    found = roofline.roofline(Weights(10**6, 10**5, 10**6, 4096), [tmp_path / "x"], least, 10**10, [])
    assert found is not None
    assert [row.memory for row in found.rows] == [400 * 10**6]


def hears_of_interrupts() -> bool:
    return signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_ctrl_c_is_for_who_waits_only() -> None:
    """It came to the process that measures, too, and was printed as a traceback while that one was starting."""
    assert not apart(hears_of_interrupts)
    assert hears_of_interrupts()
