"""What has been said: messages in the form of the OpenAI API, saved as JSON and loaded again."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashpack.errors import OutputError, UsageError

VERSION = 1
MOST_BYTES = 64 * 2**20
"""Of a file that is loaded."""

INTERRUPTED = "interrupted"
"""Key of an answer that was stopped, or ended at a limit: it is not what the model wanted to say."""


@dataclass
class Conversation:
    """``messages`` without the system prompt, which stands for itself."""

    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def turns(self) -> int:
        return sum(m["role"] == "user" for m in self.messages)

    def prompt(self) -> list[dict[str, Any]]:
        """All messages as a chat template gets them."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return head + [{k: v for k, v in m.items() if k != INTERRUPTED} for m in self.messages]

    def save(self, path: Path, tools: Sequence[str]) -> None:
        """Replace the file at once, with the names of the ``tools`` there were.

        Raises ``OutputError`` if it cannot be written, ``UsageError`` if another kind of file is there.
        """
        if path.exists():
            try:
                load(path)
            except UsageError as e:
                raise UsageError(f"{path} is there, and is no saved conversation; choose another name") from e
        data = {"flashpack_chat": VERSION, "system": self.system, "tools": list(tools), "messages": self.messages}
        text = json.dumps(data, ensure_ascii=False, indent=1) + "\n"
        try:
            fd, partial = tempfile.mkstemp(prefix=".", dir=path.parent)
            try:
                with open(fd, "w", encoding="utf-8") as f:
                    f.write(text)
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(partial, path)
            except BaseException:
                os.unlink(partial)
                raise
        except OSError as e:
            raise OutputError(f"{path} cannot be written: {e.strerror or e}") from e


def load(path: Path) -> tuple[Conversation, list[str]]:
    """A saved conversation, and the names of the tools it was held with; ``UsageError`` for any other file."""
    try:
        if not path.is_file():
            raise UsageError(f"{path}: {'a folder, not a file' if path.is_dir() else 'there is no such file'}")
        if path.stat().st_size > MOST_BYTES:
            raise UsageError(f"{path} is larger than {MOST_BYTES >> 20} MiB: no saved conversation")
        data = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(data, ensure_ascii=False).encode()  # halves of characters cannot be told a model
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        if isinstance(e, UsageError):
            raise
        raise UsageError(f"{path} is no saved conversation: not JSON in UTF-8") from e
    if not isinstance(data, dict) or "flashpack_chat" not in data:
        raise UsageError(f'{path} is no saved conversation: it has no "flashpack_chat"')
    if data["flashpack_chat"] != VERSION:
        raise UsageError(f"{path} was saved by another version of flashpack, which this one does not know")
    system, tools, messages = data.get("system"), data.get("tools"), data.get("messages")
    if not isinstance(system, str | None):
        raise UsageError(f"{path}: the system prompt is no text")
    if not isinstance(tools, list) or not all(isinstance(one, str) for one in tools):
        raise UsageError(f'{path}: "tools" is no list of names')
    if not isinstance(messages, list):
        raise UsageError(f'{path}: "messages" is no list')
    for number, message in enumerate(messages, 1):
        if fault := _fault(message):
            raise UsageError(f"{path}, message {number}: {fault}")
    return Conversation(system, messages), tools


def _fault(message: Any) -> str:
    """What is wrong with a message; "" if nothing is."""
    if not isinstance(message, dict):
        return "no object"
    if message.get("role") not in ("user", "assistant", "tool"):
        return "its role is not user, assistant or tool"
    if not isinstance(message.get("content"), str):
        return "its content is no text"
    if not isinstance(message.get("reasoning_content", ""), str):
        return "its reasoning_content is no text"
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        return "its tool_calls are not those of the OpenAI API"
    return ""


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return False
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, str):
        return False
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        return False
    return True
