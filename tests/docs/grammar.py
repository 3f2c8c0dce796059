"""Whether a command line is one that flashpack has, without running it."""

from __future__ import annotations

import re
from typing import Any

from typer.main import get_command

from flashpack.cli import app

ROOT_COMMAND: Any = get_command(app)


def complaint(arguments: list[str]) -> str:
    """What flashpack would say against ``arguments`` before it does anything; empty if nothing."""
    name, *rest = arguments or [""]
    command = ROOT_COMMAND.commands.get(name)
    try:
        if command is None:
            with ROOT_COMMAND.make_context("flashpack", arguments, allow_extra_args=False):
                return "" if name.startswith("--") else f"no command {name!r}"
        with command.make_context(name, rest):
            return ""
    except Exception as e:
        if type(e).__name__ == "Exit":  # --help
            return ""
        if not hasattr(e, "format_message"):
            raise
        return f"{name}: {e.format_message()}"


def all_options() -> set[str]:
    """Of all commands."""
    commands = [ROOT_COMMAND, *ROOT_COMMAND.commands.values()]
    return {"--help", *(o for command in commands for o in _options(command))}


def complaint_of_mention(text: str) -> str:
    """The same for a command that is mentioned in a sentence, perhaps without its arguments: do its options exist?"""
    words = text.split()[1:]
    if not words or not re.fullmatch(r"[a-z]+", words[0]):
        return ""
    command = ROOT_COMMAND.commands.get(words[0])
    if command is None:
        return f"no command {words[0]!r}"
    known = {"--help", *_options(command)}
    return "".join(
        f"{words[0]}: no option {w}" for w in words[1:] if w.startswith("--") and w.split("=")[0] not in known
    )


def _options(command: Any) -> list[str]:
    return [o for p in command.params for o in (*p.opts, *p.secondary_opts)]
