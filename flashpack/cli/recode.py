"""flashpack recode"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from flashpack.cli.console import answer_json, gb, progress_bar, say


def recode(
    pack: Path = typer.Argument(..., help="Folder of the pack."),
    out: Path = typer.Argument(..., help="Folder of the new pack."),
    codec: str = typer.Option(..., help="raw or zstd."),
    overwrite: bool = typer.Option(False, help="Replace a finished or unfinished pack."),
    workers: int | None = typer.Option(None, min=1, help="Files written at once. Default: one per processor."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Store a pack's experts with another codec. No source is needed, nothing is lost; run again to continue.

    zstd takes less of a disk or a download; each read then costs the decoding.
    """
    from flashpack.converter.recode import recode as run_recode

    bar: Any = None

    def start(size: int) -> None:
        nonlocal bar
        bar = progress_bar(size, "recoding")

    try:
        done = run_recode(pack, out, codec, overwrite, workers, start, lambda n: bar.update(n))
    finally:
        if bar is not None:
            bar.close()
    if json:
        answer_json(done.to_json())
    else:
        share = done.after / done.before if done.before else 1
        say(f"{done.pack}: experts {gb(done.before)} -> {gb(done.after)} ({share:.1%}), codec {done.codec}")
        say(f"  identity {done.identity}")
