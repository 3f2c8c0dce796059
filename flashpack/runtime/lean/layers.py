"""Layers as steps of the kernels: recognized by their parts and by what these compute, never by a model's name."""

from __future__ import annotations

from typing import Any

from torch import nn

from flashpack.runtime.lean.attention import Attention
from flashpack.runtime.lean.blocks import Experts, PlainBlock
from flashpack.runtime.lean.board import Board, NotLean, Token, norm_of


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
