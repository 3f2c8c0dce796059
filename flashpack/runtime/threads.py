"""Keeping results independent of the number of threads.

torch cuts an elementwise operation into one piece per thread, and the last values of a piece may go through another
implementation of exp than the others; sums may be cut, too. So the model's own operations run on one thread, and
only what flashpack cuts itself, by shape, runs on all of them: its kernels, and large attentions, head by head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flashpack.kernels.cpu.pool import Pool, pool

SPLIT_PRODUCTS = 2**22
"""Attention of fewer products than this is one piece: splitting it costs more than it gains."""

_pool: Pool | None = None  # of flashpack's model whose forward runs now


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention: query [batch, heads, tokens, width], key and value [batch, KV heads, context, width]
    -> [batch, tokens, heads, width]. A piece is one KV head with the query heads that share it."""
    heads, shared = query.shape[1], key.shape[1]
    group = heads // shared
    products = query.numel() * key.shape[2]
    # Dropout draws random numbers; a mask or bias by head, or a paged cache, would have to be cut, too.
    whole = (
        products < SPLIT_PRODUCTS
        or kwargs.get("dropout")
        or kwargs.get("position_bias") is not None
        or kwargs.get("cache") is not None
        or (attention_mask is not None and (attention_mask.ndim != 4 or attention_mask.shape[1] != 1))
        or value.shape[1] != shared
        or group != getattr(module, "num_key_value_groups", 1)
    )
    if whole or _pool is None:
        output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return output
    out = query.new_empty(query.shape[0], query.shape[2], heads, value.shape[3])

    def head(i: int) -> None:
        own = slice(i * group, (i + 1) * group)
        part, _ = sdpa_attention_forward(
            module, query[:, own], key[:, i : i + 1], value[:, i : i + 1], attention_mask, **kwargs
        )
        out[:, :, own] = part

    _pool.run(head, range(shared))
    return out, None


def confine(model: PreTrainedModel, threads: int) -> None:
    """Run the operations of ``model`` on one thread, attention on ``threads``; torch's count is restored after."""
    # Under the library's own name: some families do for "sdpa" what they do for no other. Nothing changes for models
    # that are not flashpack's.
    AttentionInterface.register("sdpa", _attention)
    outside: list[tuple[int, Pool | None]] = []

    def enter(module: nn.Module, args: Any) -> None:
        global _pool
        outside.append((torch.get_num_threads(), _pool))
        _pool = pool(threads)
        torch.set_num_threads(1)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        global _pool
        count, _pool = outside.pop()
        torch.set_num_threads(count)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)
