"""What plan and bench say of speed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flashpack.cli.console import gb, say
from flashpack.errors import UsageError

if TYPE_CHECKING:
    from flashpack.formats.routing import Routing
    from flashpack.performance.bench import Report
    from flashpack.performance.forecast import Forecast
    from flashpack.performance.roofline import Roofline


TOO_MUCH = " (more than can be taken now)"


def sizes(memory: list[str]) -> list[int]:
    """Bytes of each --memory, the smallest first."""
    from flashpack.runtime.memory import parse_size

    return sorted({parse_size(size) for size in memory})


def recorded(trace: Path | None, pack: Path) -> Routing | None:
    """The routing of --trace. Raises ``UsageError`` if it is not that of a model like the pack's."""
    if trace is None:
        return None
    from flashpack.formats import Pack
    from flashpack.formats.routing import read_routing
    from flashpack.runtime.routing import record_sizes

    found, opened = read_routing(trace), Pack(pack)
    layers = {layer.index: layer.experts for layer in opened.manifest.layers}
    counts = (found.record_bytes > 0).sum(1).tolist()
    if dict(zip(found.layers, counts, strict=True)) != layers:
        raise UsageError(f"--trace {trace}: of another model: it has other layers or numbers of experts than {pack}")
    # Which experts a token uses does not depend on how they are stored: another pack of the model may have recorded it.
    return replace(found, record_bytes=record_sizes(opened), run=None)


def row(cells: list[str]) -> None:
    """A row of a Markdown table."""
    say("| " + " | ".join(cells) + " |")


def say_forecast(found: Forecast) -> None:
    """The estimate and what it is made of."""
    c = found.computing
    how = "routing as recorded" if found.traced else "even routing (texts do better; flashpack trace records yours)"
    say("")
    say(f"decoding, estimated; {how}:")
    say("")
    row(["memory", "experts in memory", "found there", "read per token", "drive", "reading", "tokens per second"])
    row(["---"] * 7)
    for e in found.estimates:
        memory = gb(e.memory) + (TOO_MUCH if e.memory > found.most else "")
        drive = f"{gb(e.rate)}/s" if e.reading else "-"
        reading = f"{1e3 * e.reading:.1f} ms"
        row([memory, f"{e.share:.0%}", f"{e.hit_rate:.0%}", gb(e.read_bytes), drive, reading, f"{1 / e.seconds:.3g}"])
    say("")
    say(
        f"seconds per token = {1e3 * (c.token - c.experts):.1f} ms + sum over the layers of max(experts, reading); the "
        f"experts of all layers take {1e3 * c.experts:.1f} ms; or {1e3 * c.at_once:.1f} ms, where all are in memory: "
        f"measured here ({c.kernels}; {c.io} reads: {c.why})"
    )
    say(
        f"no memory makes it faster than {found.memory_rate / c.weights:.3g} tokens per second: a token needs "
        f"{gb(c.weights)} of weights, memory gives {gb(found.memory_rate)}/s"
    )


def say_roofline(found: Roofline) -> None:
    """Of a pack that is not there yet."""
    say(
        f"speed, at best:  a token needs {gb(found.weights.dense + found.weights.used)}; memory gives "
        f"{gb(found.memory_rate)}/s, the source's drive {gb(found.drive)}/s; even routing (plan PACK measures more)"
    )
    say("  seconds per token = dense weights / memory + max(experts / memory, experts not in memory / drive)")
    for one in found.rows:
        speed = f"{one.tokens_per_second:.3g} tok/s" + (TOO_MUCH if one.memory > found.most else "")
        say(f"  with {gb(one.memory):>8}: {one.share:4.0%} of the experts in memory, {speed}")


def say_report(report: Report) -> None:
    """Measured beside expected, and where the time went."""
    from flashpack.performance.bench import PARTS

    rows = report.rows
    row(["memory", "experts in memory", "found there", "decoding", "estimated", "measured / estimated",
         "share of the drive's limit", f"prompt of {report.prompt}", "memory taken"])  # fmt: skip
    row(["---"] * 9)
    for r in rows:
        run, share = r.run, r.drive_share
        row([
            gb(r.estimate.memory), f"{run.share:.0%}", f"{run.hit_rate:.0%}", f"{1 / run.seconds:.3g} tok/s",
            f"{1 / r.estimate.seconds:.3g} tok/s", f"{r.agreement:.2f}", "-" if share is None else f"{share:.0%}",
            f"{report.prompt / run.prompt_seconds:.3g} tok/s", gb(run.peak[0]),
        ])  # fmt: skip
    say("")
    row(["milliseconds of a token", *(gb(r.estimate.memory) for r in rows)])
    row(["---"] * (1 + len(rows)))
    for part, called in PARTS.items():
        values = [1e3 * (r.run.parts or {"parts": {}})["parts"].get(part, 0.0) for r in rows]
        if any(values):
            row([called, *(f"{value:.2f}" for value in values)])
    row(["found in the worst and the best layer", *(_range(r.run.layer_hit_rates) for r in rows)])
    c = report.forecast.computing
    say("")
    say(
        f"The memory's limit is {report.memory_limit:.3g} tok/s: {gb(c.weights)} of weights for a token at "
        f"{gb(report.forecast.memory_rate)}/s."
    )


def _range(rates: dict[int, float]) -> str:
    return f"{min(rates.values()):.0%} to {max(rates.values()):.0%}"
