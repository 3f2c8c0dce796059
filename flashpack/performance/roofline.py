"""The roofline of a pack that does not exist yet: how fast it would decode at best, told from its plan, the memory
and the drive.

    seconds per token = dense weights / memory + max(experts / memory, experts not in memory / drive)

in bytes and bytes per second. No kernel runs, and routing is taken as even: ``forecast`` of the pack knows more.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashpack.errors import FormatError, MemoryBudgetError
from flashpack.formats.constants import PAGE
from flashpack.performance import speed
from flashpack.runtime.budget import Budget
from flashpack.runtime.profile import usable_cores
from flashpack.runtime.rates import measure
from flashpack.runtime.topk import experts_per_token
from flashpack.sizes import gb

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flashpack.converter.plan import Plan

SECONDS = 1.0
"""Spent on reading, at the most."""


@dataclass(frozen=True)
class Weights:
    """Bytes: of the dense part that a token needs, of its experts, of all experts; ``record``: of the largest one."""

    dense: int
    used: int
    experts: int
    record: int


@dataclass(frozen=True)
class Row:
    """Of ``memory`` bytes for the process: the share of the experts that fit, and tokens per second."""

    memory: int
    share: float
    tokens_per_second: float


@dataclass(frozen=True)
class Roofline:
    """Rates in bytes per second. ``drive``: of the drive that the source is on. ``most``: what may be taken now."""

    memory_rate: float
    drive: float
    most: int
    weights: Weights
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def weights_of(plan: Plan, model: PreTrainedModel) -> Weights:
    """What a token needs of the pack that ``plan`` makes of ``model``, which may be on the meta device."""
    top_k = experts_per_token(model.config)
    embedding = model.get_input_embeddings()
    name = next((f"{n}.weight" for n, m in model.named_modules() if m is embedding), "")
    tied = model.config.get_text_config(decoder=True).tie_word_embeddings
    dense = sum(s.nbytes for t in plan.dense() if tied or t.name != name for s in t.specs())
    experts = [sum(kind.stride for kind in p.kinds) for p in plan.layers]
    used = sum(top_k * size / len(p.kinds) for size, p in zip(experts, plan.layers, strict=True))
    largest = max(kind.stride for p in plan.layers for kind in p.kinds)
    return Weights(dense, int(used), sum(experts), largest)


def roofline(weights: Weights, files: Sequence[Path], least: Budget, most: int, wanted: list[int]) -> Roofline | None:
    """Speeds for totals of ``wanted``, or some up to ``most``. ``files``: what is read to measure the drive; None if
    they are too small for that, or cannot be read."""
    if wanted and min(wanted) < least.total:
        raise MemoryBudgetError(
            f"--memory {gb(min(wanted))} is too small: the pack will need at least {gb(least.total)}; a smaller "
            f"--context needs less"
        )
    size = -(-weights.record // PAGE) * PAGE
    real = [file.resolve() for file in files]  # caches of hubs have links
    folder = Path(os.path.commonpath([file.parent for file in real]))
    try:
        rates = measure(folder, [str(file.relative_to(folder)) for file in real], [size], SECONDS)
    except (OSError, FormatError):
        return None  # whoever needs the file will say which
    if not rates:
        return None
    drive = rates[0].drive or max(rates[0].direct or 0.0, rates[0].buffered)
    memory_rate = speed.memory_rate(usable_cores())
    fixed = least.total - least.arena
    rows = []
    for total in dict.fromkeys(speed.totals(fixed, weights.experts, least.total, most, wanted)):  # small ones are one
        share = min(1.0, max(0, total - fixed) / weights.experts)
        reading = (1 - share) * weights.used / drive
        seconds = weights.dense / memory_rate + max(weights.used / memory_rate, reading)
        rows.append(Row(total, share, 1 / seconds))
    return Roofline(memory_rate, drive, most, weights, rows)
