"""Attention over keys and values as steps of the kernels."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.cache_utils import DynamicLayer

from flashpack.kernels.interface import MOST_WIDTH, AttentionShape, Step
from flashpack.runtime.dense import PackedLinear
from flashpack.runtime.lean.board import Board, NotLean, Token, norm_of, products, refuse_limits
from flashpack.runtime.lean.cache import RoomyLayer


class Attention:
    """Grouped-query attention with rotary positions: projections, norms of queries and keys, a gate if there is one."""

    def __init__(self, board: Board, module: nn.Module) -> None:
        part: Any = module
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        found = [getattr(part, name, None) for name in names]
        children = {name for name, _ in part.named_children()}
        if not all(isinstance(p, PackedLinear) for p in found) or children - {*names, "q_norm", "k_norm"}:
            raise NotLean(f"{type(module).__name__} has other parts than q_proj, k_proj, v_proj, o_proj")
        for place in (part, part.config):
            refuse_limits(place, type(module).__name__)
        query, key, value, output = (p for p in found if isinstance(p, PackedLinear))
        width, rotary = part.head_dim, board.rotary
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
        query_norm, key_norm = (None if n is None else n[0] for n in norms)
        shape = AttentionShape(
            query_norm, key_norm, heads, kv_heads, width, rotary, stride, width if stride > width else 0,
            next(iter(epsilons), 0.0), part.scaling,
        )  # fmt: skip
        self._layer = part.layer_idx
        q, k, v = (board.array(n, p.out_features) for n, p in (("q", query), ("k", key), ("v", value)))
        attended = board.array("attended", heads * width)
        inputs = products(board, board.normed, [query, key, value], [q, k, v])
        self._attend = board.steps.attention(shape, q, k, v, attended)
        self.steps: list[Step] = [inputs, self._attend, products(board, attended, [output], [board.y])]

    def takes(self, layer: Any) -> bool:
        """Whether a cache's layer is of the kind that the steps can go on with."""
        if type(layer) is RoomyLayer:
            return layer.batch == 1
        return type(layer) is DynamicLayer and layer.keys is not None and len(layer.keys) == 1

    def begin(self, token: Token) -> None:
        """Before the steps of a token."""
        layer: RoomyLayer = token.cache.layers[self._layer]
        keys, values = layer.room()
        self._attend.given(keys[0], values[0], token.position, token.cosine, token.sine)
        layer.grow()
