"""The gated delta rule in C++ against float64, token after token, and against itself on other threads."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flashpack.kernels.cpu.native import compute
from flashpack.kernels.cpu.steps import NativeSteps
from flashpack.kernels.interface import DeltaShape

pytestmark = pytest.mark.skipif(isinstance(compute.library(), str), reason=f"no native kernels: {compute.library()}")

LEVELS = range((compute.best_level() or 0) + 1)
EPSILON = 1e-6
TOKENS = 30


class Layer:
    """Random weights, and inputs of ``TOKENS`` tokens: query and key [key heads, key width], value and gate [value
    heads, value width], beta and alpha [value heads] each."""

    def __init__(
        self, key_heads: int, value_heads: int, key_width: int, value_width: int, taps: int, bias: bool
    ) -> None:
        generator = torch.Generator().manual_seed(key_heads + value_width)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.sizes = key_heads, value_heads, key_width, value_width, taps
        self.channels = 2 * key_heads * key_width + value_heads * value_width
        self.filter, self.bias = normal(self.channels, taps), normal(self.channels) if bias else None
        self.rate, self.rate_bias = -normal(value_heads).exp() / 8, normal(value_heads)
        self.norm = normal(value_width)
        self.window, self.state = normal(self.channels, taps), normal(value_heads, key_width, value_width)
        keys, values = (TOKENS, key_heads, key_width), (TOKENS, value_heads, value_width)
        self.inputs = [normal(*shape) for shape in (keys, keys, values, values)]
        self.inputs += [2 * normal(TOKENS, value_heads), 9 * normal(TOKENS, value_heads)]  # softplus of more than 20


def native(layer: Layer, level: int, threads: int, by_head: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Results [tokens, value heads, value width], the last window and state. ``by_head``: inputs lie in one array."""
    key_heads, value_heads, key_width, value_width, _ = layer.sizes
    group = value_heads // key_heads
    workers: Any = SimpleNamespace(workers=compute.Workers(threads, level))
    arrays = [torch.empty(key_heads, t[0].numel() // key_heads) for t in layer.inputs]
    if by_head:
        widths = [a.shape[1] for a in arrays]
        arrays = [*torch.empty(key_heads, sum(widths[:4])).split(widths[:4], 1),
                  *torch.empty(key_heads, sum(widths[4:])).split(widths[4:], 1)]  # fmt: skip
        strides = sum(widths[:4]), sum(widths[:4]), 2 * group
    else:
        strides = key_width, group * value_width, group
    weights = (layer.filter, layer.bias, layer.rate, layer.rate_bias, layer.norm)
    shape = DeltaShape(*weights, *layer.sizes, *strides, EPSILON)
    out = torch.full((value_heads, value_width), float("nan"))
    window, state = layer.window.clone(), layer.state.clone()
    step = NativeSteps(workers).delta(shape, arrays, out)
    results = []
    for token in range(TOKENS):
        for array, values in zip(arrays, layer.inputs, strict=True):
            array.copy_(values[token].view(key_heads, -1))
        step.given(window, state)
        step()
        results.append(out.clone())
    return torch.stack(results), window, state


def reference(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """The same in float64, as the formulas say."""
    key_heads, value_heads, key_width, value_width, _ = layer.sizes
    window, state = layer.window.double(), layer.state.double()
    inputs = [x.double() for x in layer.inputs]
    results = []
    for query, key, value, gate, beta, alpha in zip(*inputs, strict=True):
        mixed = torch.cat([query.flatten(), key.flatten(), value.flatten()])
        window = torch.cat([window[:, 1:], mixed[:, None]], dim=1)
        mixed = F.silu((window * layer.filter.double()).sum(1) + (0 if layer.bias is None else layer.bias.double()))
        query, key, value = mixed.split([key_heads * key_width, key_heads * key_width, value_heads * value_width])
        query, key = (x.view(key_heads, key_width) for x in (query, key))
        query, key = (x / (x.square().sum(1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
        query, key = (x.repeat_interleave(value_heads // key_heads, 0) for x in (query / math.sqrt(key_width), key))
        fade = (layer.rate.double() * F.softplus(alpha + layer.rate_bias.double())).exp()
        state = state * fade[:, None, None]
        wrong = value.view(value_heads, value_width) - torch.einsum("hkv,hk->hv", state, key)
        state = state + torch.einsum("hk,hv->hkv", key, wrong * beta.sigmoid()[:, None])
        answer = torch.einsum("hkv,hk->hv", state, query)
        answer = answer / (answer.square().mean(1, keepdim=True) + EPSILON).sqrt()
        results.append(answer * layer.norm.double() * F.silu(gate))
    return torch.stack(results), window, state


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 8, 8, 1, False), (2, 4, 16, 16, 4, False), (3, 9, 24, 40, 3, True), (1, 5, 128, 8, 4, True),
     (2, 2, 8, 512, 2, False), (2, 6, 128, 128, 4, False)],
    ids=str,
)  # fmt: skip
def test_a_recurrent_layer_follows_its_formulas(sizes: tuple[Any, ...], by_head: bool, level: int) -> None:
    layer = Layer(*sizes)
    found = native(layer, level, 1, by_head)
    for mine, expected in zip(found, reference(layer), strict=True):
        assert (mine - expected).abs().max() <= 5e-6 * expected.abs().max()
    for mine, again in zip(found, native(layer, level, 3, by_head), strict=True):
        assert torch.equal(mine, again)


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_not_finite_reaches_the_result(level: int) -> None:
    layer = Layer(2, 4, 16, 16, 4, False)
    layer.inputs[1][3, 0, 5] = float("nan")  # the first key head's: two of four value heads
    results, _, state = native(layer, level, 2, False)
    assert results[:3].isfinite().all()
    assert results[3:, :2].isnan().all()
    assert results[:, 2:].isfinite().all()
    assert state[:2].isnan().all()


@pytest.mark.parametrize("change", [{0: 3}, {0: 0}, {2: 12}, {2: 520}, {3: 0}, {3: 20}, {4: 0}])
def test_a_recurrent_layer_out_of_bounds_is_refused(change: dict[int, int]) -> None:
    layer = Layer(2, 4, 16, 16, 4, False)
    sizes = [change.get(i, size) for i, size in enumerate(layer.sizes)]
    workers: Any = SimpleNamespace(workers=compute.Workers(1))
    nothing = torch.empty(0)
    shape = DeltaShape(*[nothing] * 5, *sizes, 16, 32, 2, EPSILON)
    with pytest.raises(ValueError, match="refuse the arguments of delta"):
        NativeSteps(workers).delta(shape, [nothing] * 6, nothing)()
