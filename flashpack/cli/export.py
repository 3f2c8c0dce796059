"""flashpack export"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from flashpack.cli.console import answer_json, gb, progress_bar, quiet_libraries, say


def export(
    pack: Path = typer.Argument(..., help="Folder of the pack."),
    out: Path = typer.Argument(..., help="Folder of the export, which must not exist yet."),
    to: str = typer.Option(..., "--to", help="hf (transformers, vLLM), mlx (mlx-lm) or flash-moe."),
    weights: str | None = typer.Option(
        None, help="hf: bf16, or compressed (compressed-tensors, without rounding). Default: the target's first."
    ),
    shard_size: str = typer.Option("5GB", help="A safetensors file ends before it is larger."),
    overwrite: bool = typer.Option(False, help="Replace an earlier export."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Write a pack as a checkpoint of another engine. No source is needed; what the export loses is named."""
    quiet_libraries()
    from flashpack.export import export as run_export
    from flashpack.runtime.memory import parse_size

    bar: Any = None

    def start(size: int) -> None:
        nonlocal bar
        bar = progress_bar(size, "exporting")

    try:
        done = run_export(
            pack, out, to, weights, parse_size(shard_size), overwrite, start, lambda count: bar.update(count)
        )
    finally:
        if bar is not None:
            bar.close()
    if json:
        answer_json(done.to_json())
        return
    say(f"{done.out}: {gb(sum(done.files.values()))} in {len(done.files)} files, for {done.to}")
    for loss in done.losses:
        say(f"  lost: {loss}")
    if not done.losses:
        say("  nothing was lost")
