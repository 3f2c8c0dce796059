"""Whole models on the emulated GPU: the processor's tokens, within a memory budget, waiting no more than it must."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashpack
from flashpack.kernels.metal import device
from flashpack.kernels.metal.kernels import MetalKernels
from flashpack.runtime import budget
from flashpack.runtime.memory import Usage
from tests.conftest import PackOf
from tests.metal.emulator import FakeMps
from tests.runtime.test_lean import decode, some_ids

TOLERANCE = 1e-4
"""Of logits, relative to the largest. Products are sums of float32 in another order, 1e-6 of a product's norms; layers
with recurrent states make more of it."""


class NoAlias(FakeMps):
    """A GPU whose memory the processor cannot reach, as with torch before 2.13."""

    def host(self, tensor: Tensor) -> Tensor | None:
        return None


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``metal(gpu)``: models loaded for "mps" from now on are computed by ``gpu``."""

    load = importlib.import_module("flashpack.runtime.load")  # the package has a function of this name
    real = load.get_kernels

    def use(gpu: FakeMps) -> FakeMps:
        monkeypatch.setattr(device, "unavailable", lambda: None)
        monkeypatch.setattr(
            load, "get_kernels", lambda name, *_: MetalKernels(gpu) if name == "mps" else real(name, *_)
        )
        watches.enter_context(gpu.watched())
        return gpu

    with ExitStack() as watches:
        yield use


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("trained", "q4"),
        ("trained", "gate_up=dq2,down=dq3"),
        ("qwen3_moe", "dq4"),
        ("qwen2_moe", "q4"),
        ("qwen3_next", "q4"),
    ],
)
def test_logits_are_the_processors(pack_of: PackOf, metal: Any, name: str, experts: str, lazy: bool) -> None:
    pack = pack_of(name, experts, "q4")
    ids = some_ids(20)
    expected, _ = decode(flashpack.load(pack, device="cpu", reference=True), ids, 11)
    gpu = metal(FakeMps(lazy=lazy, guarded=False))
    model = flashpack.load(pack, device="mps")
    assert model.flashpack.kernels == "metal"
    assert model.flashpack.decoding.startswith("lean")
    found, _ = decode(model, ids, 11)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
    two = expected.topk(2).values
    clear = two[:, 0] - two[:, 1] > 2 * TOLERANCE * expected.abs().max()
    assert clear.any()
    assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])
    assert gpu.launches


@pytest.mark.parametrize("gpu_of", [lambda: FakeMps(lazy=True, guarded=False), lambda: NoAlias(guarded=False)])
def test_memory_does_not_reach_the_bits(pack_of: PackOf, metal: Any, gpu_of: Any) -> None:
    pack = pack_of("trained", "q4", "q4")
    metal(gpu_of())
    ids = some_ids(16)
    large, _ = decode(flashpack.load(pack, device="mps"), ids, 7)
    model = flashpack.load(pack, device="mps", memory="smallest")
    assert sum(model.flashpack.budget.slots.values()) < model.config.num_experts_per_tok
    small, _ = decode(model, ids, 7)
    assert torch.equal(large, small)


def test_a_slot_that_is_still_read_is_waited_for(pack_of: PackOf, metal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wait before a record is overwritten, the emulator's late launches see the wrong one."""
    pack = pack_of("trained", "q4", "q4")
    metal(FakeMps(lazy=True, guarded=False))
    ids = some_ids(12)
    right, _ = decode(flashpack.load(pack, device="mps", memory="smallest"), ids, 7)
    model = flashpack.load(pack, device="mps", memory="smallest")
    store: Any = model.flashpack.store

    class Hasty:
        """The store's kernels, but for the wait."""

        def __getattr__(self, name: str) -> Any:
            return (lambda: None) if name == "wait" else getattr(kernels, name)

    kernels = store._kernels
    store._kernels = Hasty()
    wrong, _ = decode(model, ids, 7)
    assert not torch.equal(right, wrong)


@pytest.mark.parametrize("slots", [None, 24])
def test_a_token_waits_once_per_layer_with_experts(
    pack_of: PackOf, metal: Any, monkeypatch: pytest.MonkeyPatch, slots: int | None
) -> None:
    """Also where records take the places of others: those that earlier layers used are free since the layer's wait."""
    gpu, divide = metal(FakeMps(guarded=False)), budget.divide
    if slots:
        monkeypatch.setattr(budget, "divide", lambda *n: replace(d := divide(*n), slots=dict.fromkeys(d.slots, slots)))
    model: Any = flashpack.load(pack_of("trained", "q4", "q4"), device="mps")
    ids = some_ids(12)
    _, cache = decode(model, ids, 7)
    stats = model.flashpack.store.stats
    layers = len(stats.layers)
    stats.reset()
    waits, launches = gpu.waits, gpu.launches
    with torch.inference_mode():
        model(ids[:, -1:], past_key_values=cache, use_cache=True)
    assert gpu.waits - waits == layers
    assert not model.flashpack.store.prefetches  # a guess would be a wait
    assert stats.total().misses or not slots
    # A layer's first expert that is not there costs three launches, others two if they come in later.
    assert gpu.launches - launches <= 14 * layers + 3 + 3 * stats.total().misses


def test_what_is_in_memory_begins_before_the_rest_is_waited_for(pack_of: PackOf, metal: Any) -> None:
    """Launches run only once they are committed: without that, the GPU would be idle while records are read."""
    gpu = metal(FakeMps(guarded=False))
    model: Any = flashpack.load(pack_of("trained", "q4", "q4"), device="mps", memory="smallest")
    _, cache = decode(model, some_ids(8), 7)
    commits, stats = gpu.commits, model.flashpack.store.stats
    stats.reset()
    with torch.inference_mode():
        model(some_ids(1), past_key_values=cache, use_cache=True)
    assert stats.total().misses
    assert gpu.commits - commits >= len(stats.layers)


def test_half_of_the_memory_is_left_to_the_page_cache(
    pack_of: PackOf, metal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless somebody says how much; what the dense part takes is not counted twice."""
    metal(FakeMps(guarded=False))
    load, divided, divide = importlib.import_module("flashpack.runtime.load"), [], budget.divide
    monkeypatch.setattr(budget, "divide", lambda *numbers: (divided.append(numbers), divide(*numbers))[1])
    monkeypatch.setattr(load, "spare", lambda: 10**10)
    anonymous = iter([10**9, 2 * 10**9])  # before the dense part is there, and after
    monkeypatch.setattr(load, "usage", lambda: Usage(next(anonymous), 0))
    model: Any = flashpack.load(pack_of("trained", "q4", "q4"), device="mps")
    (numbers,) = divided
    assert (numbers[1], numbers[-1]) == (10**9, 5 * 10**9)
    stats = model.flashpack.store.stats
    assert (stats.io, "wires" in stats.why) == ("buffered", True)
