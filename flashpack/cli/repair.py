"""flashpack repair"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from flashpack.cli.console import answer_json, note, progress_bar, quiet_libraries, say


def repair(
    pack: Path = typer.Argument(..., help="Folder of the damaged pack."),
    source: str = typer.Option(
        ..., "--from", help="Another copy of the pack, or the checkpoint it was made from; folder, URL or hf://..."
    ),
    expect: str | None = typer.Option(None, help="Identity of the pack, where its manifest is damaged, too."),
    json: bool = typer.Option(False, "--json", help="Print what was done as JSON."),
) -> None:
    """Mend damaged or missing parts of a pack. Every part is proven against the pack's own digests.

    From a checkpoint, parts are made again by the pack's recipe. A mended file takes the place of the damaged one only
    when it is complete; if nothing helps, nothing changes. Exit code 0 only if the pack is whole afterwards.
    """
    quiet_libraries(source)
    from flashpack.converter import repair as run_repair
    from flashpack.converter.folder import shown

    bar: Any = None

    def start(size: int) -> None:
        nonlocal bar
        bar = progress_bar(size, "checking")

    try:
        done = run_repair(pack, source, expect, start, lambda n: bar.update(n))
    finally:
        if bar is not None:
            bar.close()
    if json:
        left = [f.to_json() for f in done.findings]
        answer_json({"pack": str(pack), "mended": done.files, "pieces": done.pieces, "findings": left})
    else:
        for path in done.files:
            say(f"mended {path}")
        for finding in done.findings:
            say(f"[{finding.code}] {finding}")
        if done.findings:
            say(f"{pack}: {len(done.files)} files mended, {len(done.findings)} findings left")
        elif done.files:
            say(f"{pack}: whole again; {done.pieces} parts taken from {shown(source)}")
        else:
            note("nothing was damaged")
            say(f"{pack}: whole")
    if done.findings:
        raise typer.Exit(1)
