"""How large the KV cache (and recurrent state) of a context is, measured on the meta device: no formula per family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def kv_bytes(model: PreTrainedModel, context: int) -> int:
    """Bytes of the cache after ``context`` tokens; ``model`` has its parameters on the meta device.

    The cache of one and of two tokens gives what is constant and what grows. Sliding windows are counted as if
    they grew for ever: never too little.
    """
    one, two = (_cache_bytes(model, tokens) for tokens in (1, 2))
    return one + (two - one) * (context - 1)


@torch.no_grad()
def _cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    cache = model(input_ids=ids, use_cache=True).past_key_values
    return sum(t.nbytes for layer in cache.layers for t in _tensors(vars(layer)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []
