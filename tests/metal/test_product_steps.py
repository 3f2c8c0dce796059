"""Products and experts as steps of decoding: the bits of the kernels called one by one, in few launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from flashpack.formats import Encoding
from flashpack.formats.records import MXFP4, fp8
from flashpack.kernels import RecordView, StoredMatrix
from flashpack.kernels.activations import named
from flashpack.kernels.metal import tables
from flashpack.kernels.metal.device import Gpu
from flashpack.kernels.metal.kernels import MetalKernels
from flashpack.kernels.metal.layouts import parts_of
from flashpack.kernels.metal.product_steps import ProductSteps
from tests.metal.emulator import FakeMps
from tests.metal.stored import ONE_OF_EACH, matrix, name_of, states, together
from tests.metal.test_products_experts import AFFINE4, KINDS_AND_PLACES, Slots, kind_of, share

HIDDEN, INNER = 96, 64
SILU = named("silu", gated=True)


class NoAlias(FakeMps):
    """A GPU whose memory the processor cannot reach, as with torch before 2.13."""

    def host(self, tensor: Tensor) -> Tensor | None:
        return None


def in_one_piece(weights: Sequence[Tensor | StoredMatrix]) -> list[Tensor | StoredMatrix]:
    """The matrices, all their parts in one piece of memory, as in a dense file."""
    parts = [parts_of(w) for w in weights]
    arrays = iter(together([array for some in parts for array in some.values()]))
    moved = [{name: next(arrays) for name in some} for some in parts]
    return [
        some["weight"] if isinstance(w, Tensor) else StoredMatrix.of(w.encoding, some)
        for w, some in zip(weights, moved, strict=True)
    ]


def matrices(encodings: Sequence[Encoding], rows: Sequence[int]) -> list[Tensor | StoredMatrix]:
    return [matrix(e, n, HIDDEN, seed=i)[0] for i, (e, n) in enumerate(zip(encodings, rows, strict=True))]


def check_products(gpu: Gpu) -> None:
    """More matrices than a launch takes, of more than one format, one in another piece of memory; with and without
    biases of all types."""
    kernels = MetalKernels(gpu)
    encodings = [*[AFFINE4] * 6, Encoding("raw", "BF16"), MXFP4, fp8("F32", (0, 0)), AFFINE4]
    rows = [1, 9, 4, 17, 3, 8, 5, 2, 6, 7]
    weights = [*in_one_piece(matrices(encodings[:-1], rows[:-1])), *matrices(encodings[-1:], rows[-1:])]
    types = [torch.bfloat16, None, torch.float16, torch.float32, None] * 2
    biases = [t and states(1, n, seed=n)[0].to(t) for n, t in zip(rows, types, strict=True)]
    x, out = torch.zeros(HIDDEN), [torch.full((n,), float("nan")) for n in rows]
    step = ProductSteps(kernels).products(x, weights, biases, out)
    assert step is not None
    for seed in (1, 2):
        x.copy_(states(1, HIDDEN, seed)[0])
        step()
        for weight, bias, found in zip(weights, biases, out, strict=True):
            alone = kernels.linear(x, weight)
            assert torch.equal(found, alone if bias is None else alone + bias.float())


def test_products(gpu: FakeMps) -> None:
    check_products(gpu)


def test_matrices_of_one_format_are_one_launch(quick_gpu: FakeMps) -> None:
    kernels = MetalKernels(quick_gpu)
    x = states(1, HIDDEN)[0]
    for encodings, launches in (([AFFINE4] * 3, 1), ([AFFINE4] * 5, 2), ([AFFINE4, MXFP4, AFFINE4], 2)):
        weights = in_one_piece(matrices(encodings, [5] * len(encodings)))
        step = ProductSteps(kernels).products(x, weights, [None] * len(weights), [torch.empty(5) for _ in weights])
        assert step is not None
        before = quick_gpu.launches
        step()
        assert quick_gpu.launches - before == launches


def test_a_matrix_that_is_not_known(quick_gpu: FakeMps) -> None:
    weights = [*matrices([AFFINE4], [5]), torch.ones(5, HIDDEN, dtype=torch.int64)]
    out = [torch.empty(5), torch.empty(5)]
    assert ProductSteps(MetalKernels(quick_gpu)).products(states(1, HIDDEN)[0], weights, [None, None], out) is None


class Decoding:
    """Records of an arena, a network beside them, whose matrices lie elsewhere, and a token."""

    def __init__(self, gpu: Gpu, beside: Encoding = MXFP4, refused: frozenset[str] = frozenset()) -> None:
        self.kernels = MetalKernels(gpu, refused)
        self.steps = ProductSteps(self.kernels)
        self.records = Slots(kind_of(AFFINE4, INNER, HIDDEN, True, "BF16"), 4).views(self.kernels)
        self.records += Slots(kind_of(Encoding("affine", "F16", 3, 32), INNER, HIDDEN), 1).views(self.kernels)
        gate, up, down = (matrix(beside, *shape)[0] for shape in ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)))
        record = self.steps.record(RecordView((gate, up), down, (None, states(1, INNER)[0]), None))
        assert record is not None
        self.records.append(record)
        self.x = states(1, HIDDEN)[0]

    def one_by_one(self, chosen: Sequence[int]) -> Tensor:
        return torch.cat([self.kernels.expert(self.x.unsqueeze(0), self.records[i], SILU) for i in chosen])


def check_experts(gpu: Gpu, beside: Encoding = MXFP4) -> None:
    """In two calls, as records arrive: the network beside comes with the first of them."""
    d = Decoding(gpu, beside)
    out = torch.full((6, HIDDEN), float("nan"))
    step = d.steps.experts(d.x, SILU, out)
    for seed, chosen in enumerate(([5, 2, 0, 4, 1, 3], [5, 3, 0, 1, 2, 4])):
        d.x.copy_(states(1, HIDDEN, seed)[0])
        step([d.records[i] for i in chosen[:3]], 0)
        step([d.records[i] for i in chosen[3:]], 3)
        assert torch.equal(out, d.one_by_one(chosen))


def check_combined(gpu: Gpu, beside: Encoding = MXFP4) -> None:
    """Experts and their sum at once: the bits of experts, then the sum."""
    d = Decoding(gpu, beside)
    for chosen in ([2, 0, 1], [3, 1, 4, 0, 5], [0, 5]):
        weights, y, expected = states(1, len(chosen))[0], torch.full((HIDDEN,), 9.0), torch.full((HIDDEN,), 9.0)
        at_once = d.steps.experts_combined(d.x, SILU, weights, y)
        assert at_once is not None
        places = torch.arange(len(chosen), dtype=torch.int32)
        d.steps.combine(d.one_by_one(chosen), places, weights, expected)()
        at_once([d.records[i] for i in chosen])
        assert torch.equal(y, expected)


@pytest.mark.parametrize(("encodings", "shared"), KINDS_AND_PLACES.values(), ids=KINDS_AND_PLACES.keys())
def test_records_of_different_kinds_and_places_together(encodings: list[Encoding], shared: bool, gpu: FakeMps) -> None:
    kernels = MetalKernels(gpu)
    slots = [Slots(kind_of(e, 64, 192), 2, seed) for seed, e in zip((0, 7), encodings, strict=True)]
    if shared:
        share(slots)
    first, second = (s.views(kernels) for s in slots)
    records, x = [first[0], second[1], second[0], first[1]], states(1, 192)[0]
    outputs, weights, (y, expected) = torch.empty(4, 192), states(1, 4)[0], torch.empty(2, 192)
    steps = ProductSteps(kernels)
    steps.experts(x, SILU, outputs)(records, 0)
    assert torch.equal(outputs, torch.cat([kernels.expert(x.unsqueeze(0), r, SILU) for r in records]))
    steps.combine(outputs, torch.arange(4, dtype=torch.int32), weights, expected)()
    at_once = steps.experts_combined(x, SILU, weights, y)
    assert at_once is not None
    at_once(records)
    assert torch.equal(y, expected)


def check_sum(encoding: Encoding, gpu: Gpu) -> None:
    """The sum of experts of a format, with results beside multiples of a SIMD group's rows where it can have them."""
    group = encoding.group_size
    hidden, kernels = group * 2 or 21, MetalKernels(gpu)
    steps, views = ProductSteps(kernels), Slots(kind_of(encoding, group or 37, hidden, True, "F16"), 3).views(kernels)
    x, weights, (y, expected) = states(1, hidden)[0], states(1, 3)[0], torch.full((2, hidden), float("nan"))
    outputs = torch.cat([kernels.expert(x.unsqueeze(0), view, SILU) for view in views])
    steps.combine(outputs, torch.arange(3, dtype=torch.int32), weights, expected)()
    at_once = steps.experts_combined(x, SILU, weights, y)
    assert at_once is not None
    at_once(views)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("encoding", ONE_OF_EACH, ids=name_of)
def test_sums_of_every_format(encoding: Encoding, gpu: FakeMps) -> None:
    check_sum(encoding, gpu)


@pytest.mark.parametrize("beside", [MXFP4, AFFINE4, Encoding("raw", "F32"), fp8("BF16", (8, 8))], ids=str)
def test_experts_and_a_network_beside_them(beside: Encoding, gpu: FakeMps) -> None:
    check_experts(gpu, beside)
    check_combined(gpu, beside)


def test_records_side_by_side_are_two_launches(quick_gpu: FakeMps) -> None:
    d = Decoding(quick_gpu)
    out = torch.empty(3, HIDDEN)
    experts = d.steps.experts(d.x, SILU, out)
    at_once = d.steps.experts_combined(d.x, SILU, torch.ones(3), out[0])
    assert at_once is not None
    for call in (lambda: experts(d.records[:3], 0), lambda: at_once(d.records[1:4])):
        before = quick_gpu.launches
        call()
        assert quick_gpu.launches - before == 2


@pytest.mark.parametrize("gpu_of", [lambda: FakeMps(lazy=True), lambda: NoAlias(lazy=True)])
@pytest.mark.parametrize("room", [64, 2**16])
def test_tables_are_not_written_to_while_they_are_read(
    room: int, gpu_of: Callable[[], FakeMps], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launches run late; each needs the numbers it was given."""
    monkeypatch.setattr(tables, "_ROOM", room)
    d = Decoding(gpu_of())
    outputs = [torch.empty(4, HIDDEN) for _ in range(5)]
    steps = [d.steps.experts(d.x, SILU, out) for out in outputs]
    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 5, 2], [4, 5, 3, 0], [2, 3, 0, 1]]
    for turn in (0, 1):
        for step, order in zip(steps, orders[turn:] + orders[:turn], strict=True):
            step([d.records[i] for i in order], 0)
        d.kernels.wait()
    expected = [d.one_by_one(order) for order in orders[1:] + orders[:1]]
    d.kernels.wait()
    for out, right in zip(outputs, expected, strict=True):
        assert torch.equal(out, right)


def test_tables_begin_anew_after_a_wait(quick_gpu: FakeMps) -> None:
    kernels = MetalKernels(quick_gpu)
    first, second = kernels.tables.table([1, 2, 3]), kernels.tables.table([4])
    assert (first.tolist(), second.tolist()) == ([1, 2, 3], [4])
    assert (first.storage_offset(), second.storage_offset()) == (0, 64)
    kernels.wait()
    again = kernels.tables.table([5, 6])
    assert again.data_ptr() == first.data_ptr()
    assert again.tolist() == [5, 6]


def test_refused_kernels_are_torchs_operations(quick_gpu: FakeMps) -> None:
    refused = frozenset({"linear_mxfp4", "experts_down_affine4", "combine"})
    right, wrong = Decoding(quick_gpu), Decoding(quick_gpu, refused=refused)
    chosen, weights, places = [0, 3, 5], states(1, 3)[0], torch.arange(3, dtype=torch.int32)
    results = []
    weight, bias = matrix(MXFP4, 7, HIDDEN)[0], states(1, 7)[0]
    for d in (right, wrong):
        outputs, y, z = torch.empty(3, HIDDEN), torch.empty(HIDDEN), torch.empty(7)
        d.steps.experts(d.x, SILU, outputs)([d.records[i] for i in chosen], 0)
        d.steps.combine(outputs, places, weights, y)()
        product = d.steps.products(d.x, [weight], [bias], [z])
        assert product is not None
        product()
        results.append(torch.cat([outputs.flatten(), y, z]))
    assert torch.allclose(*results, rtol=1e-4, atol=1e-4)
    assert not right.kernels.notices
    assert {name for name in refused if any(name in line for line in wrong.kernels.notices)} == refused
    assert wrong.steps.experts_combined(wrong.x, SILU, weights, y) is None


CHECKS: dict[str, Callable[[Gpu], None]] = {
    "products of one token": check_products,
    "experts of one token": check_experts,
    "experts of one token and their sum": check_combined,
    **{f"sum of experts of {name_of(e)}": partial(check_sum, e) for e in ONE_OF_EACH},
}
