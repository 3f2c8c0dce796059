"""A token in one call of the kernels, as long as the experts that it asks for are in memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from flashpack.kernels.interface import Fusion, ResidentStep, Step
from flashpack.runtime.dense import PackedEmbedding, PackedLinear
from flashpack.runtime.lean.blocks import Experts, Network
from flashpack.runtime.lean.board import Board, NotLean, Token, products
from flashpack.runtime.lean.layers import LeanLayer, PlainLayer
from flashpack.runtime.store import ExpertStore


class FusedToken:
    """From a token's number to its logits, without coming back to Python between layers: its own work there, on cold
    caches, is a large part of a token whose experts are in memory. ``NotLean`` if something is no step, or the kernels
    have no fusion.

    ``norm``: of the stream, behind all layers. At the first expert that is not in memory the rest of the token is
    computed layer by layer. Results are the same.
    """

    def __init__(
        self, board: Board, layers: Sequence[LeanLayer | PlainLayer], store: ExpertStore, embedding: nn.Module,
        norm: Step, head: nn.Module,
    ) -> None:  # fmt: skip
        fusion = board.steps.fusion
        if fusion is None:
            raise NotLean("the kernels have no fusion")
        if not isinstance(embedding, PackedEmbedding) or not isinstance(head, PackedLinear):
            raise NotLean("the embedding or the head is the library's")
        self._board, self._store = board, store
        self._layers = [layer for layer in layers if isinstance(layer, LeanLayer)]
        if len(self._layers) < len(layers):
            raise NotLean("a layer is the library's")
        embed = fusion.row(embedding.matrix, board.x)
        if embed is None:
            raise NotLean("the embedding is stored in a way that is not known")
        self._embed = embed
        self._logits = board.array("logits", head.out_features)
        self._after = [norm, products(board, board.normed, [head], [self._logits])]
        self._residents = [_resident(board, fusion, layer.block) for layer in self._layers]
        pairs = list(zip(self._layers, self._residents, strict=True))
        groups: list[list[Step]] = []
        for layer, resident in pairs:
            switch = layer.block.switch if isinstance(layer.block, Experts) else []
            groups.append([*layer.mixing, *layer.choosing, *switch, resident])
        groups[0].insert(0, embed)
        self._fused = fusion.fuse(groups, self._after)
        of_layer = {layer.block.layer: step for layer, step in pairs if isinstance(layer.block, Experts)}
        # Nothing of this object: a store that knows who knows it lives on, with all of its memory, when nobody does.
        store.watch(lambda key, record: of_layer[key[0]].put(key[1], record))

    def __call__(self, token: Token) -> Tensor | None:
        """Logits [vocabulary]; None if nothing was done, because what is missing would better be read ahead."""
        store, layers = self._store, self._layers
        store.begin()
        if store.guessing:
            return None
        self._board.y.zero_()
        self._embed.given(int(token.ids))
        for layer in layers:
            layer.mixer.begin(token)
        before = [resident.seconds for resident in self._residents]
        done = self._fused()
        for layer, resident, spent in zip(layers[:done], self._residents, before, strict=False):
            if isinstance(layer.block, Experts):
                store.found(layer.block.layer, sorted(layer.block.router.read()), resident.seconds - spent)
        if done < len(layers):
            layers[done].block()
            rest = [stage for layer in layers[done + 1 :] for stage in layer.stages]
            for step in (*rest, *self._after):
                step()
        return self._logits.clone()


def _resident(board: Board, fusion: Fusion, block: object) -> ResidentStep:
    if isinstance(block, Experts):
        made = fusion.resident(
            board.normed, block.activation, block.experts_count, block.router.chosen, block.weights, block.beside,
            block.outputs, board.y,
        )  # fmt: skip
    elif isinstance(block, Network):
        outputs = board.y.view(1, -1)
        made = fusion.resident(board.normed, block.activation, 0, None, None, [block.record], outputs, None)
    else:
        raise NotLean("a block is the library's")
    if made is None:
        raise NotLean("an activation is not known")
    return made
