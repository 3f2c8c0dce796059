"""flashpack verify"""

from __future__ import annotations

from pathlib import Path

import typer

from flashpack.cli.console import answer_json, gb, progress_bar


def verify(
    pack: Path = typer.Argument(..., help="Folder of the pack."),
    quick: bool = typer.Option(False, help="Only structure, sizes, headers and digest tables."),
    json: bool = typer.Option(False, "--json", help="Print the findings as JSON."),
) -> None:
    """Check a pack against its own checksums, without the source. Exit code 0 only if it is whole."""
    import time

    from flashpack.formats.verify import bytes_to_check
    from flashpack.formats.verify import verify as run_verify

    begun = time.monotonic()
    total = bytes_to_check(pack)
    with progress_bar(total, "verifying") as bar:
        findings = run_verify(pack, "quick" if quick else "full", bar.update)
    seconds = time.monotonic() - begun
    if json:
        level = "quick" if quick else "full"
        answer_json({"pack": str(pack), "level": level, "findings": [f.to_json() for f in findings]})
    else:
        for finding in findings:
            print(f"[{finding.code}] {finding}")
        if findings:
            print(f"{pack}: {len(findings)} finding{'s' if len(findings) > 1 else ''}")
        elif quick:
            print(f"{pack}: structure is whole (file sizes, headers, digest tables; data not read)")
        else:
            print(f"{pack}: whole; {gb(total)} checked in {seconds:.1f} s")
    if findings:
        raise typer.Exit(1)
