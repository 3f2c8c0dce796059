"""flashpack verify"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from flashpack.cli.console import answer_json, gb, note, progress_bar, quiet_libraries, say
from flashpack.errors import UsageError


def verify(
    pack: Path = typer.Argument(..., help="Folder of the pack."),
    quick: bool = typer.Option(False, help="Only structure, sizes, headers, digest tables and copied files."),
    sample: str | None = typer.Option(None, help="Also a random part of the data, for example 5%."),
    expect: str | None = typer.Option(None, help="Identity that the pack must have; any other pack is refused."),
    against: str | None = typer.Option(None, help="Checkpoint: prove that the pack is what it and the recipe give."),
    json: bool = typer.Option(False, "--json", help="Print the findings as JSON."),
) -> None:
    """Check a pack against its own checksums, without the source. Exit code 0 only if it is whole.

    With --against, every record and tensor is also made again from the source. Checksums find damage; whether a
    stranger's pack is the one you were promised, only --expect can tell.
    """
    import time

    from flashpack.formats.verify import verify as run_verify

    if quick and sample is not None:
        raise UsageError("--quick and --sample: choose one")
    level = "quick" if quick else "full" if sample is None else "sample"
    share = 1.0 if sample is None else _share(sample)
    begun = time.monotonic()
    bar: Any = None
    total = 0

    def start(size: int) -> None:
        nonlocal bar, total
        total += size
        if bar is not None:
            bar.close()
        bar = progress_bar(size, "verifying" if bar is None else "remaking")

    try:
        findings = run_verify(pack, level, share, expect, start, lambda n: bar.update(n))
        if against is not None and not findings:
            quiet_libraries(against)
            from flashpack.converter.against import against as run_against

            findings = run_against(pack, against, start, lambda n: bar.update(n))
    finally:
        if bar is not None:
            bar.close()
    seconds = time.monotonic() - begun
    if json:
        found = [f.to_json() for f in findings]
        answer_json({"pack": str(pack), "level": level, "checked_bytes": total, "findings": found})
    else:
        for finding in findings:
            say(f"[{finding.code}] {finding}")
        if findings:
            say(f"{pack}: {len(findings)} finding{'s' if len(findings) > 1 else ''}")
            note(f"repair it from another copy or from its source: flashpack repair {pack} --from COPY")
        elif against is not None:
            from flashpack.converter.folder import shown

            say(f"{pack}: whole ({level}), and what {shown(against)} and its recipe give; {seconds:.1f} s")
        elif quick:
            say(f"{pack}: structure is whole (file sizes, headers, digest tables, copied files; data not read)")
        elif level == "sample":
            say(f"{pack}: structure is whole, and {gb(total)} of data taken at random; {seconds:.1f} s")
        else:
            say(f"{pack}: whole; {gb(total)} checked in {seconds:.1f} s")
    if findings:
        raise typer.Exit(1)


def _share(text: str) -> float:
    """0.05 of "5%"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
    if not match or not 0 < float(match[1]) <= 100:
        raise UsageError(f"--sample {text}: write a part of the data, for example 5%")
    return float(match[1]) / 100
