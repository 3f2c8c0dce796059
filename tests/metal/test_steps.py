"""Steps on Metal between products: norms, a router's choice, what the host reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashpack.kernels.cpu.compiled import NativeKernels
from flashpack.kernels.cpu.native import compute
from flashpack.kernels.cpu.steps import NativeSteps
from flashpack.kernels.interface import MODES, Steps
from flashpack.kernels.metal.device import Gpu
from tests.metal import test_steps_attention, test_steps_delta
from tests.metal.emulator import FakeMps
from tests.metal.steps import assert_close, steps_on

needs_native = pytest.mark.skipif(isinstance(compute.library(), str), reason="no native kernels")
EPSILON = 1e-5
TOLERANCE = 5e-7
"""Of the largest number: a few roundings, 6e-8 each, of a sum whose terms are not negative, or of an exponential."""


class Norm:
    def __init__(self, width: int, adds: bool, weighs: bool) -> None:
        generator = torch.Generator().manual_seed(width)
        x, y, weight = torch.randn(3, width, generator=generator)
        self.x, self.y, self.weight = x, y if adds else None, weight if weighs else None

    def run(self, steps: Steps) -> tuple[Tensor, Tensor]:
        x, out = self.x.clone(), torch.full_like(self.x, float("nan"))
        steps.add_norm(x, self.y, self.weight, EPSILON, out)()
        return x, out

    def expected(self) -> tuple[Any, Any]:
        x, y, weight = (None if t is None else t.double().numpy() for t in (self.x, self.y, self.weight))
        x = x if y is None else x + y
        out = x / np.sqrt((x**2).mean() + EPSILON)
        return x, out if weight is None else out * weight


def check_norm(gpu: Gpu, width: int, adds: bool, weighs: bool) -> None:
    norm = Norm(width, adds, weighs)
    for mine, expected in zip(norm.run(steps_on(gpu)), norm.expected(), strict=True):
        assert_close(mine, expected, TOLERANCE)


WIDTHS = [1, 31, 32, 33, 64, 1000, 1024, 1025, 2880, 8192]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm_follows_its_formula(gpu: FakeMps, width: int) -> None:
    for adds, weighs in [(True, True), (False, True), (True, False)]:
        check_norm(gpu, width, adds, weighs)


@needs_native
def test_the_processor_has_the_same_norm(quick_gpu: FakeMps) -> None:
    norm = Norm(2048, True, True)
    for mine, theirs in zip(norm.run(steps_on(quick_gpu)), norm.run(NativeSteps(NativeKernels(1))), strict=True):
        assert_close(mine, theirs.double(), 2 * TOLERANCE)


class Choice:
    """A router's logits, far enough from each other that floats keep their order, some of them equal."""

    def __init__(self, experts: int, top_k: int, mode: str, divide: bool, biased: bool, factor: float = 2.5) -> None:
        generator = torch.Generator().manual_seed(experts + top_k)
        order = torch.randperm(experts, generator=generator)
        self.logits = torch.linspace(-6, 6, max(2, experts))[order]
        self.logits[order[: experts // 3]] = self.logits[order.flip(0)[: experts // 3]].clone()  # equals
        steps = torch.randint(-8, 9, (experts,), generator=generator)
        self.bias = steps / 8 if biased else None
        self.arguments: Any = (top_k, mode, divide, factor)

    def run(self, steps: Steps) -> tuple[list[int], Tensor]:
        top_k = self.arguments[0]
        chosen, weights = torch.full((top_k,), -2, dtype=torch.int32), torch.full((top_k,), -2.0)
        steps.route(self.logits, self.bias, *self.arguments, chosen, weights)()
        return chosen.tolist(), weights

    def expected(self) -> tuple[list[int], Any]:
        top_k, mode, divide, factor = self.arguments
        logits = self.logits.double().numpy()
        if mode == "sigmoid-top":
            values = 1 / (1 + np.exp(-logits))
            scores = values + (0 if self.bias is None else self.bias.double().numpy())
        else:
            scores, values = logits, np.exp(logits - np.nanmax(logits))
            values = values / values.sum()
        usable = [e for e in range(len(logits)) if scores[e] > -np.inf]
        chosen = sorted(usable, key=lambda e: -scores[e])[:top_k]  # sorting keeps the order of equals
        weights = values[chosen]
        if divide or mode == "top-softmax":
            weights = weights / weights.sum()
        return chosen, weights * factor


def check_choice(gpu: Gpu, choice: Choice) -> None:
    chosen, weights = choice.run(steps_on(gpu))
    expected, expected_weights = choice.expected()
    assert chosen == expected
    assert_close(weights, expected_weights, TOLERANCE)


COUNTS = [(1, 1), (7, 3), (31, 31), (32, 1), (33, 8), (128, 40), (512, 10), (4096, 6)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("experts", "top_k"), COUNTS)
def test_a_router_chooses_the_largest(gpu: FakeMps, experts: int, top_k: int, mode: str) -> None:
    for divide in (False, True):
        for biased in (False, True) if mode == "sigmoid-top" else (False,):
            check_choice(gpu, Choice(experts, top_k, mode, divide, biased))


def equals(mode: str) -> Choice:
    choice = Choice(100, 5, mode, True, False)
    choice.logits[:] = 0.25
    choice.logits[[40, 72]] = 1.0  # of one lane
    return choice


@pytest.mark.parametrize("mode", MODES)
def test_the_first_of_equals_is_chosen_first(gpu: FakeMps, mode: str) -> None:
    check_choice(gpu, equals(mode))
    assert equals(mode).expected()[0] == [40, 72, 0, 1, 2]


def check_largest(gpu: Gpu) -> None:
    """One logit so much larger than all others that only exponentials of differences from it are floats."""
    for place in range(70):
        choice = Choice(70, 2, "softmax-top", False, False)
        choice.logits[:] = 0
        choice.logits[place] = 300
        check_choice(gpu, choice)


def test_the_largest_logit_may_be_anywhere(gpu: FakeMps) -> None:
    check_largest(gpu)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_no_number_is_not_chosen(gpu: FakeMps, mode: str) -> None:
    steps = steps_on(gpu)
    choice = Choice(40, 3, mode, True, False)
    choice.logits[[0, 5, 33]] = torch.tensor([float("nan"), -float("inf"), float("nan")])
    assert choice.run(steps)[0] == choice.expected()[0]
    choice.logits[[*range(1, 38)]] = float("nan")
    chosen, weights = choice.run(steps)
    assert set(chosen[:2]) == {38, 39}
    assert chosen[2] == -1
    assert weights[2].isnan()
    choice.logits[:] = float("nan")
    chosen, weights = choice.run(steps)
    assert chosen == [-1, -1, -1]
    assert weights.isnan().all()
    with pytest.raises(FloatingPointError, match="a router's logits are not numbers"):
        steps.read(torch.tensor(chosen, dtype=torch.int32))


@pytest.mark.parametrize(("experts", "top_k"), [(4097, 1), (8, 0), (8, 9)])
def test_choices_out_of_bounds_are_refused(quick_gpu: FakeMps, experts: int, top_k: int) -> None:
    with pytest.raises(ValueError, match="no kernel chooses"):
        Choice(experts, top_k, MODES[0], True, False).run(steps_on(quick_gpu))


@needs_native
@pytest.mark.parametrize("mode", MODES)
def test_the_processor_chooses_the_same(quick_gpu: FakeMps, mode: str) -> None:
    for experts, top_k in COUNTS:
        choice = Choice(experts, top_k, mode, False, True)
        mine, theirs = (choice.run(steps) for steps in (steps_on(quick_gpu), NativeSteps(NativeKernels(1))))
        assert mine[0] == theirs[0]
        assert_close(mine[1], theirs[1].double(), 5e-6)  # the processor adds up 4096 numbers in one row


class Apart(FakeMps):
    """A GPU whose memory the processor does not see."""

    def host(self, tensor: Tensor) -> None:
        return None


@pytest.mark.parametrize("kind", [FakeMps, Apart])
def test_the_host_reads_what_steps_wrote_and_they_what_it_wrote(kind: type[FakeMps]) -> None:
    gpu = kind(lazy=True)
    steps = steps_on(gpu)
    choice = Choice(40, 3, MODES[0], True, False)
    chosen, weights = torch.zeros(3, dtype=torch.int32), torch.zeros(3)
    route = steps.route(choice.logits, None, *choice.arguments, chosen, weights)
    route()
    assert steps.read(chosen) == choice.expected()[0]
    steps.write(chosen, [7, 8])
    assert chosen.tolist() == [7, 8, choice.expected()[0][2]]
    assert steps.synchronisations == 1


def test_a_sequence_runs_in_order(quick_gpu: FakeMps) -> None:
    steps = steps_on(quick_gpu)
    x, y, out, again = (torch.ones(40) for _ in range(4))
    first = steps.add_norm(x, y, None, 0.0, out)
    second = steps.add_norm(x, out, None, 0.0, again)
    steps.sequence([first, second])()
    assert torch.equal(x, torch.full((40,), 3.0))


def check_choices(gpu: Gpu) -> None:
    for mode in MODES:
        check_choice(gpu, equals(mode))
        for experts, top_k in COUNTS:
            for divide in (False, True):
                check_choice(gpu, Choice(experts, top_k, mode, divide, True))


CHECKS: dict[str, Callable[[Gpu], Any]] = {
    "add_norm": lambda gpu: [check_norm(gpu, width, width % 2 == 0, width % 3 > 0) for width in WIDTHS],
    "route": check_choices,
    "route, one large": check_largest,
    **test_steps_attention.CHECKS,
    **test_steps_delta.CHECKS,
}
"""By what they are about: each raises if kernels of steps.metal are wrong."""
