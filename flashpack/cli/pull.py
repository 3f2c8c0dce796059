"""flashpack pull"""

from __future__ import annotations

from pathlib import Path

import typer

from flashpack.cli.bars import Bars
from flashpack.cli.card import quiet_hub
from flashpack.cli.console import answer_json, gb, quiet_libraries, say

EPILOG = """\b
Examples:
  flashpack pull ORG/NAME
  flashpack pull ORG/NAME@REVISION OUT --expect IDENTITY"""


def pull(
    source: str = typer.Argument(..., help="Repository on the hub: ORG/NAME or ORG/NAME@REVISION."),
    out: Path | None = typer.Argument(None, help="Folder of the pack. Default: ./NAME.flashpack"),
    expect: str | None = typer.Option(None, help="Identity that the pack must have; any other pack is refused."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Get a pack from a Hugging Face hub, and prove it whole. Run again after an interruption to continue.

    Only what the manifest lists is fetched. The folder appears under its name when every byte has been compared with
    the pack's checksums; whether it is the pack you were promised, only --expect can tell.
    """
    quiet_libraries("hf://")
    from flashpack.hub.pull import pull as run_pull

    quiet_hub()
    with Bars() as bars:
        done = run_pull(source, out, expect, bars.begin, bars.advance)
    if json:
        answer_json(done.to_json())
    else:
        say(f"{done.pack}: whole, {gb(done.bytes)}, commit {done.commit}")
        say(f"  identity {done.identity}")
