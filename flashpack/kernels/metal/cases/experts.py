"""Experts of every kind, and their sums: of a prompt, and as steps of decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flashpack.kernels.interface import Kernels
from flashpack.kernels.metal.cases.case import EXPERT, PRODUCT, REFERENCE, SAME, Case, Pairs, steps_of
from flashpack.kernels.metal.cases.samples import MANY, ROWS, Samples, in_arena, kinds


@dataclass(frozen=True)
class Tokens:
    """Three experts with tokens of their own: ``one`` for all, or one, few and many, as in a prompt."""

    index: int
    one: bool
    tolerance: ClassVar = EXPERT
    alone: ClassVar = True

    @property
    def name(self) -> str:
        return f"experts, {'one token' if self.one else 'a prompt'}, {list(kinds())[self.index][0]}"

    def run(self, kernels: Kernels) -> Pairs:
        _, kind, activation = list(kinds())[self.index]
        samples = Samples(self.index)
        records = [samples.record(kind) for _ in range(3)]
        rows = [[0]] * 3 if self.one else [[0], [8, 2, 3], [*range(MANY), 3]]
        x = samples.normal(1 if self.one else MANY, kind.projections[-1].shape[0])
        found = torch.zeros(sum(map(len, rows)), x.shape[1], device=kernels.device)
        kernels.experts(x.to(kernels.device), in_arena(kernels, kind, records), rows, activation, found)
        expected = torch.zeros(found.shape)
        views = [REFERENCE.view_record(record, kind) for record in records]
        REFERENCE.experts(x, views, rows, activation, expected)
        return [(found.cpu(), expected)]


@dataclass(frozen=True)
class Sums:
    """Weighted sums of experts' results, some of which are missing."""

    tolerance: ClassVar = PRODUCT
    alone: ClassVar = True
    name = "sums of experts"

    def run(self, kernels: Kernels) -> Pairs:
        samples = Samples(5)
        outputs, weights = samples.normal(13, ROWS), samples.normal(MANY, 8)
        places = samples.integers(-2, 13, weights.shape, torch.int32)
        found = kernels.combine(*(t.to(kernels.device) for t in (outputs, places, weights)))
        return [(found.cpu(), REFERENCE.combine(outputs, places, weights))]


class _Token:
    """Five experts of ``kinds()[index]`` for one token."""

    def __init__(self, kernels: Kernels, index: int) -> None:
        _, kind, self.activation = list(kinds())[index]
        samples, device = Samples(index), kernels.device
        records = [samples.record(kind) for _ in range(5)]
        x, weights = samples.normal(1, kind.projections[-1].shape[0]), samples.normal(5)
        self.each = torch.cat([REFERENCE.expert(x, REFERENCE.view_record(r, kind), self.activation) for r in records])
        self.sum = (self.each * weights.unsqueeze(1)).sum(0)
        self.x, self.weights, self.views = x[0].to(device), weights.to(device), in_arena(kernels, kind, records)
        self.steps, self.outputs = steps_of(kernels), torch.zeros(self.each.shape, device=device)
        self.out, self.places = torch.zeros(x.shape[1], device=device), torch.zeros(5, dtype=torch.int32, device=device)

    def compute(self) -> Tensor:
        """The result of each, the last two first."""
        compute = self.steps.experts(self.x, self.activation, self.outputs)
        compute(self.views[3:], 0)
        compute(self.views[:3], 2)
        return self.outputs

    def combine(self) -> Tensor:
        """Their sum."""
        combine = self.steps.combine(self.outputs, self.places, self.weights, self.out)
        self.steps.read(self.places)
        self.steps.write(self.places, [2, 3, 4, 0, 1])
        combine()
        return self.out

    def at_once(self) -> Tensor:
        """Their sum at once, where the device has such a step."""
        together = self.steps.experts_combined(self.x, self.activation, self.weights, self.out)
        if together is None:
            self.compute()
            return self.combine()
        together(self.views)
        return self.out


@dataclass(frozen=True)
class Experts:
    """A token's experts in two batches."""

    index: int
    tolerance: ClassVar = EXPERT
    alone: ClassVar = True

    @property
    def name(self) -> str:
        return f"step: experts, {list(kinds())[self.index][0]}"

    def run(self, kernels: Kernels) -> Pairs:
        token = _Token(kernels, self.index)
        return [(token.compute().cpu(), token.each[[3, 4, 0, 1, 2]])]


@dataclass(frozen=True)
class AtOnce:
    """A token's experts and their weighted sum."""

    index: int
    tolerance: ClassVar = EXPERT
    alone: ClassVar = True

    @property
    def name(self) -> str:
        return f"step: experts and their sum, {list(kinds())[self.index][0]}"

    def run(self, kernels: Kernels) -> Pairs:
        token = _Token(kernels, self.index)
        return [(token.at_once().cpu(), token.sum)]


@dataclass(frozen=True)
class SameSum:
    """What is computed at once has the bits of what is computed one by one."""

    index: int
    tolerance: ClassVar = SAME
    alone: ClassVar = False

    @property
    def name(self) -> str:
        return f"experts at once and one by one, {list(kinds())[self.index][0]}"

    def run(self, kernels: Kernels) -> Pairs:
        one, other = _Token(kernels, self.index), _Token(kernels, self.index)
        one.compute()
        return [(other.at_once().cpu(), one.combine().cpu())]


@dataclass(frozen=True)
class SumStep:
    """A weighted sum of rows that the host chooses."""

    name = "step: sum"
    tolerance: ClassVar = PRODUCT
    alone: ClassVar = True

    def run(self, kernels: Kernels) -> Pairs:
        samples, device, steps = Samples(3), kernels.device, steps_of(kernels)
        outputs, weights, chosen = samples.normal(9, 192), samples.normal(4), [8, 0, 3, 5]
        places, out = torch.zeros(4, dtype=torch.int32, device=device), torch.zeros(192, device=device)
        combine = steps.combine(outputs.to(device), places, weights.to(device), out)
        steps.read(places)
        steps.write(places, chosen)
        combine()
        return [(out.cpu(), (outputs[chosen] * weights.unsqueeze(1)).sum(0))]


def cases() -> Iterator[Case]:
    for index, _ in enumerate(kinds()):
        yield Tokens(index, True)
        yield Tokens(index, False)
    yield Sums()


def step_cases() -> Iterator[Case]:
    yield SumStep()
    for index, _ in enumerate(kinds()):
        yield Experts(index)
        yield AtOnce(index)
        yield SameSum(index)
