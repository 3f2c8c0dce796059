"""Attention of one token on Metal against float64, the processor's kernel, and itself beside other heads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flashpack.kernels.cpu.compiled import NativeKernels
from flashpack.kernels.cpu.native import compute
from flashpack.kernels.cpu.steps import NativeSteps
from flashpack.kernels.interface import AttentionShape, Steps
from flashpack.kernels.metal.device import Gpu
from tests.metal.emulator import FakeMps
from tests.metal.steps import assert_close, steps_on

EPSILON = 1e-2  # so large that results would show if it were not there
TOLERANCE = 1.5e-6
"""Of the largest result. Scores here are below 8 and have an error of a few 2**-24 of that, which exponentials pass on;
everything else is summed in float32, too. It grows with the scores (``Sizes.sharp``)."""


@dataclass(frozen=True)
class Sizes:
    heads: int
    kv_heads: int
    width: int
    rotary: int
    gated: bool = False
    query_normed: bool = True
    key_normed: bool = True
    sharp: float = 1


SIZES = [
    Sizes(1, 1, 8, 8),
    Sizes(4, 2, 128, 64),
    Sizes(3, 1, 96, 32, gated=True, key_normed=False),
    Sizes(8, 1, 256, 64, gated=True),
    Sizes(10, 1, 40, 0, query_normed=False),
    Sizes(6, 1, 512, 512, gated=True),
    Sizes(2, 2, 264, 16, query_normed=False, key_normed=False),
    Sizes(4, 2, 64, 32, sharp=40),  # differences of scores whose exponentials are no floats
]
CONTEXTS = [1, 2, 31, 32, 33, 64, 65, 129, 700]


class Token:
    """A token after others: its arrays, random, in a cache with room for three more. What is no key yet is NaN."""

    def __init__(self, sizes: Sizes, tokens: int) -> None:
        generator = torch.Generator().manual_seed(tokens)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.sizes, self.position = sizes, tokens - 1
        width, stride = sizes.width, sizes.width * (1 + sizes.gated)
        self.query = normal(sizes.heads, stride)
        self.key, self.value = normal(sizes.kv_heads, width), normal(sizes.kv_heads, width)
        self.query_norm = normal(width) if sizes.query_normed else None
        self.key_norm = normal(width) if sizes.key_normed else None
        angles = normal(sizes.rotary // 2).repeat(2)
        self.cosine, self.sine = angles.cos(), angles.sin()
        self.keys, self.values = (normal(sizes.kv_heads, tokens + 3, width) for _ in range(2))
        self.keys[:, self.position :] = self.values[:, self.position :] = float("nan")
        self.shape = AttentionShape(
            self.query_norm, self.key_norm, sizes.heads, sizes.kv_heads, width, sizes.rotary, stride,
            width if sizes.gated else 0, EPSILON,
            sizes.sharp * width**-0.5,
        )  # fmt: skip

    def attend(self, steps: Steps) -> tuple[Tensor, Tensor, Tensor]:
        """The result [heads, width], and the caches after it."""
        keys, values = self.keys.clone(), self.values.clone()
        out = torch.full((self.sizes.heads, self.sizes.width), float("nan"))
        step = steps.attention(self.shape, self.query.view(-1), self.key.view(-1), self.value.view(-1), out)
        none = torch.zeros(1)  # in place of nothing at all, where nothing is turned
        turn = (self.cosine, self.sine) if self.sizes.rotary else (none, none)
        step.given(keys, values, self.position, *turn)
        step()
        return out, keys, values

    def expected(self) -> tuple[Any, Any, Any]:
        """The same in float64, as the formulas say."""
        sizes, width, before = self.sizes, self.sizes.width, self.position
        query, key, value, keys, values = (
            t.double().numpy().copy() for t in (self.query, self.key, self.value, self.keys, self.values)
        )
        keys[:, before] = self._ready(key, self.key_norm)
        values[:, before] = value
        asked = self._ready(query[:, :width], self.query_norm) * self.shape.scale
        shared = sizes.heads // sizes.kv_heads
        scores = np.einsum("hw,htw->ht", asked, keys[:, : before + 1].repeat(shared, 0))
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        out = np.einsum("ht,htw->hw", weights, values[:, : before + 1].repeat(shared, 0))
        if sizes.gated:
            out /= 1 + np.exp(-query[:, width:])
        return out, keys, values

    def _ready(self, x: Any, norm: Tensor | None) -> Any:
        if norm is not None:
            x = x / np.sqrt((x**2).mean(1, keepdims=True) + EPSILON) * norm.double().numpy()
        rotary = self.sizes.rotary
        turned, rest = x[:, :rotary], x[:, rotary:]
        swapped = np.concatenate([-turned[:, rotary // 2 :], turned[:, : rotary // 2]], axis=1)
        turned = turned * self.cosine.double().numpy() + swapped * self.sine.double().numpy()
        return np.concatenate([turned, rest], axis=1)


def check(gpu: Gpu, sizes: Sizes, tokens: int) -> None:
    token = Token(sizes, tokens)
    found, expected = token.attend(steps_on(gpu)), token.expected()
    assert_close(found[0], expected[0], TOLERANCE * sizes.sharp)
    for cache, before, after in zip(found[1:], (token.keys, token.values), expected[1:], strict=True):
        assert_close(cache[:, : token.position + 1], after[:, : token.position + 1], TOLERANCE)
        assert torch.equal(cache[:, : token.position], before[:, : token.position])
        assert cache[:, token.position + 1 :].isnan().all()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention_follows_its_formulas(gpu: FakeMps, sizes: Sizes) -> None:
    for tokens in CONTEXTS if sizes.width < 256 else [1, 65, 200]:
        check(gpu, sizes, tokens)


def check_long(gpu: Gpu) -> None:
    """More blocks than threads that add up their shares; a block's largest score is so much larger than all others that
    theirs count for nothing, wherever it is."""
    sizes, steps = Sizes(1, 1, 8, 0, query_normed=False, key_normed=False), steps_on(gpu)
    check(gpu, sizes, 33_000)
    for block in (0, 1, 511, 512, 515):
        token = Token(sizes, 33_000)
        place = 64 * block + 7
        token.keys[0, place] = token.query[0] * 100 / token.query.square().sum() / token.shape.scale
        assert_close(token.attend(steps)[0], token.values[:, place].double(), TOLERANCE)


def test_a_context_of_more_blocks_than_threads(quick_gpu: FakeMps) -> None:
    check_long(quick_gpu)


@pytest.mark.parametrize("shared", [2, 3, 4, 7, 8, 9])
def test_a_head_has_the_same_bits_alone_and_beside_others(quick_gpu: FakeMps, shared: int) -> None:
    steps = steps_on(quick_gpu)
    together = Token(Sizes(2 * shared, 2, 64, 32, gated=True), 150)
    results = together.attend(steps)[0]
    for head in (0, shared - 1, shared, 2 * shared - 1):
        alone = Token(Sizes(1, 1, 64, 32, gated=True), 150)
        alone.query = together.query[head : head + 1]
        for name in ("key", "value", "keys", "values"):
            kv_head = head // shared
            setattr(alone, name, getattr(together, name)[kv_head : kv_head + 1])
        alone.cosine, alone.sine = together.cosine, together.sine
        alone.shape = replace(together.shape, heads=1, kv_heads=1)
        assert torch.equal(alone.attend(steps)[0][0], results[head])


def test_the_order_of_threads_does_not_show(gpu: FakeMps, quick_gpu: FakeMps) -> None:
    token = Token(Sizes(6, 2, 72, 32), 300)
    for mine, other in zip(token.attend(steps_on(gpu)), token.attend(steps_on(quick_gpu)), strict=True):
        assert torch.equal(mine.nan_to_num(), other.nan_to_num())


def test_tokens_that_are_launched_before_one_has_run() -> None:
    """No token may see the position, cache or rotary of another."""
    sizes, results = Sizes(2, 1, 32, 32), []
    for gpu in (FakeMps(), FakeMps(lazy=True)):
        steps = steps_on(gpu)
        last = Token(sizes, 140)
        out = torch.zeros(20, 2, 32)
        for n in range(20):
            step = steps.attention(last.shape, last.query.view(-1), last.key.view(-1), last.value.view(-1), out[n])
            step.given(last.keys, last.values, last.position - 19 + n, last.cosine * (n + 1), last.sine)
            step()
        gpu.wait()
        results.append(out)
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_what_is_no_number_reaches_the_heads_that_read_it(gpu: FakeMps) -> None:
    token = Token(Sizes(4, 2, 64, 64), 100)
    token.keys[1, 70, 3] = float("nan")
    out, _, _ = token.attend(steps_on(gpu))
    assert out[:2].isfinite().all()
    assert out[2:].isnan().all()


@pytest.mark.parametrize(
    "change", [{"width": 12}, {"width": 520}, {"width": 0}, {"rotary": 7}, {"rotary": 72}, {"kv_heads": 3}], ids=str
)
def test_attention_out_of_bounds_is_refused(quick_gpu: FakeMps, change: dict[str, int]) -> None:
    token = Token(Sizes(4, 2, 64, 64), 1)
    with pytest.raises(ValueError, match="no kernel for"):
        steps_on(quick_gpu).attention(replace(token.shape, **change), token.query, token.key, token.value, token.query)


def test_a_cache_that_kernels_would_misread_is_refused(quick_gpu: FakeMps) -> None:
    token = Token(Sizes(4, 2, 64, 64), 2)
    step = steps_on(quick_gpu).attention(token.shape, token.query, token.key, token.value, token.query)
    with pytest.raises(ValueError, match="no room for a token at 5 in a cache of 5"):
        step.given(token.keys, token.values, 5, token.cosine, token.sine)
    shifted = torch.zeros(token.keys.numel() + 1)[1:].view(token.keys.shape)
    for wrong in (token.keys[:, ::2], token.keys.double(), shifted):
        with pytest.raises(ValueError, match="not float32, in order and aligned"):
            step.given(token.keys, wrong, 1, token.cosine, token.sine)


@pytest.mark.skipif(isinstance(compute.library(), str), reason="no native kernels")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_processor_has_the_same_attention(quick_gpu: FakeMps, sizes: Sizes) -> None:
    token = Token(sizes, 100)
    native = NativeSteps(NativeKernels(1))
    for mine, theirs in zip(token.attend(steps_on(quick_gpu)), token.attend(native), strict=True):
        assert_close(mine.nan_to_num(), theirs.nan_to_num().double(), 2 * TOLERANCE * sizes.sharp)


CHECKS = {
    "attend": lambda gpu: [check(gpu, sizes, tokens) for sizes in SIZES for tokens in (1, 65, 67, 200)],
    "attend, long": check_long,
}
