"""What a chat shows: answers on stdout, everything else on stderr; plain text where stdout is no terminal."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

from flashpack.cli.console import gb, harmless, visible, wrapped

if TYPE_CHECKING:
    from flashpack.chat.markdown import Drawing
    from flashpack.runtime.generate import Result
    from flashpack.runtime.responses import Event

_DIM, _END = "\x1b[2m", "\x1b[0m"
_SHOWN = 300
"""Characters of a tool's result."""


class Screen:
    """The ``View`` of a chat."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        smart = os.environ.get("TERM", "dumb") != "dumb"
        self._styled = self.terminal and smart
        self._dims = sys.stderr.isatty() and smart
        self._drawing: Drawing | None = None
        self._thinking = False
        self._ended = True  # whether stdout is at the beginning of a line

    def event(self, event: Event) -> None:
        if event.kind == "reasoning":
            self._think(event.text)
        elif event.kind == "content":
            self._thought()
            self._say(event.text)
        else:
            self._close()
            self.remark(f"calls {event.name} {event.arguments}")

    def answered(self, result: Result) -> None:
        self._close()
        store, fresh = result.store, result.prompt_tokens - result.reused_tokens
        self.remark(
            f"[{result.generated_tokens} tokens, {result.generate_rate:.1f}/s; prompt {fresh} tokens read in "
            f"{result.prompt_seconds:.2f} s, {result.reused_tokens} reused; experts {store['hit_rate']:.1%} hits, "
            f"{gb(store['total']['bytes_read'])} read]"
        )

    def returned(self, name: str, result: str) -> None:
        more = f" ... ({len(result)} characters)" if len(result) > _SHOWN else ""
        self.remark(f"{name} returns {result[:_SHOWN]}{more}")

    def remark(self, text: str) -> None:
        sys.stdout.flush()
        line = wrapped(text)
        print(f"{_DIM}{line}{_END}" if self._dims else line, file=sys.stderr, flush=True)

    def failed(self) -> None:
        """An answer ended in an error."""
        self._close()

    def _think(self, text: str) -> None:
        if not self.terminal:
            return  # thoughts are no part of the answer
        if not self._thinking:
            self._thinking = True
            self._write("" if self._styled else "(thinking)\n")
        self._write(f"{_DIM}{harmless(text)}{_END}" if self._styled else harmless(text))

    def _thought(self) -> None:
        if self._thinking:
            self._thinking = False
            self._write("\n\n" if self._styled else "\n(answer)\n")

    def _say(self, text: str) -> None:
        if not self._styled:
            self._write(harmless(text) if self.terminal else text)
            self._ended = text.endswith("\n")
            return
        if self._drawing is None:
            from flashpack.chat.markdown import Drawing

            self._drawing = Drawing(self._write, self._size)
        self._drawing.feed(harmless(text))

    def _close(self) -> None:
        if self._drawing is not None:
            self._drawing.finish()
            self._drawing = None
        elif self._thinking or not self._ended:
            self._write("\n")
        self._thinking, self._ended = False, True

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    @staticmethod
    def _size() -> tuple[int, int]:
        columns, rows = shutil.get_terminal_size()
        return columns, rows


def allowed(command: str) -> bool:
    """Show the command on the terminal and ask; only a yes that is typed after the question counts."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    import termios

    sys.stdout.flush()
    termios.tcflush(sys.stdin, termios.TCIFLUSH)
    print(f"run this command? {visible(command)}\n[y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise
