"""flashpack plan"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flashpack.cli import loading, plan_pack, recipe, speeds
from flashpack.cli.console import answer_json, gb, quiet_libraries, say
from flashpack.errors import FlashpackError, LimitError, OutputError, UsageError

if TYPE_CHECKING:
    from flashpack.converter import Plan
    from flashpack.converter.forecast import Forecast
    from flashpack.performance.roofline import Roofline
    from flashpack.runtime.budget import Budget

_Choices = tuple[str, str, int, str, str, str, str, int]
"""The fields of ``Options``."""


def plan(
    ctx: typer.Context,
    src: str = typer.Argument(
        ..., help="Checkpoint: a folder, hf://org/model[@revision], or the URL of a folder. Or a pack."
    ),
    out: Path | None = typer.Argument(None, help="Folder of the pack. Default: ./<name of SRC>.flashpack"),
    experts: recipe.Experts = "auto",
    dense: recipe.Dense = "auto",
    group_size: recipe.GroupSize = 64,
    codec: recipe.Codec = "raw",
    quality: recipe.Quality = "default",
    calib: recipe.Calib = "",
    bpw: recipe.BitsPerWeight = "",
    calib_memory: recipe.CalibMemory = "4GB",
    overwrite: bool = typer.Option(False, help="As if a pack that is there were replaced."),
    workers: recipe.Workers = None,
    memory: list[str] = typer.Option([], help="Memory to run it with: 6GB or 6GiB; repeatable. Default: some sizes."),
    context: loading.Context = None,
    trace: Path | None = typer.Option(None, help="Of a pack: recorded routing (flashpack trace), for hit rates."),
    json: bool = typer.Option(False, "--json", help="Print everything as JSON, with all dropped tensors."),
) -> None:
    """Show what convert would do, and whether it fits and how fast it will run. From headers only: sizes for each
    option, memory, disk. Of a pack: how fast it decodes with how much memory, measured for some seconds.

    Ends with 0 if the pack can be made and run here, with 6 if the disk is too small, with 7 if the memory is.
    """
    quiet_libraries(src)
    from flashpack.formats import constants
    from flashpack.runtime.memory import parse_size

    if (Path(src) / constants.MANIFEST).is_file():
        odd = sorted(name for name, value in ctx.params.items() if name not in _OF_PACKS and _given(ctx, name))
        if odd:
            name = "OUT" if odd[0] == "out" else f"--{odd[0].replace('_', '-')}"
            raise UsageError(f"{src} is a pack: {name} is for checkpoints")
        plan_pack.show(Path(src), memory, context, trace, json)
        return
    if trace is not None:
        raise UsageError("--trace is for packs: convert first")
    choices = (experts, dense, group_size, codec, quality, calib, bpw, parse_size(calib_memory))
    show(src, out, choices, overwrite, workers, json, speeds.sizes(memory), context)


_OF_PACKS = ("src", "memory", "context", "trace", "json")


def _given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@dataclass(frozen=True)
class _Here:
    """What this machine adds. Bytes. ``run`` is None where the runtime refuses the model, for the ``reason``."""

    forecast: Forecast
    process: int
    available: int
    run: Budget | None
    context: int
    reason: str
    roofline: Roofline | None

    @property
    def peak(self) -> int:
        return self.process + self.forecast.working_bytes

    @property
    def fits(self) -> dict[str, bool]:
        """By what is needed. The process is there already; what it takes is not in ``available``."""
        return {
            "disk": self.forecast.fits_disk,
            "memory_to_convert": self.forecast.working_bytes <= self.available,
            "memory_to_run": self.run is not None and self.run.total - self.run.base <= self.available,
        }


def show(
    src: str,
    out: Path | None,
    options: _Choices,
    overwrite: bool,
    workers: int | None,
    json: bool,
    memory: list[int] | None = None,
    context: int | None = None,
) -> None:
    """Print the plan; ``memory``: totals to run with. Raises ``typer.Exit`` with the code of what does not fit."""
    here = _look(src, out, options, overwrite, workers, memory or [], context)
    if json:
        answer_json(_to_json(here))
    else:
        _print(here)
    if not here.fits["disk"]:
        raise typer.Exit(OutputError.exit_code)
    if not all(here.fits.values()):
        raise typer.Exit(LimitError.exit_code)


def _look(
    src: str,
    out: Path | None,
    options: _Choices,
    overwrite: bool,
    workers: int | None,
    memory: list[int],
    context: int | None,
) -> _Here:
    from flashpack.converter import Options
    from flashpack.converter.convert import bound, default_out
    from flashpack.converter.execute import default_workers
    from flashpack.converter.folder import is_remote
    from flashpack.runtime.memory import available, spare, usage

    chosen = Options(*options)
    source = bound(src)
    # These take seconds to import: a source that is none is said before.
    from flashpack.converter.forecast import forecast
    from flashpack.performance.roofline import roofline, weights_of
    from flashpack.runtime.forecast import smallest_budget

    try:
        told = forecast(
            source, chosen, out or default_out(src), overwrite, workers or default_workers(), is_remote(src)
        )
    finally:
        source.checkpoint.folder.close()
    used = usage()
    strides: dict[int, int] = {}
    for p in told.plan.layers:
        for kind in p.kinds:
            strides[kind.stride] = strides.get(kind.stride, 0) + 1
    run, tokens, reason, fast = None, 0, "", None
    compressed = chosen.codec != "raw"
    try:
        run, tokens = smallest_budget(
            source.model, source.sites, strides, told.chosen.dense_bytes, compressed, used.anonymous, context
        )
    except UsageError:
        raise  # of --context
    except FlashpackError as e:
        reason = str(e)
    if run is not None and not told.remote:
        files = sorted({Path(src) / extent.path for extent in source.checkpoint.stored.values()})
        fast = roofline(weights_of(told.plan, source.model), files, run, run.base + spare(), memory)
    return _Here(told, used.anonymous + used.file, available(), run, tokens, reason, fast)


def _to_json(here: _Here) -> dict[str, Any]:
    told = here.forecast
    plan = told.plan
    return {
        "model": plan.model,
        "recipe": plan.recipe,
        "source_format": plan.source_format,
        "source_bytes": told.read_bytes,
        "pack_bytes": told.chosen.pack_bytes,
        "files": plan.file_sizes(),
        "record_kinds": [k.to_json() for k in plan.kinds],
        "layers": [p.layer.to_json() for p in plan.layers],
        "tensors": {t.name: str(t.encoding) for t in plan.dense()},
        **told.to_json(),
        "peak_memory": here.peak,
        "memory_available": here.available,
        "smallest_run": None if here.run is None else here.run.to_json() | {"context": here.context},
        "run_refused": here.reason or None,
        "roofline": None if here.roofline is None else here.roofline.to_json(),
        "fits": here.fits,
        "dropped": list(plan.dropped),
        "notices": plan.notices,
    }


def _print(here: _Here) -> None:
    told = here.forecast
    plan, chosen = told.plan, told.chosen
    experts = sum(p.layer.experts for p in plan.layers)
    say(f"{plan.model['architecture']} ({plan.model['model_type']}): {choice(plan)}")
    say(f"{len(plan.layers)} MoE layers, {experts:,} experts, {len(plan.dense()):,} dense tensors")
    if plan.options.bpw:
        say("experts' widths: chosen when converting, which reads and measures each expert before it begins to write")
    for i, kind in enumerate([] if plan.options.bpw else plan.kinds):
        layers = [p for p in plan.layers if kind in p.kinds]
        count = sum(p.kinds.count(kind) for p in layers)
        shapes = ", ".join(f"{p.name} {p.shape[0]}x{p.shape[1]} {p.encoding}" for p in kind.projections)
        say(f"record kind {i}: {count} experts in {len(layers)} layers, {gb(kind.stride)} each: {shapes}")
    by_encoding: dict[str, int] = {}
    for t in plan.dense():
        by_encoding[str(t.encoding)] = by_encoding.get(str(t.encoding), 0) + sum(s.nbytes for s in t.specs())
    for encoding, size in by_encoding.items():
        say(f"dense {encoding}: {gb(size)}")
    _print_table(told)
    most = "at most " if plan.options.codec != "raw" else ""
    say(f"pack:            {most}{gb(chosen.pack_bytes)}, {chosen.bits:.2f} bits per weight")
    if weights := plan.rounded_weights():
        from flashpack.converter.options import cost

        seconds = cost(plan.options)
        hours = weights * seconds / 1e9 / 3600
        say(
            f"rounding:        {plan.options.quality}, about {seconds} core-seconds per 10^9 weights of the experts, "
            f"{hours:.2g} core-hours in all"
        )
    what = "to download" if told.remote else "read"
    rest = f"; {gb(told.dropped_bytes)} of the source are not read" if told.dropped_bytes else ""
    headers = f"{gb(told.header_bytes)} of headers, {gb(told.copy_bytes)} of small files"
    say(f"{what + ':':<16} {gb(told.read_bytes)} of tensors, {headers}{rest}")
    fits = here.fits
    say(f"disk:            {gb(told.disk_needed)} needed, {gb(told.disk_free)} free{_verdict(fits['disk'])}")
    say(
        f"memory, convert: at most {gb(here.peak)} with {told.workers} workers, "
        f"{gb(here.process + here.available)} there{_verdict(fits['memory_to_convert'])}"
    )
    if here.run is None:
        say(f"memory, run:     the pack will not run here: {here.reason}")
    else:
        b = here.run
        say(
            f"memory, run:     at least {gb(b.total)} (process {gb(b.base)}, dense part {gb(b.dense)}, KV cache of "
            f"{here.context} tokens {gb(b.kv)}, working space {gb(b.work)}, experts {gb(b.arena)}), "
            f"{gb(b.base + here.available)} there{_verdict(fits['memory_to_run'])}"
        )
    if here.roofline is not None:
        speeds.say_roofline(here.roofline)
    for text in plan.notices:
        say(f"note: {text}")
    for d in told.dropped:
        say(
            f"dropped: {d.pattern}"
            + (f" ({d.tensors} tensors, {gb(d.nbytes)})" if d.tensors > 1 else f" ({gb(d.nbytes)})")
        )


def _print_table(told: Forecast) -> None:
    """Experts' choices down, dense choices across; the pack that will be made has a star."""
    columns = {c.dense: c for c in told.choices}
    rows = {c.experts: c for c in told.choices}
    say("")
    wide = max(8, 1 + max(map(len, rows)))
    say(f"{'pack for':<{22 + wide}}" + "".join(f"{'dense ' + name:>18}" for name in columns))
    say(f"{'--experts, --dense':<{22 + wide}}" + "".join(f"{gb(c.dense_bytes):>18}" for c in columns.values()))
    for name, row in rows.items():
        line = f"{name:<{wide}}{gb(row.expert_bytes):>10}{row.expert_bits:>7.2f} bits"
        for c in told.choices:
            if c.experts == name:
                line += f"{gb(c.pack_bytes) + (' *' if c.chosen else '  '):>18}"
        say(line.rstrip())
    say("")


def _verdict(fits: bool) -> str:
    return "" if fits else ": DOES NOT FIT"


def choice(plan: Plan) -> str:
    """What was chosen, in words."""
    bits = f" ({plan.options.bpw} bits per weight)" if plan.options.bpw else ""
    return f"experts {plan.recipe['experts']}{bits}, dense {plan.recipe['dense']} (source: {plan.source_format})"
