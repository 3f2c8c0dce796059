"""The gated delta rule on Metal against float64, token after token, and against the processor's kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashpack.kernels.cpu.native import compute
from flashpack.kernels.interface import DeltaShape
from flashpack.kernels.metal.device import Gpu
from flashpack.kernels.metal.steps import MetalSteps
from tests.kernels.test_recurrent import EPSILON, TOKENS, Layer, native, reference
from tests.metal.emulator import FakeMps
from tests.metal.steps import assert_close, steps_on

TOLERANCE = 1e-6
"""Of the largest number: of sums over a key, in float32, and of a state that passes its errors on for 30 tokens."""

SIZES = [
    (1, 1, 8, 8, 1, False),
    (2, 4, 16, 16, 4, False),
    (3, 9, 24, 40, 3, True),
    (1, 5, 128, 8, 4, True),
    (2, 2, 8, 512, 2, False),
    (1, 2, 512, 264, 4, True),
    (2, 4, 128, 128, 4, False),
]


def run(steps: MetalSteps, layer: Layer, by_head: bool, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Results [tokens, value heads, value width], the last window and state. ``by_head``: inputs lie in two arrays, as
    their strides say, instead of one for each."""
    key_heads, value_heads, key_width, value_width, _ = layer.sizes
    shared = value_heads // key_heads
    own = shared * value_width
    sizes = [key_width, key_width, own, own, shared, shared]
    inputs = [x.view(TOKENS, key_heads, -1) for x in layer.inputs]
    if by_head:
        stride, cuts = 2 * (key_width + own), (0, key_width, 2 * key_width, 2 * key_width + own)
        arrays = [torch.zeros(key_heads * stride), torch.zeros(2 * value_heads)]
        starts = [*(arrays[0][cut:] for cut in cuts), arrays[1], arrays[1][shared:]]
        strides = stride, stride, 2 * shared
        tokens_of = [torch.cat(inputs[:4], 2), torch.cat(inputs[4:], 2)]
    else:
        arrays = starts = [torch.zeros(key_heads * size) for size in sizes]
        strides = key_width, own, shared
        tokens_of = inputs
    weights = layer.filter, layer.bias, layer.rate, layer.rate_bias, layer.norm
    out = torch.full((value_heads, value_width), float("nan"))
    window, state = layer.window.clone(), layer.state.clone()
    step = steps.delta(DeltaShape(*weights, *layer.sizes, *strides, EPSILON), starts, out)
    results = []
    for token in range(tokens):
        for array, values in zip(arrays, tokens_of, strict=True):
            array.copy_(values[token].flatten())
        step.given(window, state)
        step()
        results.append(out.clone())
    return torch.stack(results), window.clone(), state.clone()


def check(gpu: Gpu, sizes: tuple[Any, ...], by_head: bool) -> None:
    layer = Layer(*sizes)
    for mine, expected in zip(run(steps_on(gpu), layer, by_head), reference(layer), strict=True):
        assert_close(mine, expected, TOLERANCE)


def check_small(gpu: Gpu) -> None:
    """Numbers so small that what is added under roots decides."""
    layer = Layer(2, 4, 16, 16, 4, False)
    for array in (layer.window, layer.state, *layer.inputs[:3]):
        array *= 1e-3
    for mine, expected in zip(run(steps_on(gpu), layer, False), reference(layer), strict=True):
        assert_close(mine, expected, TOLERANCE)


def test_small_numbers_follow_the_formulas(gpu: FakeMps) -> None:
    check_small(gpu)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("by_head", [False, True])
def test_a_recurrent_layer_follows_its_formulas(gpu: FakeMps, sizes: tuple[Any, ...], by_head: bool) -> None:
    check(gpu, sizes, by_head)


def test_the_order_of_threads_does_not_show(gpu: FakeMps, quick_gpu: FakeMps) -> None:
    layer = Layer(3, 9, 24, 40, 3, True)
    for mine, other in zip(run(steps_on(gpu), layer, True, 3), run(steps_on(quick_gpu), layer, True, 3), strict=True):
        assert torch.equal(mine, other)


def test_a_late_launch_finds_what_was_there(quick_gpu: FakeMps) -> None:
    layer = Layer(2, 4, 16, 16, 4, False)
    late = run(steps_on(FakeMps(lazy=True)), layer, False)
    for mine, other in zip(late, run(steps_on(quick_gpu), layer, False), strict=True):
        assert torch.equal(mine, other)


def test_what_is_not_finite_reaches_the_result(gpu: FakeMps) -> None:
    layer = Layer(2, 4, 16, 16, 4, False)
    layer.inputs[1][3, 0, 5] = float("nan")  # the first key head's: two of four value heads
    results, _, state = run(steps_on(gpu), layer, False)
    assert results[:3].isfinite().all()
    assert results[3:, :2].isnan().all()
    assert results[:, 2:].isfinite().all()
    assert state[:2].isnan().all()


def check_fading(gpu: Gpu, alpha: float) -> None:
    """By log(1 + e**alpha), of which what a float loses in 1 + e is not lost."""
    layer = Layer(1, 1, 8, 8, 1, False)
    layer.inputs[5][:] = alpha
    layer.rate_bias[:] = 0
    layer.rate[:] = -1e6 if alpha < 0 else -1e-2
    layer.inputs[4][:] = -300  # nothing is put right, so the state only fades
    _, _, state = run(steps_on(gpu), layer, False, 1)
    expected = layer.state.double() * (layer.rate.double() * torch.tensor(alpha).double().exp().log1p()).exp()
    assert_close(state, expected, TOLERANCE)


ALPHAS = [-120.0, -30.0, -16.0, 0.0, 19.0, 21.0, 120.0]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_state_fades_as_much_as_a_number_says(gpu: FakeMps, alpha: float) -> None:
    check_fading(gpu, alpha)


@pytest.mark.parametrize("change", [{0: 3}, {0: 0}, {2: 12}, {2: 520}, {3: 0}, {3: 20}, {4: 0}], ids=str)
def test_a_recurrent_layer_out_of_bounds_is_refused(quick_gpu: FakeMps, change: dict[int, int]) -> None:
    layer = Layer(2, 4, 16, 16, 4, False)
    sizes = [change.get(i, size) for i, size in enumerate(layer.sizes)]
    nothing = torch.empty(0)
    shape = DeltaShape(*[nothing] * 5, *sizes, 16, 32, 2, EPSILON)
    with pytest.raises(ValueError, match="no kernel for"):
        steps_on(quick_gpu).delta(shape, [nothing] * 6, nothing)


@pytest.mark.skipif(isinstance(compute.library(), str), reason="no native kernels")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_processor_has_the_same_layer(quick_gpu: FakeMps, sizes: tuple[Any, ...]) -> None:
    layer = Layer(*sizes)
    for mine, theirs in zip(run(steps_on(quick_gpu), layer, True), native(layer, 0, 1, True), strict=True):
        assert_close(mine, theirs.double(), 5e-6)  # the processor's own tolerance


CHECKS = {
    "delta": lambda gpu: [check(gpu, sizes, sizes[5]) for sizes in SIZES],
    "delta, small": check_small,
    "delta, fading": lambda gpu: [check_fading(gpu, alpha) for alpha in ALPHAS],
}
