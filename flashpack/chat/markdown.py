"""Markdown that is drawn while it comes, on a terminal.

Blocks that are finished are written once and never touched. Of the last block only those lines are written again that
have changed, and only while they are on the screen: nothing flickers, and an answer may be taller than the screen.
"""

from __future__ import annotations

import io
import itertools
import re
import time
from collections.abc import Callable

from markdown_it import MarkdownIt
from rich.console import Console
from rich.markdown import Markdown

PAUSE = 0.08
"""Seconds between two drawings."""


class Drawing:
    """Draws what ``feed`` gets through ``write``; ``size`` says columns and rows. The text must be harmless."""

    def __init__(self, write: Callable[[str], object], size: Callable[[], tuple[int, int]]) -> None:
        self._write, self._size = write, size
        self._console = Console(file=io.StringIO(), force_terminal=True, highlight=False)
        self._parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
        self._open = ""  # the text of the last block
        self._shown: list[str] = []  # its lines, as they are on the screen; the cursor is below them
        self._at = self._size()
        self._gap = False  # whether an empty line is due before the next one that is written
        self._next = 0.0

    def feed(self, text: str) -> None:
        """The next piece."""
        self._open += text
        if time.monotonic() >= self._next:
            self._draw()
            self._next = time.monotonic() + PAUSE

    def finish(self) -> None:
        """There is no more."""
        self._draw()
        self._open, self._shown = "", []

    def _draw(self) -> None:
        lines = self._open.splitlines(keepends=True)
        starts = [t.map[0] for t in self._parser.parse(self._open) if t.level == 0 and t.map and t.nesting >= 0]
        for begin, end in itertools.pairwise(starts):
            self._show("".join(lines[begin:end]))
            self._gap, self._shown = True, []
        if len(starts) > 1:
            self._open = "".join(lines[starts[-1] :])
        if starts:
            self._show(self._open)

    def _show(self, block: str) -> None:
        """Have the lines of ``block`` on the screen, in place of those of the same block before."""
        size = columns, rows = self._size()
        if size != self._at:
            self._at, self._shown = size, []  # they lie elsewhere now: the block is written once more below
        new = self._lines(block, columns)
        if self._gap and new:
            self._gap = False
            self._write("\n")
        same = 0
        while same < min(len(new), len(self._shown)) and new[same] == self._shown[same]:
            same += 1
        same = max(same, len(self._shown) - (rows - 1))  # what has left the screen stays as it is
        back = len(self._shown) - same
        if back or new[same:]:
            erase = f"\x1b[{back}A\r\x1b[J" if back else ""
            self._write(erase + "".join(line + "\n" for line in new[same:]))
        self._shown = self._shown[:same] + new[same:]

    def _lines(self, block: str, columns: int) -> list[str]:
        self._console.width = max(columns - 1, 8)
        with self._console.capture() as capture:
            self._console.print(Markdown(block, code_theme="ansi_dark", hyperlinks=False))
        # Carriage returns and the like can still come from character references.
        text = re.sub(r"[\r\x0b\x0c]", " ", capture.get())
        lines = [line.rstrip(" ") for line in text.split("\n")]
        while lines and not lines[-1]:
            lines.pop()
        return lines
