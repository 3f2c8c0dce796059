"""Where the user types: line editing, history, more than one line."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent

from flashpack import user_cache
from flashpack.chat.commands import NAMES

HISTORY = "chat_history"


class _History(FileHistory):
    """Lines that cannot be written are lost, and that is no error."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError, UnicodeError):
            super().store_string(string)


def history() -> History:
    """In the user's cache folder, readable by its owner only; in memory if there is no place for it."""
    try:
        folder = user_cache.folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / HISTORY
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except (OSError, RuntimeError):  # RuntimeError: no home
        return InMemoryHistory()
    return _History(path)


def editor(kept: History | None = None, **io: Any) -> PromptSession[str]:
    """``prompt()`` of it returns what was typed; Ctrl-C raises KeyboardInterrupt, Ctrl-D EOFError.

    ``io``: prompt_toolkit's input and output, if not the terminal's.
    """
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\" and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        history=kept or history(),
        completer=WordCompleter(NAMES, sentence=True),
        complete_while_typing=False,
        **io,
    )
