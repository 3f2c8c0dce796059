"""Making a model use the experts of a recorded trace instead of those its router chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flashpack.formats.routing import read_routing
from flashpack.runtime.experts import RoutedExperts
from flashpack.runtime.lean.blocks import Experts, Guess

EVEN_TOKENS = 1024
"""Rows of even routing."""

RECALL = 0.8
"""Share of a token's experts that the router of a trained model names one layer early: what guesses are drawn with."""


class Trace:
    """Routing for every model of this process: that of the file ``path`` (``read_routing``, with weights), or "even",
    drawn at random.

    Guesses of the next layer's experts are the trace's too, right as often as ``RECALL``. ``position`` is the row
    of the next token; rows wrap around. To be made after the model: loading compares its two ways of decoding by its
    own router. Raises ``ValueError`` for a trace of another shape, or without weights.
    """

    def __init__(self, path: str, model: PreTrainedModel) -> None:
        whole: Any = model
        layers = whole.flashpack.pack.manifest.layers
        wanted = len(layers), whole.config.num_experts_per_tok
        if path == "even":
            draws = torch.rand(EVEN_TOKENS, len(layers), layers[0].experts, generator=torch.Generator().manual_seed(3))
            self._experts = draws.topk(wanted[1]).indices.int()
            self._weights = torch.full(self._experts.shape, 1 / wanted[1])
        else:
            routing = read_routing(path)
            if not routing.weights.any():
                raise ValueError(f"{path}: no weights of the experts")
            self._experts = torch.from_numpy(routing.experts.astype(np.int32))
            self._weights = torch.from_numpy(routing.weights.astype(np.float32))
        _, count, top_k = self._experts.shape
        if (count, top_k) != wanted or int(self._experts.max()) >= min(x.experts for x in layers):
            raise ValueError(f"{path}: {count} layers and {top_k} experts per token; the model has {wanted}")
        self._count = layers[0].experts
        self._row_of_layer = {layer.index: i for i, layer in enumerate(layers)}
        self.position = 0
        if whole.flashpack.decoder:
            whole.flashpack.decoder.fused = None
        self._install()

    def _rows(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Experts (int32) and weights [tokens, top_k] of the tokens from ``position`` on."""
        rows = torch.arange(self.position, self.position + tokens) % len(self._experts)
        place = self._row_of_layer[layer]
        return self._experts[rows, place], self._weights[rows, place]

    def _install(self) -> None:
        library_way = RoutedExperts.__call__

        def routed(routed: RoutedExperts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            chosen, shares = self._rows(routed.layer, len(x))
            return library_way(routed, x, chosen.to(index.dtype), shares.to(weights.dtype))

        def lean(block: Experts) -> None:
            chosen, shares = self._rows(block.layer, 1)
            block.router.chosen.copy_(chosen[0])
            block.router.weights.copy_(shares[0])
            block.routed()

        draws = torch.Generator().manual_seed(4)

        def guess(guess: Guess) -> list[int]:
            chosen, _ = self._rows(guess.layer, 1)
            wrong = torch.rand(chosen.shape, generator=draws) > RECALL
            others = torch.randint(self._count, chosen.shape, generator=draws, dtype=torch.int32)
            experts: list[int] = torch.where(wrong, others, chosen)[0].tolist()
            return experts

        Guess.__call__ = guess  # type: ignore[method-assign, assignment]
        RoutedExperts.__call__ = routed  # type: ignore[method-assign, assignment]
        Experts.__call__ = lean  # type: ignore[method-assign, assignment]
