"""How large the KV cache (and recurrent state) of a context is, measured on the meta device: no formula per family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin


@dataclass(frozen=True)
class CacheSize:
    """Of the cache that a model makes for itself: its class, and bytes for the first token and for each of the others.

    Sliding windows are counted as if they grew for ever: never too little.
    """

    kind: type[Cache]
    first: int
    more: int

    def bytes(self, tokens: int) -> int:
        """After at least one token."""
        return self.first + self.more * (tokens - 1)


def cache_size(model: PreTrainedModel) -> CacheSize:
    """``model`` has its parameters on the meta device.

    The cache of one and of two tokens gives what is constant and what grows. Of layers that are alike only the first is
    computed, if the model can be computed so.
    """
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    found = getattr(decoder, "layers", None)
    layers = list(found) if isinstance(found, nn.ModuleList) else []
    like = _likes(layers, model.config.get_text_config(decoder=True))
    if len(set(like)) < len(layers):
        try:
            with _computed_once(layers, like):
                caches = [cache_of(model, tokens) for tokens in (1, 2)]
        except Exception:  # a family whose layers have more to do with each other: all of them, then
            caches = []
        if caches and all(_is_by_layer(cache, len(layers)) for cache in caches):
            return _size(caches, lambda cache: sum(_bytes(cache.layers[i]) for i in like))
    return _size([cache_of(model, tokens) for tokens in (1, 2)], _bytes)


@torch.no_grad()
def cache_of(model: PreTrainedModel, tokens: int) -> Any:
    """The cache that ``model``, which is on the meta device, makes for itself for so many tokens."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    settings: Any = _config
    with settings.patch(meta_nonzero_assume_all_nonzero=True):  # sparse attention that looks for what it may see
        return model(input_ids=ids, use_cache=True).past_key_values


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


def _size(caches: Sequence[Any], measure: Callable[[Any], int]) -> CacheSize:
    one, two = map(measure, caches)
    return CacheSize(type(caches[0]), one, two - one)


def _bytes(cache: object) -> int:
    return sum(t.nbytes for t in tensors(cache))


def _is_by_layer(cache: Any, layers: int) -> bool:
    """Whether all that is kept belongs to one of the model's layers each, in their order."""
    return len(getattr(cache, "layers", ())) == layers and _bytes(cache) == _bytes(cache.layers)


def _likes(layers: Sequence[nn.Module], config: object) -> list[int]:
    """For each layer the first that is like it: with the same parts of the same shapes, and the same settings."""
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    first: dict[Any, int] = {}
    return [first.setdefault((str(types[i : i + 1]), _looks(layer, i)), i) for i, layer in enumerate(layers)]


def _looks(layer: nn.Module, index: int) -> Any:
    parts = []
    for name, module in layer.named_modules():
        held = [*module._parameters.items(), *module._buffers.items()]
        shapes = [(n, tuple(t.shape), t.dtype) for n, t in held if t is not None]
        plain = [(n, v) for n, v in vars(module).items() if isinstance(v, (bool, int, float, str, list, tuple))]
        settings = sorted((n, repr(v)) for n, v in plain if (n, v) != ("layer_idx", index))
        parts.append((name, type(module), tuple(shapes), tuple(settings)))
    return tuple(parts)


@contextmanager
def _computed_once(layers: Sequence[nn.Module], like: Sequence[int]) -> Iterator[None]:
    """Have a layer answer what the first that is like it has answered; that one has been called before it."""
    answers: dict[int, Any] = {}

    def noted(i: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            answers[i] = forward(*arguments, **named)
            return answers[i]

        return call

    forwards = [layer.__dict__.get("forward") for layer in layers]
    try:
        for i, (layer, first) in enumerate(zip(layers, like, strict=True)):
            layer.forward = noted(i, layer.forward) if first == i else lambda *_, _first=first, **__: answers[_first]
        yield
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
