"""One layer of Qwen3.5-397B with random weights of 4 bits, as decoding computes it with all experts in memory: to count
launches, and to time what a run adds reads to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashpack.formats.records import Encoding, Projection, RecordKind
from flashpack.kernels.activations import named
from flashpack.kernels.interface import AttentionShape, DeltaShape, Kernels, RecordView, Step
from flashpack.kernels.metal.cases.samples import Samples, in_arena, together

STORED, RAW = Encoding("affine", "BF16", 4, 64), Encoding("raw", "BF16")
EPSILON = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Widths, and numbers of heads, of a layer; ``top_k`` of ``experts`` and one beside them for a token."""

    hidden: int
    inner: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    width: int
    key_heads: int
    value_heads: int
    delta_width: int
    position: int


LARGE = Sizes(4096, 1024, 512, 10, 32, 2, 256, 16, 64, 128, 1000)
"""Those of Qwen3.5-397B."""

SMALL = Sizes(128, 64, 16, 10, 4, 2, 32, 2, 4, 32, 5)
"""The same parts for an emulator."""


class Layer:
    """``kind``: "attention" or "recurrent". A call computes a token; ``nbytes``: of the weights that it needs."""

    def __init__(self, kernels: Kernels, kind: str, sizes: Sizes) -> None:
        steps = kernels.steps()
        assert steps is not None
        self._steps, self._kernels, self._sizes = steps, kernels, sizes
        self._samples = Samples(0)
        self.nbytes = 0
        hidden = sizes.hidden
        self._x, norm = (self._samples.normal(hidden).to(kernels.device) for _ in range(2))
        self._y, self._normed = self._array(hidden), self._array(hidden)
        first, second = (steps.add_norm(self._x, self._y, norm, EPSILON, self._normed) for _ in range(2))
        mixer = self._attention() if kind == "attention" else self._recurrent()
        self._first = steps.sequence([first, *mixer, second, *self._router()])
        self._experts = self._block()

    def __call__(self) -> None:
        self._first()
        self._steps.read(self._chosen)
        self._experts()

    def _array(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self._kernels.device)

    def _products(self, x: Tensor, out: Sequence[Tensor], small: int = 0) -> Step:
        """``small``: so many matrices, the last ones, are not quantized."""
        encodings = [STORED] * (len(out) - small) + [RAW] * small
        matrices = [self._samples.matrix(e, len(y), len(x)) for e, y in zip(encodings, out, strict=True)]
        self.nbytes += sum(int(e.bits_per_weight() / 8 * len(x) * len(y)) for e, y in zip(encodings, out, strict=True))
        on = together(self._kernels.device, matrices)
        step = self._steps.products(x, on, [None] * len(out), out)
        assert step is not None
        return step

    def _attention(self) -> list[Step]:
        s, samples, device = self._sizes, self._samples, self._kernels.device
        q, k, v = (self._array(n) for n in (2 * s.heads * s.width, s.kv_heads * s.width, s.kv_heads * s.width))
        out, norm, rotary = self._array(s.heads * s.width), samples.normal(s.width).to(device), s.width // 4
        shape = AttentionShape(
            norm, norm, s.heads, s.kv_heads, s.width, rotary, 2 * s.width, s.width, EPSILON, 1 / math.sqrt(s.width)
        )
        attend = self._steps.attention(shape, q, k, v, out)
        keys, values = (samples.normal(s.kv_heads, s.position + 1, s.width).to(device) for _ in range(2))
        angles = samples.normal(rotary).to(device)
        attend.given(keys, values, s.position, angles.cos(), angles.sin())
        self.nbytes += 2 * keys.nbytes
        return [self._products(self._normed, [q, k, v]), attend, self._products(out, [self._y])]

    def _recurrent(self) -> list[Step]:
        s, samples, device = self._sizes, self._samples, self._kernels.device
        keys, values, group = s.key_heads * s.delta_width, s.value_heads * s.delta_width, s.value_heads // s.key_heads
        channels, taps = 2 * keys + values, 4
        mixed, gates, betas, alphas = (self._array(n) for n in (channels, values, s.value_heads, s.value_heads))
        rate, bias, norm = (samples.normal(n).to(device) for n in (s.value_heads, s.value_heads, s.delta_width))
        shape = DeltaShape(
            samples.normal(channels, taps).to(device), None, -rate.exp(), bias, norm, s.key_heads, s.value_heads,
            s.delta_width, s.delta_width, taps, s.delta_width, group * s.delta_width, group, EPSILON,
        )  # fmt: skip
        out, starts = self._array(values), (mixed, mixed[keys:], mixed[2 * keys :], gates, betas, alphas)
        delta = self._steps.delta(shape, starts, out)
        state = self._array(s.value_heads, s.delta_width, s.delta_width)
        delta.given(self._array(channels, taps), state)
        self.nbytes += 2 * state.nbytes
        inputs = self._products(self._normed, [mixed, gates, betas, alphas], small=2)
        return [inputs, delta, self._products(out, [self._y])]

    def _router(self) -> list[Step]:
        s, device = self._sizes, self._kernels.device
        logits, self._weights = self._array(s.experts), self._array(s.top_k + 1)
        self._chosen = torch.zeros(s.top_k, dtype=torch.int32, device=device)
        route = self._steps.route(
            logits, None, s.top_k, "softmax-top", True, 1.0, self._chosen, self._weights[: s.top_k]
        )
        return [self._products(self._normed, [logits], small=1), route]

    def _block(self) -> Callable[[], None]:
        s, steps, device = self._sizes, self._steps, self._kernels.device
        first = [Projection(name, (s.inner, s.hidden), STORED) for name in ("gate", "up")]
        kind = RecordKind((*first, Projection("down", (s.hidden, s.inner), STORED)))
        record = self._samples.record(kind)
        # The network beside the experts is of the dense part, which has other memory.
        records = in_arena(self._kernels, kind, [record] * s.top_k) + in_arena(self._kernels, kind, [record])
        self.nbytes += kind.nbytes * len(records)
        switch, only = self._array(1), torch.zeros(1, dtype=torch.int32, device=device)
        weigh = steps.sequence(
            [
                self._products(self._normed, [switch], small=1),
                steps.route(switch, None, 1, "sigmoid-top", False, 1.0, only, self._weights[s.top_k :]),
            ]
        )
        activation = named("silu", True)
        at_once = steps.experts_combined(self._normed, activation, self._weights, self._y)
        outputs, places = self._array(len(records), s.hidden), torch.arange(len(records)).int().to(device)
        compute = steps.experts(self._normed, activation, outputs)
        combine = steps.combine(outputs, places, self._weights, self._y)

        def experts(records: Sequence[RecordView] = records) -> None:
            weigh()
            if at_once is not None:
                at_once(records)
            else:
                compute(records, 0)
                combine()

        return experts
