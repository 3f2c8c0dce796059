"""flashpack doctor"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from flashpack.cli.console import answer_json, note, quiet_libraries, visible
from flashpack.version import __version__

if TYPE_CHECKING:
    from flashpack.doctor.remark import Remark

_COLORS = {"ok": typer.colors.GREEN, "note": typer.colors.YELLOW, "problem": typer.colors.RED}
_TITLES = {"machine": "This machine", "kernels": "Kernels", "disk": "Disk", "pack": "Pack"}
_WIDEST = 110
_NARROW = 64
_LEVEL, _NAME = 10, 18


def doctor(
    pack: Path | None = typer.Argument(None, help="Folder of a pack, to be looked at, too."),
    disk: Path | None = typer.Option(None, help="Folder whose drive is measured, with a temporary file of 268 MB."),
    json: bool = typer.Option(False, "--json", help="Print the findings as one JSON object."),
) -> None:
    """Look at this machine and a pack. What is there, which kernels are used, what fits, and what to do about it.

    Ends with 0 if there is no problem, with 1 if there is one. A note is worth knowing, and is no problem. With a
    pack, some of it is read for about 3 seconds to measure the drive; nothing is written.
    """
    quiet_libraries()
    from flashpack.doctor import examine

    with _Progress() as progress:
        remarks = examine(pack, disk, progress.begin)
    counts = {level: sum(f.level == level for f in remarks) for level in _COLORS}
    if json:
        answer_json({"flashpack": __version__, "counts": counts, "findings": [f.to_json() for f in remarks]})
    else:
        width = min(_WIDEST, shutil.get_terminal_size().columns)
        for line in lines(remarks, width, _colored()):
            print(line)
        if pack is None:
            note("flashpack doctor PACK looks at a pack, too; --disk FOLDER measures the drive of a folder")
    if counts["problem"]:
        raise typer.Exit(1)


def _colored() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class _Progress:
    """What is looked at, as a line on stderr that the next one replaces; silent where stderr is not a terminal."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()

    def begin(self, what: str) -> None:
        if self.shown:
            room = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{visible(f'looking at {what} ...')[:room]}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def lines(remarks: Iterable[Remark], width: int, colored: bool) -> list[str]:
    """The remarks by area, none wider than ``width`` unless a single word is."""
    found = sorted(remarks, key=lambda f: list(_TITLES).index(f.area))
    shown = []
    for area, some in groupby(found, key=lambda f: f.area):
        shown += [_TITLES[area], *(line for f in some for line in _shown(f, width, colored)), ""]
    count = {level: sum(f.level == level for f in found) for level in _COLORS}
    words = [f"{n} {level}{'s' if n != 1 else ''}" for level, n in count.items() if level != "ok" and n]
    return [*shown, ", ".join(reversed(words)) if words else "nothing to do"]


def _shown(f: Remark, width: int, colored: bool) -> list[str]:
    level = typer.style(f"{f.level:<{_LEVEL - 2}}", fg=_COLORS[f.level]) if colored else f"{f.level:<{_LEVEL - 2}}"
    text = [f.text, *([f"-> {f.todo}"] if f.todo else [])]
    if width < _NARROW:
        wrapped = [line for one in text for line in _wrapped(one, width - 4, "   " if one is not f.text else "")]
        return [f"  {level}{f.name}", *(f"    {line}" for line in wrapped)]
    room = width - _LEVEL - _NAME
    wrapped = [line for one in text for line in _wrapped(one, room, "   " if one is not f.text else "")]
    rest = [" " * (_LEVEL + _NAME) + line for line in wrapped[1:]]
    return [f"  {level}{f.name:<{_NAME - 1}} {wrapped[0]}", *rest]


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        visible(text), max(width, 16), subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
