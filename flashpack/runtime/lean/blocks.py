"""Feed-forward blocks as steps of the kernels: routers, routed experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashpack.kernels.cpu.native.compute import MODES
from flashpack.kernels.cpu.steps import Step
from flashpack.runtime.experts import RoutedExperts
from flashpack.runtime.lean.board import PROBES, Board, NotLean, Token


class Router:
    """A linear layer whose largest logits choose experts: int32 ``chosen`` and ``weights`` of ``top_k``."""

    def __init__(self, board: Board, module: nn.Module) -> None:
        part: Any = module
        weight = getattr(part, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != len(board.x):
            raise NotLean(f"router {type(module).__name__} has no weight [experts, hidden]")
        weight = weight.detach()
        bias = getattr(part, "bias", None)
        correction = getattr(part, "e_score_correction_bias", None)
        probe = torch.randn(PROBES, len(board.x), generator=torch.Generator().manual_seed(1))
        index, found = _routing(module, probe)
        top_k = index.shape[1]
        logits = board.array("router", len(weight))
        self.chosen = board.array("chosen", top_k, torch.int32)
        self.weights = board.array("weights", top_k)
        self._logits = board.steps.products(board.normed, [weight], [bias], [logits])
        if self._logits is None:
            raise NotLean(f"router {type(module).__name__} is stored in a way the kernels do not know")
        for mode in MODES:
            for divide in (False, True):
                for factor in {1.0, float(getattr(part, "routed_scaling_factor", 1.0))}:
                    self._route = board.steps.route(
                        logits, correction, top_k, mode, divide, factor, self.chosen, self.weights
                    )
                    if all(self._agrees(board, p, i, w) for p, i, w in zip(probe, index, found, strict=True)):
                        return
        raise NotLean(f"router {type(module).__name__} chooses experts in another way")

    def _agrees(self, board: Board, probe: Tensor, index: Tensor, weights: Tensor) -> bool:
        board.normed.copy_(probe)
        self()
        mine, theirs = self.chosen.long().argsort(), index.argsort()
        return torch.equal(self.chosen.long()[mine], index[theirs]) and torch.allclose(
            self.weights[mine], weights.float()[theirs], rtol=1e-3, atol=1e-6
        )

    def __call__(self) -> None:
        assert self._logits is not None
        self._logits()
        self._route()


def _routing(module: nn.Module, probe: Tensor) -> tuple[Tensor, Tensor]:
    """What a router answers: indices and weights [tokens, top_k]."""
    try:
        answer = module(probe)
    except Exception as e:
        raise NotLean(f"router {type(module).__name__} cannot be asked alone: {e}") from e
    parts = [t for t in answer if isinstance(t, Tensor)] if isinstance(answer, tuple) else []
    indices = [t for t in parts if t.dtype == torch.int64 and t.ndim == 2]
    weights = [t for t in parts if t.is_floating_point() and len(indices) == 1 and t.shape == indices[0].shape]
    if not weights:
        raise NotLean(f"router {type(module).__name__} answers something else than indices and weights")
    return indices[0], weights[-1]


class Experts:
    """Router and routed experts, and nothing else. ``routed`` computes ``y``; a match replaces it for a moment."""

    def __init__(self, board: Board, module: nn.Module) -> None:
        part: Any = module
        children = dict(part.named_children())
        experts = {n: m for n, m in children.items() if isinstance(getattr(m, "flashpack", None), RoutedExperts)}
        routers = [m for n, m in children.items() if n not in experts]
        if len(experts) != 1 or len(routers) != 1:
            raise NotLean(f"{type(module).__name__} is more than a router and experts")
        self._experts: RoutedExperts = next(iter(experts.values())).flashpack
        if self._experts.activation.name is None or self._experts.has_norm:
            raise NotLean(f"{type(module).__name__} has an activation the kernels do not know")
        self.experts_count = self._experts.num_experts
        self.router = Router(board, routers[0])
        top_k = len(self.router.chosen)
        outputs = board.array("outputs", top_k * len(board.x)).view(top_k, -1)
        self._places = board.array("places", top_k, torch.int32)
        self._compute = board.steps.experts(board.normed, self._experts.activation, outputs)
        self._combine = board.steps.combine(outputs, self._places, self.router.weights, board.y)
        self.routed: Step = self._routed

    def __call__(self, token: Token) -> None:
        self.router()
        self.routed()

    def _routed(self) -> None:
        chosen: list[int] = self.router.chosen.tolist()
        place = dict.fromkeys(chosen, 0)
        first = 0
        for batch in self._experts.store.batches(self._experts.layer, sorted(chosen)):
            self._compute([record for _, record in batch], first)
            for expert, _ in batch:
                place[expert] = first
                first += 1
        self._places.copy_(torch.tensor([place[e] for e in chosen], dtype=torch.int32))
        self._combine()


class PlainBlock:
    """The library's own feed-forward block on ``normed``."""

    def __init__(self, board: Board, module: nn.Module) -> None:
        self._board, self._module = board, module

    def __call__(self, token: Token) -> None:
        out = self._module(self._board.normed.view(1, 1, -1))
        if not isinstance(out, Tensor):
            raise NotLean(f"{type(self._module).__name__} answers more than a tensor")
        self._board.y.copy_(out.view(-1))
