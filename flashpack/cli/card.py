"""flashpack card"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashpack.cli import loading
from flashpack.cli.bars import Bars
from flashpack.cli.console import note, quiet_libraries

if TYPE_CHECKING:
    from flashpack.formats import Pack

Base = Annotated[
    str | None, typer.Option("--base-model", help="ORG/MODEL[@REVISION] that the pack was made of, as hubs know it.")
]
License = Annotated[str | None, typer.Option(help="The model's license, as hubs name it, for example apache-2.0.")]
Source = Annotated[
    str | None,
    typer.Option(help="The checkpoint, folder or hf://..., to look up license, revision and what was left out."),
]
Evaluations = Annotated[
    list[Path], typer.Option("--eval", help="Output of flashpack eval --json; its name is the text's. Repeatable.")
]


EPILOG = """\b
Examples:
  flashpack card PACK ORG/NAME --base-model ORG/MODEL > card.md"""


def card(
    pack: Path = typer.Argument(..., help="Folder of the pack."),
    repo: str | None = typer.Argument(None, help="Where it will be, ORG/NAME; for its title and the commands."),
    base_model: Base = None,
    license: License = None,
    source: Source = None,
    evaluations: Evaluations = [],  # noqa: B006 - typer copies it
) -> None:
    """Print a model card for a pack. Base model, recipe, sizes, quality, checksums, and how to run it.

    Reads the whole pack, to verify it and for the checksums. The card is no part of a pack: keep it elsewhere, or let
    push send it.
    """
    quiet_libraries(source or "")
    opened = loading.opened(pack)
    from flashpack.hub.push import check_name

    name = None if repo is None else check_name(repo)
    require_whole(pack, "there is no card for it")
    print(written(opened, sums_of(opened), name, base_model, license, source, evaluations), end="")


def require_whole(pack: Path, otherwise: str) -> None:
    """Verify every byte; with findings, list them and say what becomes of it: exit code 1."""
    from flashpack.formats.verify import verify

    with Bars() as bars:
        findings = verify(pack, on_start=lambda total: bars.begin("verifying", total), progress=bars.advance)
    for finding in findings:
        note(f"[{finding.code}] {finding}")
    if findings:
        count = f"{len(findings)} finding{'s' if len(findings) > 1 else ''}"
        note(f"flashpack: {pack}: {count}, {otherwise}; see flashpack repair")
        raise typer.Exit(1)


def quiet_hub() -> None:
    """Keep what huggingface_hub logs, signed addresses among it, and its bars where nobody sees them, out of stderr."""
    import logging

    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()


def sums_of(pack: Pack) -> dict[str, str]:
    """The checksums of all files, with a bar."""
    from flashpack.hub.card import checksums

    with Bars() as bars:
        bars.begin("checksums", sum(entry.size for entry in pack.files.values()))
        return checksums(pack, bars.advance)


def written(
    pack: Pack,
    sums: dict[str, str],
    repo: str | None,
    base_model: str | None,
    license: str | None,
    source: str | None,
    evaluations: list[Path],
) -> str:
    """The card."""
    from flashpack.cli.quality import quality_lines
    from flashpack.hub.card import card, read_evaluation
    from flashpack.hub.source import describe

    found = {path.stem: read_evaluation(path) for path in evaluations}
    base = describe(base_model, license, source)
    lines = [" ".join(line.removeprefix("quality").split()) for line in quality_lines(pack)]
    weights = [line for line in lines if not line.startswith("page:")]
    return card(pack, sums, repo, base, found, weights)
