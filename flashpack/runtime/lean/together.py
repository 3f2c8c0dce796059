"""A token's layers in one call of the kernels, as long as the experts that it asks for are in memory."""

from __future__ import annotations

from collections.abc import Sequence

from flashpack.kernels import RecordView
from flashpack.kernels.interface import ResidentStep, Step, Stretches
from flashpack.runtime.cache import Key
from flashpack.runtime.lean.blocks import Experts, Network
from flashpack.runtime.lean.board import Board, NotLean, Token
from flashpack.runtime.lean.layers import LeanLayer, PlainLayer
from flashpack.runtime.store import ExpertStore


class Together:
    """All layers of a model: nothing comes back to Python between them, whose time is a part of a token's that grows as
    experts come from memory. ``NotLean`` if not all are steps, or the kernels have no stretches.

    At the first expert that is not in memory the rest of the token is computed layer by layer. Results are the same.
    """

    def __init__(self, board: Board, layers: Sequence[LeanLayer | PlainLayer], store: ExpertStore) -> None:
        stretches = board.steps.stretches
        if stretches is None:
            raise NotLean("the kernels have no stretches")
        self._store = store
        self._layers = [layer for layer in layers if isinstance(layer, LeanLayer)]
        if len(self._layers) < len(layers):
            raise NotLean("a layer is the library's")
        self._residents = [_resident(board, stretches, layer.block) for layer in self._layers]
        self._of_layer = {
            layer.block.layer: resident
            for layer, resident in zip(self._layers, self._residents, strict=True)
            if isinstance(layer.block, Experts)
        }
        groups: list[list[Step]] = []
        for layer, resident in zip(self._layers, self._residents, strict=True):
            switch = layer.block.switch if isinstance(layer.block, Experts) else []
            groups.append([*layer.mixing, *layer.choosing, *switch, resident])
        self._stretch = stretches.stretch(groups)
        store.watch(self._placed)

    def __call__(self, token: Token) -> bool:
        """Compute all layers; False if nothing was done, because some would better be computed while others are read."""
        store = self._store
        if store.reads_ahead:
            return False
        store.check_cancelled()
        for layer in self._layers:
            layer.mixer.begin(token)
        before = [resident.seconds for resident in self._residents]
        done = self._stretch()
        for layer, resident, spent in zip(self._layers[:done], self._residents, before, strict=False):
            if isinstance(layer.block, Experts):
                store.found(layer.block.layer, sorted(layer.block.router.read()), resident.seconds - spent)
        for layer in self._layers[done : done + 1]:
            layer.block()
        for layer in self._layers[done + 1 :]:
            for stage in layer.stages:
                stage()
        return True

    def _placed(self, key: Key, record: RecordView | None) -> None:
        layer, expert = key
        self._of_layer[layer].put(expert, record)


def _resident(board: Board, stretches: Stretches, block: object) -> ResidentStep:
    if isinstance(block, Experts):
        made = stretches.resident(
            board.normed, block.activation, block.experts_count, block.router.chosen, block.weights, block.beside,
            block.outputs, board.y,
        )  # fmt: skip
    elif isinstance(block, Network):
        outputs = board.y.view(1, -1)
        made = stretches.resident(board.normed, block.activation, 0, None, None, [block.record], outputs, None)
    else:
        raise NotLean("a block is the library's")
    if made is None:
        raise NotLean("an activation is not known")
    return made
