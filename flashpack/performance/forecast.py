"""What to expect of a pack on this machine: memory budgets, and how fast each will decode."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashpack.errors import MemoryBudgetError
from flashpack.formats import Pack
from flashpack.kernels import best_device
from flashpack.performance import speed
from flashpack.performance.replay import Replay
from flashpack.performance.simulate import hit_rate
from flashpack.runtime.budget import Budget
from flashpack.runtime.forecast import smallest_of
from flashpack.runtime.memory import spare
from flashpack.runtime.profile import profile_of, usable_cores
from flashpack.sizes import gb

if TYPE_CHECKING:
    from flashpack.formats.routing import Routing

_GROWTH = 2**26
"""Bytes by which the process may have grown when the pack is loaded, since its memory was looked at."""


@dataclass(frozen=True)
class Forecast:
    """``least``: the smallest budget, ``most``: what may be taken unasked now. ``memory_rate``: plain reads of memory,
    bytes per second. ``top_k``: experts of a token and layer. ``traced``: whether hit rates are of recorded routing."""

    least: Budget
    most: int
    context: int
    top_k: int
    computing: speed.Computing
    memory_rate: float
    estimates: list[speed.Estimate]
    traced: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "smallest": self.least.to_json(),
            "available": self.most,
            "context": self.context,
            "experts_per_token": self.top_k,
            "computing": asdict(self.computing),
            "memory_bytes_per_second": self.memory_rate,
            "routing": "recorded" if self.traced else "even",
            "estimates": [e.to_json() for e in self.estimates],
        }


def forecast(
    folder: Path,
    memory: list[int],
    context: int | None = None,
    device: str | None = None,
    routing: Routing | None = None,
    threads: int | None = None,
) -> Forecast:
    """Measure for a few seconds, then estimate for each total of ``memory`` (empty: ``speed.budgets_for`` chooses).

    ``threads``: of computing. ``routing``: a recorded trace of this pack's model, else even routing is assumed. Raises
    ``MemoryBudgetError`` where there is not enough memory, and the errors of ``flashpack.load``.
    """
    import torch

    from flashpack.runtime import load

    pack = Pack(folder)
    profile = profile_of(pack)
    if threads := threads or profile.threads:
        torch.set_num_threads(threads)
    least, context, top_k = smallest_of(pack, context)
    # What ``load`` takes unasked: memory that a GPU uses is wired.
    most = least.base + (spare() // 2 if (device or best_device()) == "mps" else spare())
    needed = least.total + speed.token_arena(pack, top_k) + _GROWTH
    slots, short = speed.token_slots(pack, top_k), True
    model: Any = None
    while short:
        del model  # before there is another one
        gc.collect()
        if needed > most:
            raise MemoryBudgetError(
                f"{folder}: measuring takes {gb(needed)} of memory, {gb(most)} can be taken; close other programs or "
                f"lower --context"
            )
        model = load(folder, device=device, memory=needed, context=context, warm=False, prefetch=False)
        found = model.flashpack.budget
        short = any(found.slots[stride] < count for stride, count in slots.items())
        needed += _GROWTH
    budgets = speed.budgets_for(pack, least, most, memory)
    measured = speed.computing(model)
    del model
    gc.collect()
    replay = Replay(pack, measured.io == "direct", profile.readers)
    try:
        rate = None if routing is None else (lambda slots: hit_rate(routing, slots, warmed_up=True))
        estimates = [speed.estimate(pack, measured, *one, top_k, replay, rate) for one in budgets.items()]
    finally:
        replay.close()
    memory_rate = speed.memory_rate(usable_cores())
    return Forecast(least, most, context, top_k, measured, memory_rate, estimates, routing is not None)
