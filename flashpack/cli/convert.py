"""flashpack convert"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flashpack.cli import recipe
from flashpack.cli.console import answer_json, gb, note, progress_bar, quiet_libraries, say
from flashpack.cli.plan import choice, show

if TYPE_CHECKING:
    from flashpack.converter import Plan, Report
    from flashpack.converter.units import Progress


def convert(
    src: str = typer.Argument(
        ..., help="Checkpoint: a folder, a GGUF file, hf://org/model[@revision], or the URL of a folder."
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
    dry_run: bool = typer.Option(False, help="Print the plan and write nothing, as flashpack plan does."),
    overwrite: bool = typer.Option(False, help="Replace a finished or unfinished pack."),
    workers: recipe.Workers = None,
    scheduler: str | None = typer.Option(
        None, help="Let a Dask cluster do the work: tcp://HOST:PORT of its scheduler. SRC and OUT on shared storage."
    ),
    json: bool = typer.Option(False, "--json", help="Print the plan or the report as JSON."),
) -> None:
    """Convert a Hugging Face checkpoint to a pack. Run again after an interruption to continue.

    auto carries a quantized source over as it is; otherwise experts get 4 bits and the dense part 8.
    """
    quiet_libraries(src)
    from flashpack.runtime.memory import parse_size

    if dry_run:
        show(
            src,
            out,
            (experts, dense, group_size, codec, quality, calib, bpw, parse_size(calib_memory)),
            overwrite,
            workers,
            json,
        )
        return
    from flashpack.converter import convert as run_convert
    from flashpack.converter.elsewhere import scheduler as cluster

    bar: Any = None

    def begin(plan: Plan, done: int) -> None:
        nonlocal bar
        total = sum(plan.source_bytes().values())
        note(f"{plan.model['architecture']}: {choice(plan)}, {gb(sum(plan.file_sizes().values()))} to write")
        for text in plan.notices:
            note(f"note: {text}")
        if done:
            note(f"continuing: {gb(done)} of {gb(total)} done before")
        if bar is not None:
            bar.close()
        bar = progress_bar(total, "converting", done)

    def choosing(total: int) -> Progress:
        nonlocal bar
        bar = progress_bar(total, "choosing widths")
        return advance

    def advance(count: int) -> None:
        bar.update(count)

    try:
        with cluster(scheduler) if scheduler else contextlib.nullcontext() as executor:
            report = run_convert(
                src,
                out,
                experts,
                dense,
                group_size,
                codec,
                overwrite,
                workers,
                begin,
                advance,
                executor,
                quality,
                calib,
                bpw,
                choosing,
                parse_size(calib_memory),
            )
    finally:
        if bar is not None:
            bar.close()
    if json:
        answer_json(report.to_json())
    else:
        _print_report(report)


def _print_report(report: Report) -> None:
    ratio = report.pack_bytes / report.source_bytes
    say(f"{report.pack}: {gb(report.pack_bytes)} from {gb(report.source_bytes)} ({ratio:.0%})")
    say(f"  experts {gb(report.expert_bytes)} at {report.expert_bits:.2f} bits per weight")
    say(f"  dense   {gb(report.dense_bytes)} at {report.dense_bits:.2f} bits per weight")
    if report.errors:
        say("  relative quantization error (largest and mean over the matrices of a file)")
        for e in report.errors:
            say(f"    {e.path:<40} {e.largest:.4f}  {e.mean:.4f}")
    if report.uncalibrated is not None:
        few = f", but for {report.uncalibrated} that saw too few tokens" if report.uncalibrated else ""
        say(f"  experts are calibrated{few}; the quality report has the errors of what they give")
    if report.dropped:
        say(f"  {len(report.dropped)} tensors of the source are not in the pack (flashpack plan lists them)")
    done = report.source_bytes - report.resumed_bytes
    rate = f", {gb(done / report.seconds)} of source per second" if done and report.seconds > 0 else ""
    say(f"  {report.seconds:.1f} s{rate}")
    say(f"  identity {report.identity}")
    say(f"  quality report {report.quality}")
