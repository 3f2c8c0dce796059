"""The pages, and the blocks of commands in them."""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

REASONS = {
    "installs packages",
    "asks the internet",
    "needs a Mac",
    "needs a terminal",
    "needs a cluster",
    "needs another program",
    "takes long",
}
"""Why a block may not be run: ``<!-- not run: needs a Mac -->`` on the line before it."""

RUN = {"sh", "console", "python"}

_BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<reason>.*?) -->\n)?"
    r"^(?P<indent> *)(?P<fence>```+)(?P<language>\S*)\n(?P<text>.*?)^(?P=indent)(?P=fence)$",
    re.M | re.S,
)
_EXIT_CODE = re.compile(r"\s#\s*exit code (\d+)\s*$")


@dataclass(frozen=True)
class Command:
    """A command of the shell with its lines of continuation, the exit code that the page promises, and what the page
    shows of its output; ``where`` is ``page:line``."""

    text: str
    where: str
    exit_code: int
    shown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is that of its first line of text, ``reason`` why it is not run, or empty."""

    page: Path
    line: int
    language: str
    text: str
    reason: str

    def where(self, line: int = 0) -> str:
        """The place of the block's line ``line`` as editors understand it."""
        return f"{os.path.relpath(self.page, ROOT)}:{self.line + line}"

    def commands(self) -> list[Command]:
        """The commands of a block of the shell, and of its recording: after ``$``."""
        recorded = self.language != "sh"
        found: list[Command] = []
        lines = self.text.splitlines()
        for number, line in enumerate(lines):
            if recorded and not line.startswith("$ "):
                continue
            end = number
            while lines[end].endswith("\\"):
                end += 1
            text = "\n".join(lines[number : end + 1]).removeprefix("$ " if recorded else "")
            if (not recorded and number and lines[number - 1].endswith("\\")) or not text or text.startswith("#"):
                continue
            shown: list[str] = []
            for output in lines[end + 1 :] if recorded else []:
                if output.startswith("$ "):
                    break
                shown.append(output)
            code = _EXIT_CODE.search(text)
            found.append(Command(text, self.where(number), int(code[1]) if code else 0, tuple(shown)))
        return found


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of ``page``."""
    text = page.read_text()
    return [
        Block(
            page, text.count("\n", 0, m.start("text")) + 1, m["language"], textwrap.dedent(m["text"]), m["reason"] or ""
        )
        for m in _BLOCK.finditer(text)
    ]


def prose(page: Path) -> str:
    """``page`` without its fenced blocks."""
    return _BLOCK.sub("", page.read_text())


def calls(command: str) -> Iterator[list[str]]:
    """The arguments of each ``flashpack`` in a command of the shell."""
    lexer = shlex.shlex(command.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word and set(word) <= set("();<>|&"):
            while words and re.fullmatch(r"\w+=.*", words[0], re.S):
                words.pop(0)
            if words[:1] == ["flashpack"]:
                yield words[1:]
            # What follows a redirection is a file.
            words = [""] if set(word) & set("<>") else []
        else:
            words.append(word)
