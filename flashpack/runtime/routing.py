"""Recording which experts a loaded model uses, token by token, and how the store was asked for them.

Whatever computes a layer's experts is asked, not the store: that gets the experts of a whole chunk of a prompt at once,
and does not know which token wanted which.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashpack.errors import ContextError, FormatError, UsageError
from flashpack.formats import Pack
from flashpack.formats.checksums import hexdigest
from flashpack.formats.routing import RecordedRun, Routing
from flashpack.runtime.budget import PROMPT_CHUNK
from flashpack.runtime.experts import RoutedExperts
from flashpack.runtime.predict import inference, text_of
from flashpack.skeleton import library_errors

if TYPE_CHECKING:
    from torch import Tensor

    from flashpack.runtime.lean.blocks import Experts
    from flashpack.runtime.load import Runtime


@dataclass
class _Layer:
    """Of each pass: experts and weights [tokens, top_k], as the router gave them."""

    experts: list[NDArray[np.int64]] = field(default_factory=list)
    weights: list[NDArray[np.float32]] = field(default_factory=list)


class RoutingRecorder:
    """Notes what ``model``, of ``load``, uses within ``watching``; ``routing`` puts it together.

    The caller says with ``took`` which tokens it has given to the model, one sequence at a time and in chunks of at
    most ``PROMPT_CHUNK``, as ``generate`` does.
    """

    def __init__(self, model: Any) -> None:
        runtime: Runtime = model.flashpack
        self._model, self._runtime = model, runtime
        self._layers = {layer.index: _Layer() for layer in runtime.pack.manifest.layers}
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._prompt: list[bool] = []
        self._before = runtime.store.stats.total()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts, what the experts are asked for is noted."""
        modules: list[Any] = [
            module for module in self._model.modules() if isinstance(getattr(module, "flashpack", None), RoutedExperts)
        ]
        own = [module.flashpack for module in modules]
        decoder = self._runtime.decoder
        blocks, fused = (decoder.experts, decoder.fused) if decoder else ([], None)
        try:
            if decoder:
                decoder.fused = None
            for module, routed in zip(modules, own, strict=True):
                module.flashpack = self._noting(routed)
            for block in blocks:
                block.routed = self._noting_step(block)
            yield
        finally:
            for module, routed in zip(modules, own, strict=True):
                module.flashpack = routed
            for block in blocks:
                block.routed = block._routed
            if decoder:
                decoder.fused = fused

    def took(self, tokens: Sequence[int], first: int, prompt: int) -> None:
        """``tokens`` have gone through the model, at the places of the context from ``first`` on; so many of them in
        chunks of a prompt."""
        self._tokens += tokens
        self._positions += range(first, first + len(tokens))
        self._prompt += [i < prompt for i in range(len(tokens))]

    def routing(self, about: dict[str, str]) -> Routing:
        """All that was noted. Raises ``FormatError`` if layers have not each seen the tokens that were announced."""
        pack, budget = self._runtime.pack, self._runtime.budget
        sizes = [len(found) for found in next(iter(self._layers.values())).experts]
        if any([len(x) for x in layer.experts] != sizes for layer in self._layers.values()) or sum(sizes) != len(
            self._tokens
        ):
            raise FormatError(f"{pack.folder}: its layers of experts do not all take every token")
        shapes = {x.shape[1] for layer in self._layers.values() for x in layer.experts}
        if len(shapes) != 1:
            raise FormatError(f"{pack.folder}: the number of experts per token is not the same in all layers")
        record_bytes = record_sizes(pack)
        counts = (record_bytes > 0).sum(1).tolist()
        found = [_sorted(layer, count) for layer, count in zip(self._layers.values(), counts, strict=True)]
        experts, weights = (np.stack(arrays, 1) for arrays in zip(*found, strict=True))
        kind = np.uint8 if max(counts) <= np.iinfo(np.uint8).max else np.uint16
        total = self._runtime.store.stats.total().less(self._before)
        return Routing(
            tuple(self._layers),
            record_bytes,
            np.array(self._tokens, np.int32),
            np.array(self._positions, np.int32),
            np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
            weights,
            np.where(experts < 0, np.iinfo(kind).max, experts).astype(kind),
            np.array(self._prompt, np.bool_),
            RecordedRun(dict(budget.slots), budget.total - budget.arena, total.hits, total.misses),
            {"pack": pack.identity, "architecture": pack.manifest.model["architecture"]} | about,
        )

    def _note(self, layer: int, experts: Tensor, weights: Tensor) -> None:
        if len(experts) > PROMPT_CHUNK:
            raise UsageError(f"{len(experts)} tokens at once cannot be recorded; give {PROMPT_CHUNK} at most")
        self._layers[layer].experts.append(experts.cpu().numpy().astype(np.int64))
        self._layers[layer].weights.append(weights.float().cpu().numpy().copy())

    def _noting(self, routed: RoutedExperts) -> Callable[..., Tensor]:
        def note(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            self._note(routed.layer, index, weights)
            return routed(x, index, weights)

        return note

    def _noting_step(self, block: Experts) -> Callable[[], None]:
        def note() -> None:
            chosen = np.array([block.router.read()])  # waits for the router's choice
            self._layers[block.layer].experts.append(chosen)
            self._layers[block.layer].weights.append(block.router.weights.float().cpu().numpy()[None].copy())
            block._routed()

        return note


def _sorted(layer: _Layer, count: int) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
    """A layer's experts and weights [tokens, top_k], the heaviest first; -1 and 0, at the end, for what is no expert
    (an index that is not below ``count``)."""
    experts, weights = np.concatenate(layer.experts), np.concatenate(layer.weights)
    absent = experts >= count
    experts = np.where(absent, -1, experts)
    weights = np.where(absent, 0, weights)
    order = np.lexsort((experts, -weights, absent), axis=1)
    return np.take_along_axis(experts, order, 1), np.take_along_axis(weights, order, 1).astype(np.float16)


def record_sizes(pack: Pack) -> NDArray[np.uint32]:
    """Bytes that each expert takes in the arena: [layers, experts], 0 behind the last expert of a layer."""
    layers = pack.manifest.layers
    sizes = np.zeros((len(layers), max(layer.experts for layer in layers)), np.uint32)
    for row, layer in enumerate(layers):
        with pack.open_shard(layer) as shard:
            sizes[row, : layer.experts] = [shard.kind(expert).stride for expert in range(layer.experts)]
    return sizes


def record(
    pack: Path,
    texts: Sequence[Path] = (),
    prompts: Sequence[str] = (),
    tokens: int = 2048,
    max_tokens: int = 512,
    raw: bool = False,
    begin: Callable[[int], object] | None = None,
    advance: Callable[[int], object] | None = None,
    **options: Any,
) -> Routing:
    """Run ``pack`` over ``texts`` and ``prompts`` and return what it used.

    The first ``tokens`` tokens of each text are taken one by one, as decoding takes them, in contexts of as many
    tokens as ``options`` (those of ``load``) give; each prompt is read in chunks and answered with at most
    ``max_tokens``, greedily, as ``run`` does. ``raw``: prompts are continued as they are. The run begins with no expert
    in memory and reads nothing ahead, so that its hits follow from what is recorded.

    ``begin`` is called with the most tokens that there may be, ``advance`` with tokens as they are done. Raises
    ``UsageError`` for an empty text, ``ContextError`` for a prompt that fills the context, and what ``load`` raises.
    """
    from flashpack.runtime.generate import generate
    from flashpack.runtime.load import load
    from flashpack.runtime.messages import encode_prompt
    from flashpack.runtime.tokenizer import encode, load_tokenizer

    begin, advance = begin or (lambda total: None), advance or (lambda count: None)
    tokenizer = load_tokenizer(Pack(pack).folder)
    contents = [text_of("--text", path) for path in texts]
    pieces = [encode(tokenizer, content, special=False)[:tokens] for content in contents]
    for path, ids in zip(texts, pieces, strict=True):
        if not ids:
            raise UsageError(f"--text {path}: the text is empty")
    asked = [encode_prompt(tokenizer, prompt, raw) for prompt in prompts]
    model: Any = load(pack, warm=False, prefetch=False, **options)
    context = model.flashpack.context
    for ids in asked:
        if not ids:
            raise UsageError("--prompt: a prompt has no tokens")
        if len(ids) >= context:
            raise ContextError(f"a prompt has {len(ids)} tokens, the context {context}; shorten it or raise --context")
    most = [min(len(ids) + max_tokens, context) for ids in asked]
    begin(sum(map(len, pieces)) + sum(most))
    recorder = RoutingRecorder(model)
    with recorder.watching(), inference(), library_errors("the model of this pack cannot be computed"):
        for ids in pieces:
            for first in range(0, len(ids), context):
                _decode(model, ids[first : first + context], advance)
                recorder.took(ids[first : first + context], 0, prompt=0)
        for ids, count in zip(asked, most, strict=True):
            answer = generate(model, tokenizer, ids, max_tokens)
            recorder.took([*ids, *answer.tokens[:-1]], 0, prompt=len(ids))  # the last one is not given to the model
            advance(count)
    digests = [hexdigest(content.encode()) for content in [*contents, *prompts]]
    return recorder.routing({"texts": json.dumps(digests)})


def _decode(model: Any, ids: list[int], advance: Callable[[int], object]) -> None:
    """Take the tokens of a context one by one."""
    import torch

    cache = None
    for token in ids:
        answer = model(input_ids=torch.tensor([[token]], device=model.device), past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        advance(1)
