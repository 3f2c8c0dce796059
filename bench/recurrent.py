"""A token's step of a gated delta layer of Qwen3-Next's sizes, the library's and the native one, without projections.

    python bench/recurrent.py

Processor time of one thread, in turns, over the states of as many layers as the model has: they come from memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

KEY_HEADS, VALUE_HEADS, WIDTH, TAPS, LAYERS = 16, 32, 128, 4, 36
KEYS, VALUES = KEY_HEADS * WIDTH, VALUE_HEADS * WIDTH
TURNS = 15

Step = Callable[[], torch.Tensor]


class Layer:
    """Weights, states and a token's inputs, drawn at random."""

    def __init__(self) -> None:
        channels = 2 * KEYS + VALUES
        self.filter, self.window = torch.randn(channels, TAPS), torch.randn(channels, TAPS)
        self.state = torch.randn(VALUE_HEADS, WIDTH, WIDTH) / 10
        self.rate, self.rate_bias, self.norm = -torch.rand(VALUE_HEADS), torch.randn(VALUE_HEADS), torch.ones(WIDTH)
        self.mixed, self.gates = torch.randn(channels), torch.randn(VALUES)
        self.betas, self.alphas = torch.randn(VALUE_HEADS), torch.randn(VALUE_HEADS)

    def native(self) -> Step:
        from flashpack.kernels.cpu.compiled import NativeKernels
        from flashpack.kernels.cpu.steps import NativeSteps
        from flashpack.kernels.interface import DeltaShape

        window, state, out = self.window.clone(), self.state.clone(), torch.empty(VALUES)
        weights = (self.filter, None, self.rate, self.rate_bias, self.norm)
        group = VALUE_HEADS // KEY_HEADS
        sizes = (KEY_HEADS, VALUE_HEADS, WIDTH, WIDTH, TAPS, WIDTH, group * WIDTH, group)
        inputs = (*self.mixed.split([KEYS, KEYS, VALUES]), self.gates, self.betas, self.alphas)
        step = NativeSteps(NativeKernels(1)).delta(DeltaShape(*weights, *sizes, 1e-6), inputs, out)

        def run() -> torch.Tensor:
            step.given(window, state)
            step()
            return out

        return run

    def library(self) -> Step:
        from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

        modeling: Any = qwen3_next
        window, state = self.window.clone()[None], self.state.clone()[None]
        norm = modeling.Qwen3NextRMSNormGated(WIDTH, 1e-6)

        def run() -> torch.Tensor:
            mixed = modeling.causal_conv1d_update(self.mixed[None, :, None], window, self.filter, None, "silu")
            query, key, value = (
                x.reshape(1, 1, -1, WIDTH) for x in mixed.transpose(1, 2).split([KEYS, KEYS, VALUES], -1)
            )
            fade = self.rate * F.softplus(self.alphas[None, None] + self.rate_bias)
            out, last = modeling.torch_recurrent_gated_delta_rule(
                query, key, value, g=fade, beta=self.betas[None, None].sigmoid(), initial_state=state,
                output_final_state=True, use_qk_l2norm_in_kernel=True,
            )  # fmt: skip
            state.copy_(last)
            result: torch.Tensor = norm(out.reshape(-1, WIDTH), self.gates.view(-1, WIDTH)).reshape(-1)
            return result

        return run


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    layers = [Layer() for _ in range(LAYERS)]
    ways = {"library": [x.library() for x in layers], "native": [x.native() for x in layers]}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(TURNS):
            results = {}
            for name, steps in ways.items():
                begun = time.thread_time()
                results[name] = [step() for step in steps]
                spent[name].append((time.thread_time() - begun) / LAYERS)
            worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results.values(), strict=True))
            assert worst < 1e-5, f"results differ by {worst:.1e}"
    for name, seconds in spent.items():
        low, high = min(seconds), max(seconds)
        print(f"{name}: {1e6 * statistics.median(seconds):.0f} us a layer ({1e6 * low:.0f} to {1e6 * high:.0f})")


if __name__ == "__main__":
    main()
