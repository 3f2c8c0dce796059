"""The gated delta rule (linear attention with a state instead of keys and values) as steps of the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import LinearAttentionLayer

from flashpack.kernels.interface import MOST_WIDTH, DeltaShape, Step
from flashpack.runtime.dense import PackedLinear
from flashpack.runtime.lean.board import PROBES, Board, NotLean, Token, norm_of, products

_APART = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
"""Projections to the queries, keys and values of all heads; to gates; to betas; to alphas."""

_BY_HEAD = ("in_proj_qkvz", "in_proj_ba")
"""Projections to each key head's query, key, and values and gates of its value heads; to their betas and alphas."""


class DeltaRule:
    """Projections, a short causal convolution, a state that fades and is corrected, and a gated norm.

    The last inputs of the convolution and the state are those of the library's cache, changed in place.
    """

    def __init__(self, board: Board, module: nn.Module) -> None:
        part: Any = module
        name, parts = type(module).__name__, dict(part.named_children())
        names = next((n for n in (_APART, _BY_HEAD) if parts.keys() == {*n, "conv1d", "norm", "out_proj"}), ())
        linear = [parts[n] for n in (*names, "out_proj") if isinstance(parts.get(n), PackedLinear)]
        numbers = {n for n, _ in part.named_parameters(recurse=False)}
        if not names or len(linear) != len(names) + 1 or numbers != {"A_log", "dt_bias"}:
            raise NotLean(f"{name} has other parts than projections, a convolution, rates and a norm")
        key_heads, value_heads, key_width, value_width = (
            part.num_k_heads, part.num_v_heads, part.head_k_dim, part.head_v_dim,
        )  # fmt: skip
        if value_heads % key_heads or key_width % 8 or value_width % 8 or max(key_width, value_width) > MOST_WIDTH:
            raise NotLean(f"{name} has {value_heads} heads of {value_width} for {key_heads} of {key_width}")
        keys, values = key_heads * key_width, value_heads * value_width
        channels = 2 * keys + values
        filters, bias = part.conv1d.weight.detach(), part.conv1d.bias
        taps = filters.shape[-1]
        shapes = filters.shape, part.A_log.shape, part.dt_bias.shape
        if shapes != ((channels, 1, taps), (value_heads,), (value_heads,)) or part.activation not in ("silu", "swish"):
            raise NotLean(f"{name} convolves other channels than {channels}, or uses another function than silu")
        gate = torch.randn(PROBES, value_width, generator=torch.Generator().manual_seed(1)).to(board.x.device)
        norm, epsilon = norm_of(part.norm, value_width, gate)

        group = value_heads // key_heads
        own = group * value_width
        if names == _APART:
            arrays = [
                board.array(n, s) for n, s in zip(names, (channels, values, value_heads, value_heads), strict=True)
            ]
            starts = [*(arrays[0][cut:] for cut in (0, keys, 2 * keys)), *arrays[1:]]
            strides = key_width, own, group
        else:
            stride = 2 * key_width + 2 * own
            arrays = [board.array(n, s) for n, s in zip(names, (key_heads * stride, 2 * value_heads), strict=True)]
            starts = [arrays[0][cut:] for cut in (0, key_width, 2 * key_width, 2 * key_width + own)]
            starts += [arrays[1], arrays[1][group:]]
            strides = stride, stride, 2 * group
        rates = -part.A_log.float().exp(), part.dt_bias.float()
        filter_bias = None if bias is None else bias.float().contiguous()
        weights, rate, rate_bias, norm = (w.float().contiguous() for w in (filters, *rates, norm))
        shape = DeltaShape(
            weights,
            filter_bias,
            rate,
            rate_bias,
            norm,
            key_heads,
            value_heads,
            key_width,
            value_width,
            taps,
            *strides,
            epsilon,
        )
        self._layer = part.layer_idx
        self._shapes = (1, channels, taps), (1, value_heads, key_width, value_width)
        result = board.array("delta", values)
        inputs = products(board, board.normed, linear[:-1], arrays)
        self._update = board.steps.delta(shape, starts, result)
        self.steps: list[Step] = [inputs, self._update, products(board, result, linear[-1:], [board.y])]

    def takes(self, layer: Any) -> bool:
        """Whether a cache's layer is of the kind that the steps can go on with."""
        if type(layer) is not LinearAttentionLayer or layer.record_past or not layer.has_previous_state[0]:
            return False
        states = layer.conv_states[0], layer.recurrent_states[0]
        return all(_fits(state, shape) for state, shape in zip(states, self._shapes, strict=True))

    def begin(self, token: Token) -> None:
        """Before the steps of a token."""
        layer = token.cache.layers[self._layer]
        self._update.given(layer.conv_states[0], layer.recurrent_states[0])


def _fits(state: Tensor | None, shape: tuple[int, ...]) -> bool:
    return state is not None and state.shape == shape and state.dtype == torch.float32 and state.is_contiguous()
