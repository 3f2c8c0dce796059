"""How fast a pack will decode with a memory budget: an estimate from what is measured in a few seconds.

    seconds per token = other + sum over the layers of max(experts, reading)

``experts`` is computing a layer's experts, ``other`` everything else, both measured with all experts in memory;
``reading`` is what the drive needs for those of the layer that are not, measured by reading as many records at once.
Experts that are there are computed while the others are read, so the longer of the two counts.

How many are there is a matter of the text. Without a recorded trace routing is taken as even: then the share of the
experts that fit in memory is the share that is found there, whatever the cache does, and no real text is routed so.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flashpack.formats import Pack
from flashpack.performance.replay import Replay, bursts_like
from flashpack.runtime import budget as budgets
from flashpack.runtime.budget import Budget
from flashpack.runtime.memory import spare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARES = (0.1, 0.25, 0.5, 1.0)
"""Of the experts in memory, for which speeds are estimated unless budgets are given."""

WARM, TOKENS = 3, 12
"""Decoded before computing is timed, and timed."""

READ_SECONDS = 0.6
"""Spent on measuring the reads of one budget."""

MOST_TOKENS = 1000
"""Whose reads are measured: where nearly all is found, there is hardly anything to read."""

_STEP = 10**8  # budgets are rounded up to so many bytes

HitRate = Callable[[dict[int, int]], float]
"""Share of a token's experts that are found in memory, by the arena's slots for each record size."""


@dataclass(frozen=True)
class Computing:
    """A token with all its experts in memory. Seconds; ``token`` layer by layer, as where others are missing, and
    ``at_once``, as where none ever is. ``experts`` are part of ``token``, and 0 where kernels only begin when they are
    called: there it is not known, and nothing is taken to overlap. ``weights``: bytes of weights that it needs.
    ``io``: how this machine reads the pack, ``why`` why."""

    token: float
    at_once: float
    experts: float
    weights: int
    kernels: str
    decoding: str
    io: str
    why: str


@dataclass(frozen=True)
class Estimate:
    """A budget of ``memory`` bytes, and what to expect of it. ``share`` of the experts that fit; ``reading``: seconds
    that the drive needs for the ``read_bytes`` of a token; ``seconds`` of a token."""

    memory: int
    budget: Budget
    share: float
    hit_rate: float
    read_bytes: float
    reading: float
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes per second of the drive in these bursts; 0 if nothing is read."""
        return self.read_bytes / self.reading if self.reading else 0.0

    def to_json(self) -> dict[str, Any]:
        data = asdict(self) | {"budget": self.budget.to_json(), "tokens_per_second": 1 / self.seconds}
        return data | {"drive_bytes_per_second": self.rate}


def budgets_for(pack: Pack, least: Budget, most: int, wanted: list[int]) -> dict[int, Budget]:
    """``wanted`` totals, divided, or those for ``SHARES`` as far as ``most`` bytes go, and ``most`` if not all experts
    fit. Raises ``MemoryBudgetError`` if a wanted one is too small."""
    chosen = totals(least.total - least.arena, pack.expert_bytes, least.total, most, wanted)
    return {total: budgets.divide(pack, least.base, least.kv, least.work, total, 0) for total in chosen}


def totals(fixed: int, experts: int, least: int, most: int, wanted: list[int]) -> list[int]:
    """``wanted``, or totals for ``SHARES`` of ``experts`` bytes beside ``fixed`` ones, between ``least`` and ``most``,
    and ``most`` if not all experts fit."""
    if wanted:
        return wanted
    found = [max(least, -(-(fixed + int(share * experts)) // _STEP) * _STEP) for share in SHARES]
    inside = [total for total in found if total <= most]
    return inside if len(inside) == len(found) else [*inside, most]


def token_slots(pack: Pack, top_k: int) -> dict[int, int]:
    """Slots, by record size, for the first ``top_k`` experts of each layer."""
    needed = dict.fromkeys(budgets.stride_counts(pack.manifest), 0)
    for layer in pack.manifest.layers:
        with pack.open_shard(layer) as shard:
            for expert in range(min(top_k, layer.experts)):
                needed[shard.kind(expert).stride] += 1
    return needed


def token_arena(pack: Pack, top_k: int) -> int:
    """Bytes that a budget must have left for experts to give ``token_slots``: each record size gets its share."""
    counts = budgets.stride_counts(pack.manifest)
    whole = sum(stride * count for stride, count in counts.items())
    return max(-(-slots * whole // counts[stride]) for stride, slots in token_slots(pack, top_k).items())


def computing(model: PreTrainedModel) -> Computing:
    """Measure a loaded pack whose arena has ``token_slots``; it is of no use for anything else afterwards."""
    from flashpack.performance.feed import Feed

    whole: Any = model
    runtime = whole.flashpack
    _choose_always_the_same(model)
    feed, stats = Feed(model, [1, 2, 3, 4]), runtime.store.stats

    def token() -> float:
        for _ in range(WARM):
            feed(1)
        stats.reset()
        times = sorted(feed(1) for _ in range(TOKENS))
        if stats.total().misses:
            raise AssertionError("experts of one token do not stay in memory")
        return times[TOKENS // 2]

    at_once = token()
    if runtime.decoder:
        runtime.decoder.fused = None
    by_layer = token()
    experts = 0.0 if runtime.store.asynchronous else min(by_layer, stats.total().hit_seconds / TOKENS)
    return Computing(
        by_layer, at_once, experts, _weights(model), runtime.kernels, runtime.decoding, stats.io, stats.why
    )


def _choose_always_the_same(model: PreTrainedModel) -> None:
    """Let each layer use its first experts, whatever its router says."""
    import torch

    from flashpack.runtime.experts import RoutedExperts
    from flashpack.runtime.lean.blocks import Experts
    from flashpack.runtime.lean.layers import LeanLayer

    whole: Any = model
    for module in model.modules():
        part: Any = module
        routed = getattr(part, "flashpack", None)
        if isinstance(routed, RoutedExperts):

            def compute(x: Any, index: Any, weights: Any, _routed: RoutedExperts = routed) -> Any:
                return _routed(x, torch.arange(index.shape[1]).expand_as(index).to(index), weights)

            part.flashpack = compute
    decoder = whole.flashpack.decoder
    for layer in decoder.layers if decoder else ():
        if isinstance(layer, LeanLayer) and isinstance(layer.block, Experts):
            chosen = layer.block.router.chosen
            first = torch.arange(len(chosen)).to(chosen)
            layer.block.prefer = lambda chosen=chosen, first=first: chosen.copy_(first)
            if decoder.fused:  # which does not ask ``prefer``: the only row of a matrix takes the choice's place
                row_of = decoder.board.steps.fusion.row
                row = row_of(first.view(1, -1).view(torch.float32), chosen.view(torch.float32))
                row.given(0)
                layer.choosing.append(row)
    if decoder and decoder.fused:
        decoder.fuse()


def _weights(model: PreTrainedModel) -> int:
    """Bytes of weights that a token needs: the dense part without the embedding, unless that is the head, too; and its
    experts."""
    whole: Any = model
    runtime = whole.flashpack
    pack: Pack = runtime.pack
    top_k = runtime.experts_per_token[0]
    embedding = model.get_input_embeddings()
    name = next((n for n, m in model.named_modules() if m is embedding), None)
    tied = whole.config.get_text_config(decoder=True).tie_word_embeddings
    looked_up = 0 if tied else sum(t.nbytes for t in pack.manifest.tensors if t.name.rpartition(".")[0] == name)
    kinds = pack.manifest.record_kinds
    experts = sum(
        top_k * sum(kinds[k].nbytes * count for k, count in layer.kinds) / layer.experts
        for layer in pack.manifest.layers
    )
    return pack.dense_bytes - looked_up + int(experts)


def estimate(
    pack: Pack,
    measured: Computing,
    memory: int,
    budget: Budget,
    top_k: int,
    replay: Replay,
    hit_rate: HitRate | None = None,
) -> Estimate:
    """What to expect of ``budget``, which ``memory`` bytes give; reads for ``READ_SECONDS``. ``top_k``: experts of a
    token and layer."""
    counts = budgets.stride_counts(pack.manifest)
    even = sum(s * n for s, n in budget.slots.items()) / sum(s * n for s, n in counts.items())
    found = hit_rate(budget.slots) if hit_rate and even < 1 else even
    each = measured.experts / len(pack.manifest.layers)
    read, reading, longer, tokens = 0, 0.0, 0.0, 0
    while found < 1 and reading < READ_SECONDS and tokens < MOST_TOKENS:
        misses = {
            layer.index: sum(random.random() >= found for _ in range(min(top_k, layer.experts)))
            for layer in pack.manifest.layers
        }
        bursts = bursts_like(pack, [misses])
        seconds = replay.run(bursts)
        read += replay.size(bursts)
        reading += sum(seconds)
        longer += sum(max(each, burst) for burst in seconds) + each * (len(misses) - len(bursts))
        tokens += 1
    if not tokens:
        return Estimate(memory, budget, min(1.0, even), found, 0.0, 0.0, measured.at_once)
    token = measured.token - measured.experts + longer / tokens
    return Estimate(memory, budget, min(1.0, even), found, read / tokens, reading / tokens, token)


def memory_rate(threads: int, rounds: int = 5) -> float:
    """Bytes per second of plainly reading memory with ``threads`` threads, the median of some ``rounds``."""
    import numpy as np

    size = min(2**28, spare() // 4)
    pieces = np.array_split(np.ones(size // 8, dtype=np.int64), threads)
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            begun = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, pieces))
            rates.append(size / (time.perf_counter() - begun))
    return statistics.median(rates)
