"""Experts in memory in place of absent ones: which, with what weights, and where it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flashpack
from flashpack.errors import UsageError
from flashpack.kernels.cpu.native import compute
from flashpack.runtime import budget, lean
from flashpack.runtime.lean.blocks import Experts
from flashpack.runtime.lean.prefer import Preference
from tests.conftest import PackOf
from tests.runtime.test_lean import decode, some_ids

pytestmark = pytest.mark.skipif(isinstance(compute.library(), str), reason=f"no native kernels: {compute.library()}")


def load_with(slots: int, pack: Path, monkeypatch: pytest.MonkeyPatch, ratio: float | None) -> Any:
    """The model with so many experts in memory, of the one size that they all have."""
    divide = budget.divide

    def with_slots(*numbers: Any) -> budget.Budget:
        whole = divide(*numbers)
        return replace(whole, slots=dict.fromkeys(whole.slots, slots))

    with monkeypatch.context() as patch:
        patch.setattr(budget, "divide", with_slots)
        return flashpack.load(pack, prefer_cached=ratio, prefetch=False, warm=False)


def blocks_of(pack: Path, monkeypatch: pytest.MonkeyPatch) -> list[Experts]:
    decoders: list[lean.LeanDecoder] = []
    real = lean._match
    with monkeypatch.context() as patch:
        patch.setattr(lean, "_match", lambda m, d, s: (decoders.append(d), real(m, d, s)))
        flashpack.load(pack)
    return decoders[0].experts


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qwen3_moe", ("softmax-top", True)), ("qwen2_moe", ("softmax-top", False)),
        ("glm4_moe", ("sigmoid-top", True)), ("mixtral", ("softmax-top", True)),
    ],
)  # fmt: skip
def test_weights_are_those_that_the_router_gives(
    pack_of: PackOf, name: str, kind: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for block in blocks_of(pack_of(name, "source", "source"), monkeypatch):
        router = block.router
        assert router._kind[:2] == kind
        router._board.normed.copy_(torch.randn(len(router._board.x), generator=torch.Generator().manual_seed(1)))
        for step in router.steps:
            step()
        chosen, weights = router.chosen.tolist(), router.weights.clone()
        shares, scores = router.shares()
        assert sorted(range(len(scores)), key=scores.__getitem__)[: -1 - len(chosen) : -1] == chosen
        router.weights.zero_()
        router.weigh(shares)
        assert torch.allclose(router.weights, weights, rtol=1e-5)


class Routing:
    """A router's answer, without a model; chosen by ``scores``."""

    def __init__(self, shares: list[float], top_k: int, scores: list[float] | None = None) -> None:
        self._shares, self._scores = shares, scores or shares
        best = sorted(range(len(shares)), key=lambda e: -self._scores[e])[:top_k]
        self.chosen = torch.tensor(best, dtype=torch.int32)
        self.weighed = 0

    def shares(self) -> tuple[list[float], list[float]]:
        return self._shares, self._scores

    def read(self) -> list[int]:
        chosen: list[int] = self.chosen.tolist()
        return chosen

    def weigh(self, shares: list[float]) -> None:
        self.weighed += 1


class Block:
    """What ``Preference`` asks of a block of experts."""

    def __init__(self, router: Routing, here: set[int]) -> None:
        self.router = router
        self.holds = here.__contains__


SHARES = [0.4, 0.2, 0.1, 0.09, 0.08, 0.06, 0.04, 0.03]


@pytest.mark.parametrize(
    ("here", "ratio", "expected"),
    [
        ({0, 1, 2, 4, 5}, 0.5, [0, 1, 2]),  # nothing is absent
        ({0, 1, 4, 5}, 0.5, [0, 1, 4]),
        ({0, 1, 5}, 0.5, [0, 1, 5]),
        ({0, 1, 5}, 0.7, [0, 1, 2]),  # too light
        ({0, 4, 5}, 0.3, [0, 5, 4]),  # the lightest takes the best
        ({0, 4, 5}, 0.5, [0, 1, 4]),  # what would be too light for the second stays away
        ({3, 4, 5, 6}, 0.5, [0, 1, 3]),  # the heaviest are read
        (set(), 0.1, [0, 1, 2]),
    ],
)
def test_who_takes_the_place_of_whom(here: set[int], ratio: float, expected: list[int]) -> None:
    router = Routing(SHARES, 3)
    block: Any = Block(router, here)
    Preference(block, ratio)()
    assert router.chosen.tolist() == expected
    assert router.weighed == (expected != [0, 1, 2])


def test_a_share_is_of_the_weight_and_the_order_is_the_routers() -> None:
    """Routers that choose by more than the weight: the best by that, if its weight is enough."""
    router = Routing([0.5, 0.4, 0.3, 0.1], 1, scores=[1.0, 0.4, 0.6, 0.9])
    block: Any = Block(router, {1, 2})
    Preference(block, 0.5)()
    assert router.chosen.tolist() == [2]
    router = Routing([0.5, 0.4, 0.3, 0.1], 1, scores=[1.0, 0.4, 0.6, 0.9])
    block = Block(router, {1, 2, 3})
    Preference(block, 0.5)()  # 3 is the best by scores, but too light
    assert router.chosen.tolist() == [2]


def total_misses(model: Any) -> int:
    misses: int = model.flashpack.store.stats.total().misses
    return misses


def test_less_is_read_and_the_output_is_another(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, ids = pack_of("trained", "q4", "q8"), some_ids(120)
    own = load_with(60, pack, monkeypatch, None)
    expected, _ = decode(own, ids, 1)
    seen: list[tuple[list[int], list[int], set[int]]] = []
    real = Preference.__call__

    def noted(preference: Preference) -> None:
        router: Any = preference._router
        before: list[int] = router.chosen.tolist()
        held = {e for e in range(len(router._values)) if preference._holds(e)}
        real(preference)
        seen.append((before, router.chosen.tolist(), held))

    monkeypatch.setattr(Preference, "__call__", noted)
    model = load_with(60, pack, monkeypatch, 0.6)
    assert model.flashpack.prefer_cached == 0.6
    found, _ = decode(model, ids, 1)
    assert total_misses(model) < 0.8 * total_misses(own)
    assert (found - expected).abs().max() > 1e-2
    swapped = 0
    for before, after, held in seen:
        assert len(set(after)) == len(before)
        assert not set(before) & held - set(after)  # who is here stays
        assert set(after) - set(before) <= held
        swapped += before != after
    assert 0 < swapped < len(seen)


@pytest.mark.parametrize(("slots", "ratio"), [(192, 0.1), (60, 1 - 1e-9)])
def test_where_nothing_is_replaced_the_output_is_the_models_own(
    pack_of: PackOf, slots: int, ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in memory, once it has been read; or a share that no other has."""
    pack, ids = pack_of("trained", "q4", "q8"), some_ids(40)
    model = load_with(slots, pack, monkeypatch, ratio)
    if slots == 192:
        for layer in model.flashpack.pack.manifest.layers:
            for _ in model.flashpack.store.batches(layer.index, list(range(layer.experts))):
                pass
    found, _ = decode(model, ids, 2)
    expected, _ = decode(flashpack.load(pack), ids, 2)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_that_is_none_is_refused(pack_of: PackOf, ratio: float) -> None:
    with pytest.raises(UsageError, match=r"--prefer-cached .*: a share of a weight, between 0 and 1"):
        flashpack.load(pack_of("trained", "q4", "q8"), prefer_cached=ratio)


def test_where_the_library_decodes_it_is_refused(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = pack_of("qwen3_moe", "source", "source")
    with pytest.raises(UsageError, match="the library decodes with --reference"):
        flashpack.load(pack, prefer_cached=0.5, reference=True)
    with pytest.raises(UsageError, match="--prefer-cached: GptOssForCausalLM is decoded by the library: no layer"):
        flashpack.load(pack_of("gpt_oss", "source", "source"), prefer_cached=0.5)
    real = lean.LeanLayer.__init__
    made: list[Any] = []

    def one_in_two(layer: Any, *parts: Any) -> None:
        made.append(layer)
        if len(made) % 2:
            raise lean.NotLean("for the test")
        real(layer, *parts)

    monkeypatch.setattr(lean.LeanLayer, "__init__", one_in_two)
    with pytest.raises(UsageError, match="is decoded by the library: experts of 1 of 3 layers are steps"):
        flashpack.load(pack, prefer_cached=0.5)
