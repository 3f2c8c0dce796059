"""Layers as steps of the kernels: recognized by their parts and by what these compute, never by a model's name."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import nn

from flashpack.kernels.interface import Step
from flashpack.runtime.lean.attention import Attention
from flashpack.runtime.lean.blocks import Experts, Guess, Network, PlainBlock
from flashpack.runtime.lean.board import Board, NotLean, Token, library_calls, norm_of
from flashpack.runtime.lean.recurrent import DeltaRule

MIXERS: dict[str, type[Attention | DeltaRule]] = {"self_attn": Attention, "linear_attn": DeltaRule}
"""What a layer may begin with, by the name of the part."""


class LeanLayer:
    """A layer of attention or a recurrent part (``mixer``) and a feed-forward block, each behind a norm and added to
    the stream.

    ``stages`` are called for a token: the steps ``mixing``, up to the mixer's result, and ``choosing``, up to the
    router's, as one; then the block.
    """

    def __init__(self, board: Board, layer: nn.Module) -> None:
        part: Any = layer
        norms = ("input_layernorm", "post_attention_layernorm")
        names = [name for name, _ in part.named_children() if name not in norms]
        mixers = [name for name in names if name in MIXERS]
        if len(names) != 2 or len(mixers) != 1 or not all(hasattr(part, name) for name in norms):
            raise NotLean(f"{type(layer).__name__} has other parts than attention, a block and two norms")
        (mixer,), (block,) = mixers, (getattr(part, name) for name in names if name not in mixers)
        self.mixer = MIXERS[mixer](board, getattr(part, mixer))
        self.block = _block(board, block)
        self._board, self._block_norm = board, part.post_attention_layernorm
        first, second = (norm_of(getattr(part, name), len(board.x)) for name in norms)
        self.mixing = [board.steps.add_norm(board.x, board.y, *first, board.normed), *self.mixer.steps]
        self.choosing = [board.steps.add_norm(board.x, board.y, *second, board.normed), *self.block.steps]
        self.stages: list[Step] = [board.steps.sequence([*self.mixing, *self.choosing]), self.block]

    def expects(self, later: LeanLayer) -> None:
        """Have experts that ``later``, the next layer with experts, is likely to ask for read ahead."""
        if isinstance(self.block, Experts) and isinstance(later.block, Experts) and self.block.prefetches:
            self.block.guess = Guess(self._board, later._block_norm, later.block)

    def __call__(self, token: Token) -> None:
        self.mixer.begin(token)
        for stage in self.stages:
            stage()


def _block(board: Board, module: nn.Module) -> Experts | Network | PlainBlock:
    kinds: tuple[type[Experts | Network], ...] = (Experts, Network)
    for kind in kinds:
        with contextlib.suppress(NotLean), library_calls(type(module).__name__):
            return kind(board, module)
    return PlainBlock(board, module)


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
