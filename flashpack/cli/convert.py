"""flashpack convert"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flashpack.cli.console import answer_json, gb, note, progress_bar, quiet_libraries, say

if TYPE_CHECKING:
    from flashpack.converter import Plan, Report


def convert(
    src: Path = typer.Argument(..., help="Checkpoint folder: config.json and safetensors files."),
    out: Path | None = typer.Argument(None, help="Folder of the pack. Default: ./<name of SRC>.flashpack"),
    experts: str = typer.Option("auto", help="auto, source, q8, q6, q5, q4, q3 or q2."),
    dense: str = typer.Option("auto", help="auto, source, q8 or q4."),
    group_size: int = typer.Option(64, help="Values per scale: 32, 64 or 128."),
    codec: str = typer.Option("raw", help="raw, or zstd: each expert compressed; smaller, and slower to read."),
    dry_run: bool = typer.Option(False, help="Print the plan and write nothing."),
    overwrite: bool = typer.Option(False, help="Replace a finished or unfinished pack."),
    workers: int | None = typer.Option(None, min=1, help="Files written at once. Default: one per processor."),
    json: bool = typer.Option(False, "--json", help="Print the plan or the report as JSON."),
) -> None:
    """Convert a Hugging Face checkpoint to a pack. Run again after an interruption to continue.

    auto carries a quantized source over as it is; otherwise experts get 4 bits and the dense part 8.
    """
    quiet_libraries()
    from flashpack.converter import Options
    from flashpack.converter import convert as run_convert
    from flashpack.converter import plan as make_plan

    if dry_run:
        plan = make_plan(src, Options(experts, dense, group_size, codec))
        if json:
            answer_json(_plan_json(plan))
        else:
            _print_plan(plan)
        return
    bar: Any = None

    def begin(plan: Plan, done: int) -> None:
        nonlocal bar
        total = sum(plan.source_bytes().values())
        note(f"{plan.model['architecture']}: {_choice(plan)}, {gb(sum(plan.file_sizes().values()))} to write")
        for text in plan.notices:
            note(f"note: {text}")
        if done:
            note(f"continuing: {gb(done)} of {gb(total)} done before")
        bar = progress_bar(total, "converting", done)

    try:
        report = run_convert(
            src, out, experts, dense, group_size, codec, overwrite, workers, begin, lambda n: bar.update(n)
        )
    finally:
        if bar is not None:
            bar.close()
    if json:
        answer_json(report.to_json())
    else:
        _print_report(report)


def _choice(plan: Plan) -> str:
    return f"experts {plan.recipe['experts']}, dense {plan.recipe['dense']} (source: {plan.source_format})"


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "model": plan.model,
        "recipe": plan.recipe,
        "source_bytes": sum(plan.source_bytes().values()),
        "files": plan.file_sizes(),
        "record_kinds": [k.to_json() for k in plan.kinds],
        "layers": [p.layer.to_json() for p in plan.layers],
        "tensors": {t.name: str(t.encoding) for t in plan.dense()},
        "dropped": plan.dropped,
        "notices": plan.notices,
    }


def _print_plan(plan: Plan) -> None:
    sizes = plan.file_sizes()
    say(f"{plan.model['architecture']}: {_choice(plan)}")
    for i, kind in enumerate(plan.kinds):
        layers = [p for p in plan.layers if p.kind == kind]
        count = sum(p.layer.experts for p in layers)
        shapes = ", ".join(f"{p.name} {p.shape[0]}x{p.shape[1]} {p.encoding}" for p in kind.projections)
        say(f"record kind {i}: {count} experts in {len(layers)} layers, {gb(kind.stride)} each: {shapes}")
    by_encoding: dict[str, int] = {}
    for t in plan.dense():
        by_encoding[str(t.encoding)] = by_encoding.get(str(t.encoding), 0) + sum(s.nbytes for s in t.specs())
    for encoding, size in by_encoding.items():
        say(f"dense {encoding}: {gb(size)}")
    for path, size in sizes.items():
        say(f"{size:>16,}  {path}")
    say(f"{sum(sizes.values()):>16,}  bytes in all, from {sum(plan.source_bytes().values()):,} of the source")
    for text in plan.notices:
        say(f"note: {text}")
    for name in plan.dropped:
        say(f"dropped: {name}")


def _print_report(report: Report) -> None:
    ratio = report.pack_bytes / report.source_bytes
    say(f"{report.pack}: {gb(report.pack_bytes)} from {gb(report.source_bytes)} ({ratio:.0%})")
    say(f"  experts {gb(report.expert_bytes)} at {report.expert_bits:.2f} bits per weight")
    say(f"  dense   {gb(report.dense_bytes)} at {report.dense_bits:.2f} bits per weight")
    if report.errors:
        say("  relative quantization error (largest and mean over the matrices of a file)")
        for e in report.errors:
            say(f"    {e.path:<40} {e.largest:.4f}  {e.mean:.4f}")
    if report.dropped:
        say(f"  {len(report.dropped)} tensors of the source are no part of the language model (--dry-run lists them)")
    done = report.source_bytes - report.resumed_bytes
    rate = f", {gb(done / report.seconds)} of source per second" if done and report.seconds > 0 else ""
    say(f"  {report.seconds:.1f} s{rate}")
    say(f"  identity {report.identity}")
