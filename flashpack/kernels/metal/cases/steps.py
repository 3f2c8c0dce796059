"""The other steps of decoding, against a few lines of torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from flashpack.formats.records import Encoding
from flashpack.kernels.interface import MODES, AttentionShape, DeltaShape, Kernels
from flashpack.kernels.metal.cases.case import PRODUCT, REFERENCE, Case, Pairs, steps_of
from flashpack.kernels.metal.cases.samples import Samples, together

ATTENTION = 1e-5
"""Largest error: a softmax's exponentials are summed with their products, in another order."""

RECURRENT = 3e-5
"""Two sums over a head's state, exponentials and a norm."""

WEIGHTS = 1e-5
"""Of a router: quotients of exponentials."""

EPSILON = 1e-6


@dataclass(frozen=True)
class Products:
    """One token times several matrices of different kinds, with and without bias."""

    name = "step: products"
    tolerance: ClassVar = PRODUCT
    alone: ClassVar = True

    def run(self, kernels: Kernels) -> Pairs:
        samples = Samples(1)
        encodings = Encoding("affine", "BF16", 8, 64), Encoding("affine", "F16", 4, 32), Encoding("raw", "BF16")
        matrices = [samples.matrix(e, rows, 192) for e, rows in zip(encodings, (96, 70, 1), strict=True)]
        x, biases = samples.normal(192), [None, samples.normal(70), samples.normal(1)]
        out = [torch.zeros(m.shape[0], device=kernels.device) for m in matrices]
        on = together(kernels.device, matrices)
        step = steps_of(kernels).products(x.to(kernels.device), on, [_maybe(kernels, b) for b in biases], out)
        assert step is not None, "the kernels do not know a matrix"
        step()
        pairs = zip(out, matrices, biases, strict=True)
        return [(found.cpu(), REFERENCE.linear(x, m) + (0 if b is None else b)) for found, m, b in pairs]


@dataclass(frozen=True)
class Norm:
    """A sum and its norm. ``plain``: without the second term and without a weight."""

    width: int
    plain: bool
    tolerance: ClassVar = PRODUCT
    alone: ClassVar = True

    @property
    def name(self) -> str:
        return f"step: norm of {self.width}{', plain' if self.plain else ''}"

    def run(self, kernels: Kernels) -> Pairs:
        samples = Samples(self.width)
        x, y, weight = (samples.normal(self.width) for _ in range(3))
        stream, out = _on(kernels, x), torch.zeros(self.width, device=kernels.device)
        y_on, weight_on = (_maybe(kernels, None if self.plain else t) for t in (y, weight))
        steps_of(kernels).add_norm(stream, y_on, weight_on, EPSILON, out)()
        total = x if self.plain else x + y
        expected = total * torch.rsqrt(total.square().mean() + EPSILON) * (1 if self.plain else weight)
        return [(out.cpu(), expected), (stream.cpu(), total)]


@dataclass(frozen=True)
class Attention:
    """A token behind ``position`` others, with norms and a gate or ``plain``."""

    heads: int
    kv_heads: int
    width: int
    position: int
    plain: bool = False
    tolerance: ClassVar = ATTENTION
    alone: ClassVar = True

    @property
    def name(self) -> str:
        kind = f"{self.heads} heads of {self.width} for {self.kv_heads}"
        return f"step: attention, {kind}, token {self.position}{', plain' if self.plain else ''}"

    def run(self, kernels: Kernels) -> Pairs:
        samples, plain, width = Samples(self.position), self.plain, self.width
        rotary = width // 2 // 2 * 2
        stride = width if plain else 2 * width
        shape = AttentionShape(
            None if plain else samples.normal(width), None if plain else samples.normal(width), self.heads,
            self.kv_heads, width, rotary, stride, 0 if plain else width, EPSILON, 1 / math.sqrt(width),
        )  # fmt: skip
        query, key, value = (samples.normal(n) for n in (self.heads * stride, *[self.kv_heads * width] * 2))
        keys, values = (samples.normal(self.kv_heads, self.position + 3, width) for _ in range(2))
        angles = samples.normal(rotary // 2).repeat(2)
        cosine, sine = angles.cos(), angles.sin()
        device = kernels.device
        cache = _on(kernels, keys), _on(kernels, values)
        out = torch.zeros(self.heads * width, device=device)
        query_norm, key_norm = _maybe(kernels, shape.query_norm), _maybe(kernels, shape.key_norm)
        on = replace(shape, query_norm=query_norm, key_norm=key_norm)
        step = steps_of(kernels).attention(on, query.to(device), key.to(device), value.to(device), out)
        step.given(*cache, self.position, cosine.to(device), sine.to(device))
        step()
        expected = _attend(shape, query, key, value, (keys, values), self.position, (cosine, sine))
        return [(out.cpu(), expected), (cache[0].cpu(), keys), (cache[1].cpu(), values)]


def _attend(
    shape: AttentionShape, query: Tensor, key: Tensor, value: Tensor, cache: tuple[Tensor, Tensor], position: int,
    angles: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """The result [heads * width]; the token's key and value are written to the cache."""
    queries, half = query.view(shape.heads, shape.query_stride), shape.rotary // 2

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape.epsilon) * weight
        some = x[:, : shape.rotary]
        other = torch.cat([-some[:, half:], some[:, :half]], -1)
        return torch.cat([some * angles[0] + other * angles[1], x[:, shape.rotary :]], -1)

    cache[0][:, position] = turned(key.view(shape.kv_heads, -1), shape.key_norm)
    cache[1][:, position] = value.view(shape.kv_heads, -1)
    q = turned(queries[:, : shape.width], shape.query_norm).view(shape.kv_heads, -1, shape.width)
    scores = (q @ cache[0][:, : position + 1].transpose(1, 2) * shape.scale).softmax(-1)
    found = (scores @ cache[1][:, : position + 1]).view(shape.heads, -1)
    if shape.gate:
        found = found * queries[:, shape.gate : shape.gate + shape.width].sigmoid()
    return found.reshape(-1)


@dataclass(frozen=True)
class Delta:
    """Three tokens of the gated delta rule, one after the other: the result of the last, and what it leaves."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    taps: int
    tolerance: ClassVar = RECURRENT
    alone: ClassVar = True

    @property
    def name(self) -> str:
        sizes = f"{self.value_heads} heads of {self.value_width} for {self.key_heads} of {self.key_width}"
        return f"step: delta rule, {sizes}, {self.taps} taps"

    def run(self, kernels: Kernels) -> Pairs:
        samples, device = Samples(self.value_heads), kernels.device
        keys, values, group = (
            self.key_heads * self.key_width, self.value_heads * self.value_width, self.value_heads // self.key_heads,
        )  # fmt: skip
        channels = 2 * keys + values
        weights = (
            samples.normal(channels, self.taps), samples.normal(channels), -samples.normal(self.value_heads).exp() / 8,
            samples.normal(self.value_heads), samples.normal(self.value_width),
        )  # fmt: skip
        window, state = (
            samples.normal(channels, self.taps),
            samples.normal(self.value_heads, self.key_width, self.value_width),
        )
        sizes = (keys, keys, values, values, self.value_heads, self.value_heads)
        inputs = [torch.zeros(n, device=device) for n in sizes]
        out = torch.zeros(values, device=device)
        a, b, c, d, e = (w.to(device) for w in weights)
        shape = DeltaShape(
            a, b, c, d, e, self.key_heads, self.value_heads, self.key_width, self.value_width, self.taps,
            self.key_width, group * self.value_width, group, EPSILON,
        )  # fmt: skip
        step = steps_of(kernels).delta(shape, inputs, out)
        kept = _on(kernels, window), _on(kernels, state)
        for _ in range(3):
            token = [samples.normal(n) for n in sizes]
            for array, numbers in zip(inputs, token, strict=True):
                array.copy_(numbers)
            step.given(*kept)
            step()
            expected, window, state = _delta(self, weights, token, window, state)
        return [(out.cpu(), expected), (kept[0].cpu(), window), (kept[1].cpu(), state)]


def _delta(
    shape: Delta, weights: Sequence[Tensor], token: Sequence[Tensor], window: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the window and the state after a token."""
    filters, bias, rate, rate_bias, norm = weights
    query, key, value, gate, beta, alpha = token
    window = torch.cat([window[:, 1:], torch.cat([query, key, value]).unsqueeze(1)], 1)
    mixed = F.silu((window * filters).sum(1) + bias)
    query, key, value = torch.split(mixed, [len(query), len(key), len(value)])

    def unit(x: Tensor) -> Tensor:
        x = x.view(shape.key_heads, -1)
        x = x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-6)
        return x.repeat_interleave(shape.value_heads // shape.key_heads, 0).unsqueeze(-1)

    query, key = unit(query) / math.sqrt(shape.key_width), unit(key)
    state = state * (rate * F.softplus(alpha + rate_bias)).exp().view(-1, 1, 1)
    wrong = value.view(shape.value_heads, 1, -1) - (state * key).sum(1, keepdim=True)
    state = state + key * wrong * beta.sigmoid().view(-1, 1, 1)
    answer = (state * query).sum(1)
    answer = answer * torch.rsqrt(answer.square().mean(1, keepdim=True) + EPSILON) * norm
    return (answer * F.silu(gate.view(shape.value_heads, -1))).reshape(-1), window, state


@dataclass(frozen=True)
class Route:
    """A router's choice, in order of expert, and weights."""

    mode: str
    experts: int
    top_k: int
    divide: bool
    tolerance: ClassVar = WEIGHTS
    alone: ClassVar = True

    @property
    def name(self) -> str:
        return f"step: router, {self.top_k} of {self.experts}, {self.mode}{', divided' if self.divide else ''}"

    def run(self, kernels: Kernels) -> Pairs:
        samples, device = Samples(self.experts), kernels.device
        logits, bias = samples.normal(self.experts), None
        if self.mode == "sigmoid-top":
            bias = samples.normal(self.experts) / 4
        chosen = torch.zeros(self.top_k, dtype=torch.int32, device=device)
        weights = torch.zeros(self.top_k, device=device)
        on = logits.to(device), _maybe(kernels, bias)
        steps = steps_of(kernels)
        steps.route(*on, self.top_k, self.mode, self.divide, 2.5, chosen, weights)()
        order = torch.tensor(steps.read(chosen)).sort()
        shares = {"softmax-top": logits.softmax(0), "sigmoid-top": logits.sigmoid()}.get(self.mode, logits)
        best = (shares if bias is None else shares + bias).topk(self.top_k).indices.sort().values
        found = shares[best].softmax(0) if self.mode == "top-softmax" else shares[best]
        if self.divide:
            found = found / found.sum()
        return [(order.values, best), (weights.cpu()[order.indices], 2.5 * found)]


def _on(kernels: Kernels, x: Tensor) -> Tensor:
    """A copy on the device: steps write to what they are given."""
    return x.to(kernels.device, copy=True)


def _maybe(kernels: Kernels, x: Tensor | None) -> Tensor | None:
    return None if x is None else _on(kernels, x)


def step_cases() -> Iterator[Case]:
    yield Products()
    for width in (8, 192, 4096):
        yield Norm(width, False)
    yield Norm(264, True)
    for heads, kv_heads, width, position in (
        (1, 1, 8, 0), (4, 2, 64, 5), (6, 2, 128, 63), (8, 1, 256, 130), (16, 1, 64, 700), (8, 1, 512, 64),
    ):  # fmt: skip
        yield Attention(heads, kv_heads, width, position)
    yield Attention(4, 4, 64, 40, plain=True)
    for sizes in ((1, 1, 8, 8, 1), (2, 4, 64, 32, 4), (2, 6, 128, 128, 4), (1, 2, 8, 512, 3)):
        yield Delta(*sizes)
    for mode in MODES:
        for experts, top_k, divide in ((8, 2, False), (128, 8, True), (512, 10, mode != "softmax-top")):
            yield Route(mode, experts, top_k, divide)
