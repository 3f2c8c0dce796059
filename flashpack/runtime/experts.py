"""transformers' experts hook: routed experts computed from the store, expert by expert.

Registered under the name "flashpack"; transformers calls it with an experts module, hidden states and the router's
choice. Each needed expert is fetched once per chunk of tokens, and a token's expert outputs are summed in the order
of its top-k choice, whatever order they were computed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flashpack.kernels import Kernels
from flashpack.runtime.budget import PROMPT_CHUNK

if TYPE_CHECKING:
    from flashpack.runtime.store import ExpertStore
    from flashpack.skeleton import ExpertsModule

NAME = "flashpack"


class RoutedExperts:
    """One layer's routed experts, bound to the store."""

    def __init__(self, store: ExpertStore, kernels: Kernels, site: ExpertsModule) -> None:
        module: Any = site.module
        self.store = store
        self.kernels = kernels
        self.compute = kernels.experts
        self.layer = site.layer
        self.num_experts = site.num_experts
        self.activation = site.activation()
        self._norm: Callable[[Tensor], Tensor] | None = module.post_expert_norm if module.has_post_expert_norm else None

    @property
    def has_norm(self) -> bool:
        """Whether the experts' outputs are normalized before they are weighted."""
        return self._norm is not None

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden], index and weights [tokens, top_k] -> [tokens, hidden], in x's type."""
        if len(x) <= PROMPT_CHUNK:
            return self._chunk(x, index, weights)
        chunks = [slice(i, i + PROMPT_CHUNK) for i in range(0, len(x), PROMPT_CHUNK)]
        return torch.cat([self._chunk(x[c], index[c], weights[c]) for c in chunks])

    def _chunk(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        tokens, top_k = index.shape
        self.kernels.wait()  # for the router's choice: what was asked of the kernels before is done, too
        pairs: dict[int, list[int]] = {}
        for pair, expert in enumerate(index.reshape(-1).tolist()):
            # Indices past the last expert mean "no expert" (masked tokens).
            if expert < self.num_experts:
                pairs.setdefault(expert, []).append(pair)
        outputs = torch.empty(tokens * top_k, x.shape[-1], dtype=torch.float32, device=x.device)
        places = [-1] * (tokens * top_k)
        end = 0
        for batch in self.store.batches(self.layer, sorted(pairs)):
            begin = end
            for expert, _ in batch:
                for pair in pairs[expert]:
                    places[pair] = end
                    end += 1
            rows = [[pair // top_k for pair in pairs[expert]] for expert, _ in batch]
            out = outputs[begin:end]
            self.compute(x, [record for _, record in batch], rows, self.activation, out)
            if self._norm is not None:
                out.copy_(self._norm(out.to(x.dtype)))
        where = torch.tensor(places, dtype=torch.int32, device=x.device).view(tokens, top_k)
        return self.kernels.combine(outputs, where, weights).to(x.dtype)


def forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function transformers calls."""
    if hidden_states.is_meta:
        return torch.empty_like(hidden_states)  # shapes only: the KV cache is being measured
    routed: Any = module.flashpack
    output: Tensor = routed(hidden_states, top_k_index, top_k_weights)
    return output


def register() -> None:
    """Make "flashpack" known to transformers; harmless if repeated."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
