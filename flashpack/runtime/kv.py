"""How large the KV cache (and recurrent state) of a context is, measured on the meta device: no formula per family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin


def kv_bytes(model: PreTrainedModel, context: int) -> int:
    """Bytes of the cache after ``context`` tokens; ``model`` has its parameters on the meta device.

    The cache of one and of two tokens gives what is constant and what grows. Sliding windows are counted as if
    they grew for ever: never too little.
    """
    one, two = (_cache_bytes(model, tokens) for tokens in (1, 2))
    return one + (two - one) * (context - 1)


def cache_class(model: PreTrainedModel) -> type[Cache]:
    """The kind of cache that ``model``, which is on the meta device, makes for itself."""
    return type(_cache(model, 1))


def _cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    return sum(t.nbytes for t in tensors(_cache(model, tokens)))


@torch.no_grad()
def _cache(model: PreTrainedModel, tokens: int) -> Cache:
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    settings: Any = _config
    with settings.patch(meta_nonzero_assume_all_nonzero=True):  # sparse attention that looks for what it may see
        cache: Cache = model(input_ids=ids, use_cache=True).past_key_values
    return cache


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a cache, a layer of one, or lists and dicts of these."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    if isinstance(value, (Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin)):
        return tensors(vars(value))
    return []
