"""Where the time of decoding goes: ``run --timing``.

Parts that a run would do at one go are done one by one, and on an asynchronous device each is waited for: a token takes
longer than without.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from flashpack.runtime.experts import RoutedExperts
from flashpack.runtime.lean.attention import Attention
from flashpack.runtime.lean.blocks import Experts
from flashpack.runtime.lean.layers import LeanLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flashpack.kernels.interface import Steps
    from flashpack.runtime.load import Runtime

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Parts:
    """Seconds of one layer, or of all, by what they went to.

    ``attention`` and ``recurrent`` with the norm before, ``router`` too; ``hits``: computing experts that were in
    memory; ``waits``: nothing to do but to wait for reads; ``misses``: computing experts that had to be read;
    ``sums``: the store itself and the weighted sum of experts; ``blocks``: feed-forward blocks without experts.
    """

    attention: float = 0.0
    recurrent: float = 0.0
    router: float = 0.0
    hits: float = 0.0
    waits: float = 0.0
    misses: float = 0.0
    sums: float = 0.0
    blocks: float = 0.0


@dataclass(frozen=True)
class Split:
    """Means over the ``tokens`` that were decoded after the first, in seconds per token.

    ``layers``: those of which something is known. ``left``: how many layers the library computes; all but their
    experts is in ``rest``, as are embedding, head, sampling and the library's loop. ``read``: bytes per token.
    ``hit_rate``: the share of experts that were in memory. ``waited``: whether the device is asynchronous; then every
    part was waited for.
    """

    tokens: int
    whole: float
    layers: dict[int, Parts]
    left: int
    read: float
    hit_rate: float
    waited: bool

    @property
    def total(self) -> dict[str, tuple[float, int]]:
        """Of each part: the sum over all layers, and how many have it."""
        names = Parts.__annotations__
        values = {name: [s for p in self.layers.values() if (s := getattr(p, name))] for name in names}
        return {name: (sum(some), len(some)) for name, some in values.items() if some}

    @property
    def rest(self) -> float:
        return self.whole - sum(seconds for seconds, _ in self.total.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "seconds_per_token": self.whole,
            "parts": {name: seconds for name, (seconds, _) in self.total.items()} | {"rest": self.rest},
            "bytes_read_per_token": self.read,
            "hit_rate": self.hit_rate,
            "layers_of_the_library": self.left,
            "waited_for_each_part": self.waited,
            "layers": {str(i): asdict(parts) for i, parts in sorted(self.layers.items())},
        }


class Timing:
    """Splits the time of what a loaded model decodes, from ``start`` on; the model stays slower."""

    def __init__(self, model: PreTrainedModel) -> None:
        whole: Any = model
        runtime: Runtime = whole.flashpack
        self._stats = runtime.store.stats
        modules: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "flashpack", None), RoutedExperts)]
        self._routed = {module.flashpack.layer for module in modules}
        self._kernels = modules[0].flashpack.kernels
        alone = set()
        if runtime.decoder:
            runtime.decoder.fused = None
            lean = [(i, layer) for i, layer in enumerate(runtime.decoder.layers) if isinstance(layer, LeanLayer)]
            for i, layer in lean:
                self._take_apart(i, layer, runtime.decoder.board.steps)
            alone = {i for i, layer in lean if isinstance(layer.block, Experts) or i not in self._routed}
        self._left = whole.config.get_text_config(decoder=True).num_hidden_layers - len(alone)
        for module in modules:
            routed = module.flashpack
            if routed.layer not in alone:
                routed.compute = self._waiting(routed.compute)
                module.flashpack = self._timed(routed.layer, "experts", routed)
        self.start()

    def start(self) -> None:
        """Count from here."""
        self._spent: defaultdict[tuple[int, str], float] = defaultdict(float)
        self._before = copy.deepcopy(self._stats)

    def split(self, tokens: int, seconds: float) -> Split:
        """What became of ``seconds``, in which ``tokens`` were decoded since ``start``."""
        layers: defaultdict[int, Parts] = defaultdict(Parts)
        for (layer, name), spent in self._spent.items():
            parts = layers[layer]
            if name != "experts":
                setattr(parts, name, getattr(parts, name) + spent / tokens)
                continue
            now, before = self._stats.layers[layer], self._before.layers[layer]
            parts.hits = (now.hit_seconds - before.hit_seconds) / tokens
            parts.waits = (now.wait_seconds - before.wait_seconds) / tokens
            parts.misses = (now.miss_seconds - before.miss_seconds) / tokens
            parts.sums = spent / tokens - parts.hits - parts.waits - parts.misses
        now, before = self._stats.total(), self._before.total()
        hits, misses = now.hits - before.hits, now.misses - before.misses
        read = (now.bytes_read - before.bytes_read) / tokens
        rate = hits / (hits + misses)
        return Split(tokens, seconds / tokens, dict(layers), self._left, read, rate, self._kernels.asynchronous)

    def _take_apart(self, index: int, layer: LeanLayer, steps: Steps) -> None:
        block = layer.block
        mixing, choosing = steps.sequence(layer.mixing), steps.sequence(layer.choosing)
        layer.stages = [self._timed(index, "attention" if isinstance(layer.mixer, Attention) else "recurrent", mixing)]
        if isinstance(block, Experts):
            block.compute = self._waiting(block.compute)
            if block.at_once is not None:
                block.at_once = self._waiting(block.at_once)
            layer.stages += [self._timed(index, "router", choosing), self._timed(index, "experts", block)]
        elif index in self._routed:  # in the library's block, where they are timed
            layer.stages += [choosing, block]
        else:
            layer.stages += [self._timed(index, "blocks", choosing), self._timed(index, "blocks", block)]

    def _timed(self, layer: int, name: str, part: Callable[P, R]) -> Callable[P, R]:
        """``part``, whose time until it is done is that of ``name``."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            begun = time.perf_counter()
            result = part(*args, **kwargs)
            self._kernels.wait()
            self._spent[layer, name] += time.perf_counter() - begun
            return result

        return call

    def _waiting(self, part: Callable[P, R]) -> Callable[P, R]:
        """``part``, which is done when it returns."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            result = part(*args, **kwargs)
            self._kernels.wait()
            return result

        return call
