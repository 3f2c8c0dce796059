"""Measuring a pack within several memory budgets, beside what was to be expected and what the machine allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashpack.errors import MemoryBudgetError
from flashpack.formats import Pack
from flashpack.kernels import check_device
from flashpack.performance.forecast import Forecast, forecast
from flashpack.performance.measure import Run, Setting, apart, check_context, length, measure, tokens_for
from flashpack.performance.speed import Estimate

if TYPE_CHECKING:
    from flashpack.formats.routing import Routing
    from flashpack.performance.plots import Bars, Chart


@dataclass(frozen=True)
class Measured:
    """A budget: what was expected, and what came."""

    estimate: Estimate
    run: Run

    @property
    def agreement(self) -> float:
        """Measured over expected speed of decoding."""
        return self.estimate.seconds / self.run.seconds

    @property
    def drive_share(self) -> float | None:
        """Of the time of a token, what the drive alone would need for its reads; None if nothing was read."""
        return self.run.drive / self.run.seconds or None

    def to_json(self) -> dict[str, Any]:
        run = self.run.to_json() | {"tokens_per_second": 1 / self.run.seconds, "drive_share": self.drive_share}
        return {
            "memory": self.estimate.memory,
            "estimate": self.estimate.to_json(),
            "measured": run,
            "agreement": self.agreement,
        }


@dataclass(frozen=True)
class Report:
    """``prompt`` and ``tokens``: how many were read at once and decoded."""

    forecast: Forecast
    rows: list[Measured]
    prompt: int
    tokens: int

    @property
    def memory_limit(self) -> float:
        """Tokens per second if a token took no longer than plainly reading its weights from memory."""
        return self.forecast.memory_rate / self.forecast.computing.weights

    def to_json(self) -> dict[str, Any]:
        return self.forecast.to_json() | {
            "prompt_tokens": self.prompt,
            "decoded_tokens": self.tokens,
            "memory_limit_tokens_per_second": self.memory_limit,
            "budgets": [row.to_json() for row in self.rows],
        }


def bench(
    folder: Path,
    text: str,
    memory: list[int],
    prompt: int,
    tokens: int,
    context: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    routing: Routing | None = None,
    begin: Callable[[str], object] = lambda what: None,
) -> Report:
    """Estimate and measure, each in a process of its own, for each total of ``memory`` (empty: ``speed.SHARES``).

    ``text``: what is read and decoded, token by token. ``routing``: recorded, for the estimate. ``begin`` is told what
    is done next, and of budgets that are left out because memory does not suffice after all. Raises ``UsageError`` if
    the context is too small or the text empty, and the errors of ``flashpack.load``.
    """
    if device is not None:
        check_device(device)
    pack = Pack(folder)
    needed = length(prompt, tokens, tokens)
    check_context(pack, needed, context)
    ids = tokens_for(pack, text, needed, begin)
    begin("estimating")
    expected = apart(forecast, folder, memory, context, device, routing, threads)
    rows: list[Measured] = []
    for one in expected.estimates:
        begin(f"measuring {one.memory / 1e9:.2f} GB")
        setting = Setting(folder, one.memory, ids, prompt, tokens, tokens, context, threads, device)
        try:
            rows.append(Measured(one, apart(measure, setting)))
        except MemoryBudgetError as e:
            if not rows:
                raise
            begin(f"note: {one.memory / 1e9:.2f} GB is left out: {e}")
    return Report(expected, rows, prompt, tokens)


PARTS = {
    "attention": "attention",
    "recurrent": "recurrent layers",
    "router": "routers",
    "hits": "experts in memory",
    "waits": "waiting for reads",
    "misses": "experts that were read",
    "sums": "sums, the store",
    "blocks": "blocks without experts",
    "rest": "the rest",
}
"""What the parts of a token's time are called."""


def charts(report: Report, title: str) -> list[Chart | Bars]:
    """Speed over memory; a token's time by part; hit rates by layer."""
    from flashpack.performance.plots import Bars, Chart, Line

    rows = report.rows
    memory = [row.estimate.memory / 1e9 for row in rows]
    # Where hardly anything is read, the drive allows more than could be drawn.
    drive = [1 / row.run.drive if row.run.drive * 2 * report.memory_limit > 1 else None for row in rows]
    speeds = {
        "measured": Line([(m, 1 / row.run.seconds) for m, row in zip(memory, rows, strict=True)], bold=True),
        "estimated": Line([(m, 1 / row.estimate.seconds) for m, row in zip(memory, rows, strict=True)], dashed=True),
        "the drive's limit": Line([(m, d) for m, d in zip(memory, drive, strict=True) if d], dashed=True),
        "the memory's limit": Line([(m, report.memory_limit) for m in (0.0, *memory)], dashed=True),
    }
    over = Chart(f"{title}: decoding", "memory of the process, GB", "tokens per second",
                 {name: line for name, line in speeds.items() if line.points})  # fmt: skip
    layers = {
        f"{m:.2f} GB": Line([(float(i), 100 * rate) for i, rate in row.run.layer_hit_rates.items()])
        for m, row in zip(memory, rows, strict=True)
    }
    hits = Chart("experts found in memory", "layer", "hit rate, %", layers, y_end=105)
    names = [f"{m:.2f} GB" for m in memory]
    stacks = {
        called: [1e3 * (row.run.parts or {}).get("parts", {}).get(part, 0.0) for row in rows]
        for part, called in PARTS.items()
    }
    split = Bars("a token's time by part", "memory of the process", "milliseconds", names,
                 {called: values for called, values in stacks.items() if any(values)})  # fmt: skip
    return [over, split, hits]
