"""Experts' networks on the emulated GPU, against the torch kernels of the processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from flashpack.formats import Encoding, Projection, RecordKind
from flashpack.formats.records import MXFP4, fp8, nvfp4
from flashpack.kernels import Activation, RecordView
from flashpack.kernels.activations import named
from flashpack.kernels.cpu.reference import ReferenceKernels
from flashpack.kernels.interface import ACTIVATIONS
from flashpack.kernels.metal.device import Gpu
from flashpack.kernels.metal.kernels import MetalKernels
from flashpack.kernels.metal.layouts import TILE
from tests.metal.emulator import FakeMps
from tests.metal.stored import ONE_OF_EACH, name_of, record, states

TOLERANCE = 1e-5
"""Of the largest result. Both sides sum float32 products in their own order: each is off by about 1e-6 of the norms'
product, before the activation and after it."""

AFFINE4 = Encoding("affine", "BF16", 4, 32)
SILU = named("silu", gated=True)


def kind_of(
    encoding: Encoding, inner: int, hidden: int, gated: bool = True, bias: str = "", up: Encoding | None = None
) -> RecordKind:
    first = [Projection("gate", (inner, hidden), encoding, bias)] if gated else []
    others = [
        Projection("up", (inner, hidden), up or encoding, bias),
        Projection("down", (hidden, inner), encoding, bias),
    ]
    return RecordKind((*first, *others))


@dataclass
class Slots:
    """Records of a kind side by side, the last one at the end of memory, seen by the GPU's kernels and by torch's."""

    kind: RecordKind
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        stride = self.kind.stride
        arena = torch.cat([record(self.kind, seed) for seed in range(self.seed, self.seed + self.count)])
        arena = arena[: len(arena) - stride + self.kind.nbytes].clone()
        self.records = [arena[i * stride :][: self.kind.nbytes] for i in range(self.count)]

    def views(self, kernels: MetalKernels | ReferenceKernels) -> list[RecordView]:
        return [kernels.view_record(r, self.kind) for r in self.records]


def compute(
    kernels: MetalKernels | ReferenceKernels,
    slots: Slots,
    x: Tensor,
    chosen: Sequence[int],
    rows: Sequence[Sequence[int]],
    activation: Activation,
) -> Tensor:
    views = slots.views(kernels)
    out = torch.full((sum(map(len, rows)), x.shape[1]), float("nan"))
    kernels.experts(x, [views[i] for i in chosen], rows, activation, out)
    return out


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def check_experts(gpu: Gpu, kind: RecordKind, activation: Activation) -> None:
    """One token for all experts; then tokens by expert: none, one, some, more than two tiles."""
    kernels, slots = MetalKernels(gpu), Slots(kind, 3)
    hidden = kind.projections[-1].shape[0]
    x = states(2 * TILE + 3, hidden)
    for tokens, rows in ((x[:1], [[0], [0], [0]]), (x, [[1, 3, 4], list(range(2 * TILE + 2)), [5]])):
        found = compute(kernels, slots, tokens, [2, 0, 1], rows, activation)
        assert_same(found, compute(ReferenceKernels(1), slots, tokens, [2, 0, 1], rows, activation))
    assert not kernels.notices


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("encoding", ONE_OF_EACH, ids=name_of)
def test_experts_of_every_format(encoding: Encoding, gated: bool, gpu: FakeMps) -> None:
    """Where inner rows are odd, gate and up are two matrices, and rows are beside multiples of a SIMD group's."""
    group = encoding.group_size
    check_experts(gpu, kind_of(encoding, group * 2 or 37, group * 3 or 21, gated), named("silu", gated))
    wide = -(-600 // group) * group if group else 601
    check_experts(gpu, kind_of(encoding, group or 5, wide, gated, "BF16"), named("relu2", gated))


@pytest.mark.parametrize("bias", ["", "BF16", "F16", "F32"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_biases(name: str, bias: str, gpu: FakeMps) -> None:
    check_experts(gpu, kind_of(AFFINE4, 96, 64, True, bias), named(name, True, limit=0.7))
    if name != "swiglu_oai":
        check_experts(gpu, kind_of(AFFINE4, 96, 64, False, bias), named(name, False))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_small_and_large_numbers(name: str, quick_gpu: FakeMps) -> None:
    """Row i of gate is 1 at i, so gate is x, and the network's result is what the activation made of it."""
    numbers = torch.cat([torch.linspace(-12, 12, 57), torch.tensor([-1e3, -100, -30, 0, 30, 100, 1e3])])
    kind = kind_of(Encoding("raw", "F32"), 64, 64)
    view = ReferenceKernels(1).view_record(data := torch.zeros(kind.stride, dtype=torch.uint8), kind)
    (first,), down = view.first, view.down
    assert isinstance(first, Tensor)
    assert isinstance(down, Tensor)
    first[:64], down[:] = torch.eye(64), torch.eye(64)
    first[64:] = torch.eye(64).roll(7, 0)
    activation = named(name, True, limit=7.0)
    kernels = MetalKernels(quick_gpu)
    found = kernels.expert(numbers.unsqueeze(0), kernels.view_record(data, kind), activation)[0]
    up = numbers.roll(7, 0)
    expected = activation(torch.cat([numbers, up]).unsqueeze(0).double())[0]
    # Of the result and of up: gelu's error function is off by 1.5e-7 of 1.
    assert ((found - expected).abs() <= 3e-6 * expected.abs() + 3e-7 * (numbers * up).abs().clamp(max=100)).all()


UNLIKE = {
    "not stackable": kind_of(nvfp4("divide"), 32, 48),
    "rows beside a block's": kind_of(fp8("F32", (16, 32)), 40, 64),
    "rows of a block's": kind_of(fp8("BF16", (8, 32)), 64, 96),
    "two formats": kind_of(AFFINE4, 64, 96, up=Encoding("affine", "F16", 6, 32), bias="F32"),
    "one format, two groups": kind_of(AFFINE4, 64, 64, up=Encoding("affine", "BF16", 4, 64)),
    "no bits in common": kind_of(MXFP4, 32, 64, up=Encoding("raw", "F16")),
}


@pytest.mark.parametrize("kind", UNLIKE.values(), ids=UNLIKE.keys())
def test_gate_and_up_that_are_two_matrices(kind: RecordKind, gpu: FakeMps) -> None:
    check_experts(gpu, kind, SILU)


def test_an_activation_without_a_name_is_torchs(gpu: FakeMps) -> None:
    activation = Activation(lambda x: torch.tanh(x[..., :64]) + x[..., 64:])
    kernels, slots = MetalKernels(gpu), Slots(kind_of(AFFINE4, 64, 96, True, "F16"), 2)
    rows = [[0, 1, 2, 3, 4], [6]]
    found = compute(kernels, slots, states(7, 96), [1, 0], rows, activation)
    assert_same(found, compute(ReferenceKernels(1), slots, states(7, 96), [1, 0], rows, activation))
    assert len(kernels.notices) == 1
    assert "torch" in kernels.notices[0]


@pytest.mark.parametrize("encoding", ONE_OF_EACH, ids=name_of)
def test_results_do_not_depend_on_what_is_beside_them(encoding: Encoding, gpu: FakeMps) -> None:
    """1 to 20 tokens of an expert; other experts; other kinds of records: bit for bit the same."""
    group = encoding.group_size
    kind = kind_of(encoding, group or 9, group * 2 or 21, bias="BF16")
    slots, other = Slots(kind, 2), Slots(kind, 2, seed=7)
    kernels = MetalKernels(gpu)
    x = states(20, group * 2 or 21)
    alone = torch.cat([kernels.expert(token, slots.views(kernels)[0], SILU) for token in x.split(1)])
    for tokens in (2, 3, 4, 5, 8, 13, 20):
        assert torch.equal(kernels.expert(x[-tokens:], slots.views(kernels)[0], SILU), alone[-tokens:])
    records = [other.views(kernels)[1], slots.views(kernels)[0], slots.views(kernels)[1]]
    out = torch.empty(12, x.shape[1])
    kernels.experts(x, records, [[0, 1], [7, 3, 19, 2, 5], [1, 2, 3, 4, 5]], SILU, out)
    assert torch.equal(out[2:7], alone[[7, 3, 19, 2, 5]])


def share(slots: Sequence[Slots]) -> None:
    """Move records of all kinds to one arena."""
    strides = [s.kind.stride for s in slots for _ in s.records]
    arena = torch.zeros(sum(strides), dtype=torch.uint8)
    places = iter(torch.split(arena, strides))
    for s in slots:
        s.records = [place[: len(r)].copy_(r) for r, place in zip(s.records, places, strict=False)]


KINDS_AND_PLACES = {
    "two kinds in one arena": ([AFFINE4, Encoding("affine", "BF16", 2, 32)], True),
    "two kinds of one format in one arena": ([AFFINE4, Encoding("affine", "BF16", 4, 64)], True),
    "one kind in two arenas": ([AFFINE4, AFFINE4], False),
}


@pytest.mark.parametrize(("encodings", "shared"), KINDS_AND_PLACES.values(), ids=KINDS_AND_PLACES.keys())
def test_records_of_different_kinds_and_places_together(encodings: list[Encoding], shared: bool, gpu: FakeMps) -> None:
    """Each goes to the kernels of its own format, each result to its own rows."""
    slots = [Slots(kind_of(e, 64, 192), 2, seed) for seed, e in zip((0, 7), encodings, strict=True)]
    if shared:
        share(slots)
    order = [(1, 0), (0, 1), (1, 1), (0, 0)]
    rows = [[0], [1, 2, 3], [0, 2], [3]]
    x = states(4, 192)
    results = []
    for kernels in (MetalKernels(gpu), ReferenceKernels(1)):
        views = [s.views(kernels) for s in slots]
        results.append(torch.full((7, 192), float("nan")))
        kernels.experts(x, [views[a][b] for a, b in order], rows, SILU, results[-1])
    assert_same(*results)


def test_an_expert_of_16_bit_activations(quick_gpu: FakeMps) -> None:
    kernels, slots = MetalKernels(quick_gpu), Slots(kind_of(AFFINE4, 32, 64), 1)
    x = states(3, 64).to(torch.bfloat16)
    view = slots.views(kernels)[0]
    found = kernels.expert(x, view, SILU)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, kernels.expert(x.float(), view, SILU).to(torch.bfloat16))
    assert kernels.expert(x[:0], view, SILU).shape == (0, 64)


def check_combine(gpu: Gpu) -> None:
    """Places in any order, none at all among them; each sum in the order of k."""
    kernels = MetalKernels(gpu)
    outputs, weights = states(9, 300), states(5, 4, seed=1)
    places = torch.tensor(
        [[0, 8, 3, 1], [2, 2, -1, 5], [-1, -1, -1, -1], [4, 6, 7, 0], [8, 1, 2, 3]], dtype=torch.int32
    )
    found = kernels.combine(outputs, places, weights)
    exact = (outputs.double()[places.clamp(min=0)] * (weights * (places >= 0)).double().unsqueeze(-1)).sum(1)
    assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()
    assert torch.equal(kernels.combine(outputs, places[3:4], weights[3:4]), found[3:4])
    swapped = [1, 0, 2, 3]
    assert not torch.equal(kernels.combine(outputs, places[:, swapped], weights[:, swapped]), found)


def test_combine(gpu: FakeMps) -> None:
    check_combine(gpu)
    nothing = MetalKernels(gpu).combine(states(3, 8), torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2))
    assert nothing.shape == (0, 8)


def _check(encoding: Encoding, gpu: Gpu) -> None:
    group = encoding.group_size
    check_experts(gpu, kind_of(encoding, group or 37, group * 5 or 21, True, "F16"), SILU)
    check_experts(gpu, kind_of(encoding, group * 5 or 7, group or 19, False), named("relu2", False))


def _check_activation(name: str, gpu: Gpu) -> None:
    check_experts(gpu, kind_of(AFFINE4, 32, 64, True, "F32"), named(name, True, limit=0.7))


CHECKS: dict[str, Callable[[Gpu], None]] = {
    **{f"experts of {name_of(e)}": partial(_check, e) for e in ONE_OF_EACH},
    **{f"experts with {name}": partial(_check_activation, name) for name in ACTIVATIONS},
    "combine": check_combine,
}
"""What must fail where a kernel of experts.metal or combine.metal is broken."""
