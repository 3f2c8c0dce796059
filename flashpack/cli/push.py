"""flashpack push"""

from __future__ import annotations

from pathlib import Path

import typer

from flashpack.cli import loading
from flashpack.cli.bars import Bars
from flashpack.cli.card import Base, Evaluations, License, Source, quiet_hub, require_whole, sums_of, written
from flashpack.cli.console import answer_json, gb, quiet_libraries, say
from flashpack.errors import UsageError

EPILOG = """\b
Examples:
  flashpack push PACK ORG/NAME --dry-run
  flashpack push PACK ORG/NAME --base-model Qwen/Qwen3-30B-A3B --license apache-2.0"""


def push(
    pack: Path = typer.Argument(..., help="Folder of the pack."),
    repo: str = typer.Argument(..., help="Repository on the hub: ORG/NAME. It is made if it is not there."),
    private: bool = typer.Option(False, help="A repository that is made is private."),
    revision: str | None = typer.Option(None, help="Branch to send to; made if it is not there. Default: main."),
    card: Path | None = typer.Option(None, help="File of your own to send as the card, in place of a generated one."),
    base_model: Base = None,
    license: License = None,
    source: Source = None,
    evaluations: Evaluations = [],  # noqa: B006 - typer copies it
    overwrite: bool = typer.Option(False, help="Replace another pack that is there."),
    dry_run: bool = typer.Option(False, help="Verify, say what would be sent, and send nothing."),
    json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Send a pack to a Hugging Face hub, with a model card. Run again after an interruption to continue.

    The pack is verified before, every byte; the repository gets it whole with one commit, or not at all. Who you are
    is huggingface_hub's affair: 'hf auth login', or HF_TOKEN.
    """
    quiet_libraries(source or "" if dry_run else "hf://")
    opened = loading.opened(pack)
    from flashpack.hub.push import check_name
    from flashpack.hub.push import push as run_push

    name = check_name(repo)
    text = None if card is None else _text(card)
    require_whole(pack, "nothing was sent")
    sums = sums_of(opened)
    if text is None:
        text = written(opened, sums, name, base_model, license, source, evaluations)
    if dry_run:
        size = sum((pack / path).stat().st_size for path in sums)
        if json:
            answer_json({"repo": name, "identity": opened.identity, "files": sums, "bytes": size, "card": text})
        else:
            say(f"{pack}: whole; {len(sums)} files, {gb(size)}, and a card would go to {name}")
            say(f"  identity {opened.identity}")
        return
    quiet_hub()
    with Bars() as bars:
        done = run_push(
            opened, name, sums, text, card is not None, private, revision, overwrite, bars.begin, bars.advance
        )
    if json:
        answer_json(done.to_json())
    else:
        say(f"{done.url}: {done.files} files, {gb(done.bytes)}, commit {done.commit}")
        say(f"  identity {done.identity}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"--card {path}: cannot be read as text: {getattr(e, 'strerror', None) or e}") from e
