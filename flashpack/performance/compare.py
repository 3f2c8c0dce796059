"""Cache policies at several sizes of memory, for a recorded file: rows of a table, and a chart."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashpack.errors import UsageError
from flashpack.formats.routing import Routing
from flashpack.performance.plots import Chart, Line
from flashpack.performance.policies import POLICIES, Runtime
from flashpack.performance.simulate import Requests, Simulated, slots_of_memory, slots_of_share
from flashpack.runtime.memory import parse_size

SIZES = "5%,10%,20%,30%,40%,50%,70%,100%"
"""Of all experts."""


@dataclass(frozen=True)
class Row:
    """What the policies find with ``slots``: ``share`` of the experts, ``arena`` bytes of them (None: not known), and
    ``memory`` bytes of the whole process (None: not known)."""

    slots: dict[int, int]
    share: float
    arena: int | None
    memory: int | None
    found: dict[str, Simulated]

    def to_json(self) -> dict[str, Any]:
        rates = {name: {"decoded": hits.decoded.rate, "prompt": hits.prompt.rate} for name, hits in self.found.items()}
        return {
            "slots": sum(self.slots.values()),
            "share": self.share,
            "expert_bytes": self.arena,
            "memory_bytes": self.memory,
            "hit_rates": rates,
        }


@dataclass(frozen=True)
class Checked:
    """The recorded run beside its simulation: ``run`` and ``simulated`` hits of ``asked``.

    ``exact``: every request had a slot for each of its experts, so the two must be equal.
    """

    slots: int
    asked: int
    run: int
    simulated: int
    exact: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "slots": self.slots,
            "asked": self.asked,
            "run_hits": self.run,
            "simulated_hits": self.simulated,
            "exact": self.exact,
        }


def sizes_of(routing: Routing, memory: str) -> list[dict[int, int]]:
    """Slots for each of ``memory``: per cent of the experts, or sizes of the whole process, with commas between."""
    sizes = []
    for one in memory.split(","):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", one)
        if match is None:
            sizes.append(slots_of_memory(routing, parse_size(one)))
        elif 0 < float(match[1]) <= 100:
            sizes.append(slots_of_share(routing, float(match[1]) / 100))
        else:
            raise UsageError(f"--memory {one.strip()}: more than 0% and at most 100% of the experts")
    return sizes


def compare(
    routing: Routing, sizes: list[dict[int, int]], advance: Callable[[int], object] = lambda count: None
) -> list[Row]:
    """All of ``POLICIES`` at each of ``sizes``; ``advance`` is called after each policy."""
    requests = Requests(routing)
    whole = sum(stride * count for stride, count in routing.stride_counts().items())
    rows = []
    for slots in sizes:
        found = {}
        for name, policy in POLICIES.items():
            found[name] = requests.simulate(slots, policy)
            advance(1)
        arena = sum(stride * count for stride, count in slots.items())
        memory = None if routing.run is None else routing.run.beside + arena
        rows.append(Row(slots, arena / whole, arena if routing.sized else None, memory, found))
    return rows


def check(routing: Routing) -> Checked | None:
    """The recorded run simulated, if one was recorded."""
    run = routing.run
    if run is None:
        return None
    requests = Requests(routing)
    found = requests.simulate(run.slots, Runtime).total.found
    return Checked(sum(run.slots.values()), run.hits + run.misses, run.hits, found, requests.fit(run.slots))


def compared(routing: Routing) -> str:
    """Whose hit rates are compared: those of decoded tokens, or of prompts where nothing was decoded."""
    return "prompts" if routing.prompt.all() else "decoded tokens"


def rate(routing: Routing, found: Simulated) -> float:
    """The hit rate that is compared."""
    return (found.prompt if routing.prompt.all() else found.decoded).rate


def chart(routing: Routing, rows: list[Row], name: str) -> Chart:
    """Hit rates over memory of the file ``name``."""
    lines = {}
    for policy in POLICIES:
        points = [(100 * row.share, 100 * rate(routing, row.found[policy])) for row in rows]
        lines[policy] = Line(points, dashed=policy == "Belady", bold=policy == "flashpack")
    whole = sum(stride * count for stride, count in routing.stride_counts().items())
    unit, unit_name = (1e9, "GB") if whole >= 1e9 else (1e6, "MB")
    above = (f"memory for experts, {unit_name}", whole / unit / 100) if routing.sized else None
    return Chart(
        f"{name}: hit rates of {compared(routing)}", "experts in memory, %", "hit rate, %", lines, 100, 100, above
    )
