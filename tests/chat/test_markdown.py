"""Markdown that is drawn while it comes, looked at through a small terminal."""

from __future__ import annotations

import re

import pytest

from flashpack.chat import markdown
from flashpack.chat.markdown import Drawing

TEXT = """# Title

A paragraph with **bold** words that is long enough to be wrapped more than once on a narrow screen.

- one
- two
  - three

```python
def f():

    return 1
```

| a | b |
|---|---|
| 1 | 2 |

The end.
"""


class Terminal:
    """Lines, a cursor, and a screen of which only ``rows`` can be reached."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines = [""]
        self.written = 0

    def write(self, text: str) -> None:
        self.written += len(text)
        for part in re.split(r"(\n|\x1b\[\d*[A-Za-z]|\r)", re.sub(r"\x1b\[[\d;]*m", "", text)):
            if part == "\n":
                self.lines.append("")
            elif part.endswith("A") and part.startswith("\x1b["):
                up = int(part[2:-1])
                assert up < self.rows, "the cursor would leave the screen"
                assert not self.lines[-1]
                self._up = up
            elif part == "\x1b[J":
                del self.lines[len(self.lines) - 1 - self._up :]
                self.lines.append("")
            elif part != "\r":
                assert "\x1b" not in part
                self.lines[-1] += part
                assert len(self.lines[-1]) < self.columns


def drawn(text: str, columns: int, rows: int, step: int) -> Terminal:
    terminal = Terminal(columns, rows)
    drawing = Drawing(terminal.write, lambda: (terminal.columns, terminal.rows))
    for at in range(0, len(text), step):
        drawing.feed(text[at : at + step])
    drawing.finish()
    return terminal


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "PAUSE", 0.0)


@pytest.mark.parametrize("columns", [24, 80])
def test_pieces_give_what_the_whole_gives(columns: int) -> None:
    whole = drawn(TEXT, columns, 50, len(TEXT)).lines
    assert drawn(TEXT, columns, 50, 1).lines == whole
    assert drawn(TEXT, columns, 50, 7).lines == whole
    shown = "\n".join(whole)
    assert "**" not in shown
    assert "```" not in shown
    assert "return 1" in shown
    assert shown.rstrip().endswith("The end.")


def test_an_answer_taller_than_the_screen_is_whole() -> None:
    text = "\n".join(f"line {i}  " for i in range(40))
    lines = drawn(text, 40, 5, 3).lines
    assert [line.strip() for line in lines if line] == [f"line {i}" for i in range(40)]


def test_what_has_left_the_screen_stays_as_it_is() -> None:
    """A late row makes all columns of a table wider."""
    rows = "".join(f"| {i} | b |\n" for i in range(12))
    lines = drawn(f"| a | b |\n|---|---|\n{rows}| a much wider cell | b |\n", 60, 6, 4).lines
    shown = "\n".join(lines)
    assert "a much wider cell" in shown
    assert all(str(i) in shown for i in range(12))


def test_finished_blocks_are_not_written_again() -> None:
    text = "word " * 10 + "\n\n"
    few, many = drawn(text * 10, 60, 20, 5).written, drawn(text * 40, 60, 20, 5).written
    assert many < 5 * few


def test_a_resized_terminal_gets_the_block_again() -> None:
    terminal = Terminal(80, 20)
    drawing = Drawing(terminal.write, lambda: (terminal.columns, terminal.rows))
    drawing.feed("some words that come before " * 2)
    terminal.lines.append("")
    terminal.columns = 40
    drawing.feed("and after")
    drawing.finish()
    assert "after" in "\n".join(terminal.lines)


def test_character_references_command_nothing() -> None:
    assert "\r" not in "".join(drawn("a&#13;b&#12;c&#27;[2Jd", 60, 20, 30).lines)


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out: list[str] = []
    drawing = Drawing(out.append, lambda: (80, 24))
    drawing.feed("`code` **bold**\n\n```python\nx = 1\n```\n")
    drawing.finish()
    codes = {code for found in re.findall(r"\x1b\[([\d;]*)m", "".join(out)) for code in found.split(";")}
    assert not any(code.startswith(("3", "4", "9", "10")) and len(code) > 1 for code in codes), codes
