"""Layers as steps of the kernels: recognized by their parts and by what these compute, never by a model's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashpack.kernels.cpu.native.compute import MODES, MOST_WIDTH
from flashpack.kernels.cpu.native.compute import Attention as AttentionShape
from flashpack.kernels.cpu.steps import Step, Steps
from flashpack.runtime.dense import PackedLinear
from flashpack.runtime.experts import RoutedExperts
from flashpack.runtime.lean.cache import RoomyLayer

PROBES = 8
"""Random inputs that a part must answer like the steps that replace it."""


class NotLean(Exception):
    """A part is not of a kind that has steps: the message says which. The library's own module is used."""


@dataclass
class Token:
    """The token that is being decoded. ``plain``: what the library's layers are called with."""

    position: int
    cosine: Tensor
    sine: Tensor
    cache: Any
    plain: dict[str, Any]


class Board:
    """The arrays that steps read and write: ``x`` the residual stream, ``y`` what is to be added to it."""

    def __init__(self, steps: Steps, hidden: int) -> None:
        self.steps = steps
        self.x, self.normed, self.y = torch.zeros(hidden), torch.zeros(hidden), torch.zeros(hidden)
        self._shared: dict[tuple[str, int], Tensor] = {}

    def array(self, name: str, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An array that layers of equal sizes share."""
        return self._shared.setdefault((name, size), torch.zeros(size, dtype=dtype))


def norm_of(module: nn.Module, width: int) -> tuple[Tensor, float]:
    """Weight [width] and epsilon of an RMS norm, whether it multiplies by its weight or by one more than it."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.shape != (width,) or not isinstance(epsilon, float) or width % 8:
        raise NotLean(f"{type(module).__name__} is no RMS norm of {width}")
    probe = torch.randn(PROBES, width, generator=torch.Generator().manual_seed(0))
    normed = probe * torch.rsqrt(probe.square().mean(-1, keepdim=True) + epsilon)
    found = module(probe)
    for candidate in (weight.float(), weight.float() + 1):
        if torch.allclose(found, normed * candidate, rtol=1e-5, atol=1e-6):
            return candidate.clone(), epsilon
    raise NotLean(f"{type(module).__name__} is no RMS norm")


def refuse_limits(place: object, what: str) -> None:
    """Raise ``NotLean`` for what shows only in long contexts or at large values: a comparison of few tokens misses it.

    ``place``: a module or a configuration; 0 and None are no limit.
    """
    names = ("sliding_window", "attention_chunk_size", "sinks", "attn_logit_softcapping", "final_logit_softcapping")
    for name in names:
        value = getattr(place, name, None)
        if isinstance(value, Tensor) or value:
            raise NotLean(f"{what} has {name}")


class Attention:
    """Grouped-query attention with rotary positions: projections, norms of queries and keys, a gate if there is one."""

    def __init__(self, board: Board, module: nn.Module, rotary: int) -> None:
        part: Any = module
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        found = [getattr(part, name, None) for name in names]
        children = {name for name, _ in part.named_children()}
        if not all(isinstance(p, PackedLinear) for p in found) or children - {*names, "q_norm", "k_norm"}:
            raise NotLean(f"{type(module).__name__} has other parts than q_proj, k_proj, v_proj, o_proj")
        for place in (part, part.config):
            refuse_limits(place, type(module).__name__)
        query, key, value, output = (p for p in found if isinstance(p, PackedLinear))
        width = part.head_dim
        heads, kv_heads = max(1, output.in_features // width), max(1, key.out_features // width)
        stride = query.out_features // heads
        sizes = (query.out_features, key.out_features, value.out_features, output.in_features)
        if sizes != (heads * stride, kv_heads * width, kv_heads * width, heads * width):
            raise NotLean(f"{type(module).__name__} has projections of {', '.join(map(str, sizes))} values")
        if width % 8 or width > MOST_WIDTH or stride not in (width, 2 * width) or rotary > width or heads % kv_heads:
            raise NotLean(f"{type(module).__name__} has {heads} heads of {width} for {kv_heads} with {stride} values")
        norms = [norm_of(getattr(part, n), width) if hasattr(part, n) else None for n in ("q_norm", "k_norm")]
        epsilons = {n[1] for n in norms if n is not None}
        if len(epsilons) > 1:
            raise NotLean(f"{type(module).__name__} has norms of two kinds")
        weights = [None if n is None else n[0] for n in norms]
        shape = AttentionShape(
            None, None, *(None if w is None else w.data_ptr() for w in weights), 0, heads, kv_heads, width, rotary,
            stride, width if stride > width else 0, next(iter(epsilons), 0.0), part.scaling,
        )  # fmt: skip
        self._keep = weights
        self._layer = part.layer_idx
        q, k, v = (board.array(n, p.out_features) for n, p in (("q", query), ("k", key), ("v", value)))
        attended = board.array("attended", heads * width)
        self._inputs = _products(board, board.normed, [query, key, value], [q, k, v])
        self._attend = board.steps.attention(shape, q, k, v, attended)
        self._output = _products(board, attended, [output], [board.y])

    def __call__(self, token: Token) -> None:
        layer: RoomyLayer = token.cache.layers[self._layer]
        self._inputs()
        keys, values = layer.room()
        self._attend(keys[0], values[0], token.position, token.cosine, token.sine)
        layer.grow()
        self._output()


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


class LeanLayer:
    """A layer of attention and a feed-forward block, each behind a norm and added to the stream."""

    def __init__(self, board: Board, layer: nn.Module, rotary: int) -> None:
        part: Any = layer
        names = [name for name, _ in part.named_children()]
        blocks = [n for n in names if n not in ("self_attn", "input_layernorm", "post_attention_layernorm")]
        if len(names) != 4 or len(blocks) != 1:
            raise NotLean(f"{type(layer).__name__} has other parts than attention, a block and two norms")
        hidden = len(board.x)
        self.attention = Attention(board, part.self_attn, rotary)
        self.block: Experts | PlainBlock
        try:
            self.block = Experts(board, getattr(part, blocks[0]))
        except NotLean:
            self.block = PlainBlock(board, getattr(part, blocks[0]))
        first, second = (norm_of(n, hidden) for n in (part.input_layernorm, part.post_attention_layernorm))
        self._first = board.steps.add_norm(board.x, board.y, *first, board.normed)
        self._second = board.steps.add_norm(board.x, board.y, *second, board.normed)

    def __call__(self, token: Token) -> None:
        self._first()
        self.attention(token)
        self._second()
        self.block(token)


class PlainLayer:
    """The library's own layer."""

    def __init__(self, board: Board, layer: nn.Module) -> None:
        self._board, self._layer = board, layer

    def __call__(self, token: Token) -> None:
        x, y = self._board.x, self._board.y
        x += y
        out = self._layer(x.view(1, 1, -1), past_key_values=token.cache, **token.plain)
        x.copy_((out[0] if isinstance(out, tuple) else out).view(-1))
        y.zero_()


def _products(board: Board, x: Tensor, parts: list[PackedLinear], out: list[Tensor]) -> Callable[[], None]:
    step = board.steps.products(x, [p.matrix for p in parts], [p.bias for p in parts], out)
    if step is None:
        raise NotLean("a matrix is stored in a way the kernels do not know")
    return step
