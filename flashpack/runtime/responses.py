"""What a model says, apart: thoughts, the answer, calls of tools. Parsed while it comes, by transformers' parser.

The formats are those of known chat templates, chosen by what stands in the template. A pack may bring patterns of its
own; these are not used, for a stranger's regular expression can take for ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers.utils.chat_parsing import ResponseParser

_ANCHOR = "\0"  # what the template has written of the answer follows it
_THINK = {"open": "<think>", "close": "</think>", "content": "text", "optional": True}
_CONTENT: dict[str, Any] = {"content": "text", "optional": True}
_TOOLS = {"open": "<tool_call>", "close": "</tool_call>", "repeats": True, "content": "text", "optional": True}
_HARMONY = {
    "reasoning": {**_THINK, "open": "<|channel|>analysis<|message|>", "close": "<|end|>"},
    "tool_calls": {
        **_TOOLS,
        "open": "<|channel|>commentary to=functions.",
        "close": ["<|call|>", "<|end|>"],
    },
    "other": {"open": "<|start|>", "close": "assistant", "content": "text", "repeats": True, "optional": True},
    "content": {"open": "<|channel|>final<|message|>", "close": ["<|end|>", "<|return|>"], **_CONTENT},
}


@dataclass(frozen=True)
class Event:
    """A piece of the answer. ``kind`` "content" and "reasoning" carry ``text``, "tool_call" ``name`` and
    ``arguments`` (JSON)."""

    kind: Literal["content", "reasoning", "tool_call"]
    text: str = ""
    name: str = ""
    arguments: str = ""


class Response:
    """An answer while it comes. ``template``: the chat template; ``opening``: what it wrote of the answer; ``tools``:
    what may be called: without them, a call is text like any other.

    ``content``, ``reasoning`` and ``calls`` hold what has come so far.
    """

    def __init__(self, template: str, opening: str, tools: Sequence[dict[str, Any]] = ()) -> None:
        self.content = self.reasoning = ""
        self.calls: list[Event] = []
        self._properties = {t["function"]["name"]: t["function"].get("parameters") or {} for t in tools}
        fields = _fields(template, bool(tools))
        thought = opening.find("<think>")
        prefix = _ANCHOR + (opening[thought:].rstrip() if thought >= 0 else "")
        self._call, self._ends = "", False
        self._parser = ResponseParser({"start_anchor": _ANCHOR, "fields": fields}, prefix=prefix, tools=list(tools))
        self._events(self._parser.initial_events)
        self.content = self.reasoning = ""  # of the template

    def feed(self, text: str) -> list[Event]:
        """The next piece of the text."""
        return self._events(self._parser.feed(text))

    def finish(self) -> list[Event]:
        """There is no more: what was held back."""
        self._ends = True
        return self._events(self._parser.finalize()[1])

    def message(self) -> dict[str, Any]:
        """The whole as a message of the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in self.calls
            ]
        return message

    def _events(self, parsed: list[dict[str, Any]]) -> list[Event]:
        made = []
        for one in parsed:
            field, kind = one["field"], one["type"]
            if field == "tool_calls":
                if kind == "region_chunk":
                    self._call += one["text"]
                elif kind == "region_close":
                    made.append(self._called(self._call))
                    self._call = ""
            elif kind == "region_chunk" and field in ("content", "reasoning"):
                text = one["text"]
                if not getattr(self, field):
                    text = text.lstrip("\n")  # which separates it from what came before
                if text:
                    made.append(Event(field, text))
                    setattr(self, field, getattr(self, field) + text)
        return made

    def _called(self, text: str) -> Event:
        """The call in ``text``; as content if it is none."""
        call = _json_call(text) or self._tagged_call(text) or _harmony_call(text)
        if call is None:
            event = Event("content", f"<tool_call>{text}{'' if self._ends else '</tool_call>'}")
            self.content += event.text
        else:
            event = Event("tool_call", name=call[0], arguments=json.dumps(call[1], ensure_ascii=False))
            self.calls.append(event)
        return event

    def _tagged_call(self, text: str) -> tuple[str, Any] | None:
        """<function=NAME><parameter=KEY>VALUE</parameter></function>, values by the type that the tool says."""
        found = re.search(r"<function=([^>\n]+)>(.*)</function>", text, re.DOTALL)
        if not found:
            return None
        given = self._properties.get(found[1], {}).get("properties")
        schemas = given if isinstance(given, dict) else {}
        kinds = {key: one.get("type") for key, one in schemas.items() if isinstance(one, dict)}  # or true: anything
        values = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", found[2], re.DOTALL)
        return found[1], {key: _typed(value, kinds.get(key)) for key, value in values}


def _fields(template: str, tools: bool) -> dict[str, Any]:
    if "<|channel|>" in template:
        return _HARMONY
    fields = {"reasoning": _THINK} if "<think>" in template else {}
    # A template that does not show tools is of a model that learned to call in the most common way.
    return {**fields, **({"tool_calls": _TOOLS} if tools else {}), "content": _CONTENT}


def _loads(text: str) -> Any:
    """What JSON says; ``ValueError`` also for what Python reads but nobody can send on: NaN, half a character."""
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


def _json_call(text: str) -> tuple[str, Any] | None:
    try:
        call = _loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    return call["name"], call.get("arguments", call.get("parameters", {}))


def _harmony_call(text: str) -> tuple[str, Any] | None:
    """NAME <|constrain|>json<|message|>ARGUMENTS"""
    head, found, body = text.partition("<|message|>")
    try:
        return (head.split("<|")[0].strip(), _loads(body)) if found else None
    except (ValueError, RecursionError):
        return None


def _typed(value: str, kind: Any) -> Any:
    if kind == "string":
        return value
    try:
        return _loads(value)
    except (ValueError, RecursionError):
        return value
