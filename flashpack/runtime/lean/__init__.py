"""Decoding one token at a time without the library's overhead, where a model's parts are known.

``install`` replaces a model's ``forward`` by one that takes single tokens of one sequence through steps of the kernels
and leaves everything else to the library. Layers with a part that is not known stay the library's own. Then some tokens
are taken both ways, and if their logits differ, the whole model stays the library's. The library's way is the oracle.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from flashpack.errors import UsageError
from flashpack.kernels import Kernels
from flashpack.runtime.lean.blocks import Experts
from flashpack.runtime.lean.board import Board, NotLean, Token, library_calls, norm_of
from flashpack.runtime.lean.cache import RoomyLayer
from flashpack.runtime.lean.fused import FusedToken
from flashpack.runtime.lean.layers import LeanLayer, PlainLayer
from flashpack.runtime.lean.prefer import Preference
from flashpack.skeleton import ExpertsModule

TOLERANCE = 1e-3
"""Largest difference of the logits, relative to the largest."""

_PROBES = 3
"""Tokens that are taken both ways."""


class LeanDecoder:
    """A model's layers, ``lean_layers`` of them as steps; ``NotLean`` if the model is built in another way.

    ``fused``: computes all layers at once where it can. None: they are called one by one, as they must be where a
    part of one has been replaced.
    """

    def __init__(self, model: PreTrainedModel, kernels: Kernels, context: int) -> None:
        steps = kernels.steps()
        if steps is None:
            raise NotLean("the kernels have no steps")
        if model.dtype != torch.float32:
            raise NotLean("activations are not float32")
        self._model: Any = model
        self._decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
        self._context = context
        self._head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        parts = ("layers", "norm", "rotary_emb", "embed_tokens")
        if not all(hasattr(self._decoder, part) for part in parts):
            raise NotLean(f"{type(self._decoder).__name__} has not all of {', '.join(parts)}")
        hidden = self._model.config.get_text_config(decoder=True).hidden_size
        with library_calls("rotary positions"):
            nowhere = torch.zeros(1, 1, dtype=torch.long, device=kernels.device)
            cosine, _ = self._decoder.rotary_emb(torch.zeros(1, 1, hidden, device=kernels.device), nowhere)
        self.board = Board(steps, hidden, cosine.shape[-1])
        self.layers: list[LeanLayer | PlainLayer] = []
        for layer in self._decoder.layers:
            try:
                with library_calls(type(layer).__name__):
                    self.layers.append(LeanLayer(self.board, layer))
            except NotLean:
                self.layers.append(PlainLayer(self.board, layer))
        for layer, later in itertools.pairwise(self.layers):
            if isinstance(layer, LeanLayer) and isinstance(later, LeanLayer):
                layer.expects(later)
        self.fused: FusedToken | None = None
        self._norm = self.board.steps.add_norm(
            self.board.x, self.board.y, *norm_of(self._decoder.norm, hidden), self.board.normed
        )

    def fuse(self) -> None:
        """Set ``fused``; ``NotLean`` where it cannot be had."""
        embedding, store = self._decoder.embed_tokens, self.experts[0].store
        self.fused = FusedToken(self.board, self.layers, store, embedding, self._norm, self._head)

    @property
    def lean_layers(self) -> int:
        return sum(isinstance(layer, LeanLayer) for layer in self.layers)

    @property
    def experts(self) -> list[Experts]:
        """The blocks of routed experts that are steps."""
        return [x.block for x in self.layers if isinstance(x, LeanLayer) and isinstance(x.block, Experts)]

    def takes(self, cache: object) -> bool:
        """Whether a cache is of the kind that the steps can go on with."""
        if type(cache) is not DynamicCache or len(cache.layers) != len(self.layers) or not cache.get_seq_length():
            return False
        pairs = zip(self.layers, cache.layers, strict=True)
        return all(layer.mixer.takes(kept) for layer, kept in pairs if isinstance(layer, LeanLayer))

    def logits(self, ids: Tensor, cache: Any) -> Tensor:
        """ids [1, 1], after what ``cache`` holds -> [1, 1, vocabulary]."""
        token = self._token(ids, cache)
        found = None if self.fused is None else self.fused(token)
        if found is not None:
            return found.view(1, 1, -1)
        self.board.x.copy_(self._decoder.embed_tokens(ids).view(-1))
        self.board.y.zero_()
        for layer in self.layers:
            layer(token)
        self._norm()
        logits: Tensor = self._head(self.board.normed.view(1, 1, -1))
        return logits

    def _token(self, ids: Tensor, cache: Any) -> Token:
        position = cache.get_seq_length()
        for i, layer in enumerate(self.layers):
            if isinstance(layer, LeanLayer) and type(cache.layers[i]) is DynamicLayer:
                cache.layers[i] = RoomyLayer.of(cache.layers[i], self._context)
        positions = torch.tensor([[position]], device=self.board.x.device)
        cosine, sine = self._decoder.rotary_emb(self.board.x.view(1, 1, -1), positions)
        plain = {
            "attention_mask": None,
            "position_ids": positions,
            "use_cache": True,
            "position_embeddings": (cosine, sine),
        }
        return Token(ids, position, cosine.reshape(-1).contiguous(), sine.reshape(-1).contiguous(), cache, plain)


def install(
    model: PreTrainedModel, kernels: Kernels, sites: list[ExpertsModule], context: int, prefer: float | None = None
) -> tuple[str, LeanDecoder | None]:
    """Make single tokens of ``model`` go through steps where that gives the same; returns what was done in a line, and
    what decodes if it is not the library.

    ``prefer``: the ratio of a ``Preference`` in all layers with experts; ``UsageError`` where one of them is no step.
    """
    try:
        with torch.inference_mode(False), torch.no_grad():  # arrays of use in both modes
            decoder = LeanDecoder(model, kernels, context)
            if not decoder.lean_layers:
                raise NotLean("no layer is made of known parts")
            with library_calls(type(model).__name__):
                _match(model, decoder, sites)
        if prefer is not None and len(decoder.experts) < len(sites):
            raise NotLean(f"experts of {len(decoder.experts)} of {len(sites)} layers are steps")
    except NotLean as e:
        if prefer is not None:
            raise UsageError(f"--prefer-cached: {type(model).__name__} is decoded by the library: {e}") from e
        return f"the library's: {e}", None
    if prefer is not None:
        for block in decoder.experts:
            block.prefer = Preference(block, prefer)
    elif decoder.experts:
        with contextlib.suppress(NotLean):
            decoder.fuse()
    whole: Any = model
    library_forward = whole.forward

    def forward(
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        single = input_ids is not None and input_ids.shape == (1, 1) and not torch.is_grad_enabled()
        usual = single and all(v is None or v is False for k, v in others.items() if k != "cache_position")
        if (
            not usual
            or use_cache is False
            or return_dict is False
            or not decoder.takes(past_key_values)
            or (attention_mask is not None and (attention_mask.ndim != 2 or not bool(attention_mask.all())))
            or (position_ids is not None and position_ids.tolist() != [[past_key_values.get_seq_length()]])
        ):
            return library_forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep,
                return_dict=return_dict, **others,
            )  # fmt: skip
        assert input_ids is not None
        return CausalLMOutputWithPast(
            logits=decoder.logits(input_ids, past_key_values), past_key_values=past_key_values
        )

    whole.forward = forward
    return f"lean: {decoder.lean_layers} of {len(decoder.layers)} layers", decoder


def _match(model: PreTrainedModel, decoder: LeanDecoder, sites: list[ExpertsModule]) -> None:
    """Take tokens both ways, with stand-ins for the experts, which are the same both ways; ``NotLean`` if they differ.

    No expert is read.
    """
    whole: Any = model
    vocabulary = whole.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (1, 1 + _PROBES), generator=torch.Generator().manual_seed(2)).to(
        decoder.board.x.device
    )
    modules: list[Any] = [site.module for site in sites]
    real = [module.flashpack for module in modules]
    try:
        for module, site in zip(modules, sites, strict=True):
            module.flashpack = _StandIn(site.num_experts)
        for block in decoder.experts:
            block.routed = _stand_in(block, decoder.board)
        prompt = whole(ids[:, :1], use_cache=True).past_key_values
        caches = [prompt, copy.deepcopy(prompt)]
        if not decoder.takes(caches[0]):
            raise NotLean(f"{type(whole).__name__} has a cache of another kind")
        for i in range(1, 1 + _PROBES):
            expected = whole(ids[:, i : i + 1], past_key_values=caches[1], use_cache=True).logits
            found = decoder.logits(ids[:, i : i + 1], caches[0])
            worst = float((found - expected).abs().max() / expected.abs().max())
            if not worst <= TOLERANCE:
                raise NotLean(f"its logits differ by {worst:.1e} from the library's")
    finally:
        for module, routed in zip(modules, real, strict=True):
            module.flashpack = routed
        for block in decoder.experts:
            del block.routed
            block.routed = block._routed


class _StandIn:
    """In place of routed experts: x times a number of each chosen expert."""

    def __init__(self, experts: int) -> None:
        self.numbers = torch.linspace(-1, 1, experts)

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return x * (self.numbers.to(x.device)[index] * weights.float()).sum(-1, keepdim=True)


def _stand_in(block: Experts, board: Board) -> Any:
    def routed() -> None:
        numbers = _StandIn(block.experts_count).numbers.to(board.x.device)[block.router.chosen.long()]
        if block.beside:
            block.compute(block.beside, 0)
        block.outputs[len(block.beside) :] = board.normed * numbers.unsqueeze(1)
        board.steps.read(block.router.chosen)
        board.steps.write(block.places, range(len(block.beside), len(block.outputs)))
        block.combine()

    return routed
