"""/v1/messages: the Anthropic API, over the same tasks."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from flashpack.runtime.generate import Result
from flashpack.runtime.responses import Event
from flashpack.runtime.sampling import Sampling
from flashpack.server.constraints import Grammars
from flashpack.server.problems import ApiError
from flashpack.server.requests import ChatRequest, Lenient, Name, Stop, parsed
from flashpack.server.worker import Done, Piece, Task


class Tool(Lenient):
    name: Name
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: Literal["custom"] | None = None


class Choice(Lenient):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Lenient):
    type: Literal["enabled", "disabled", "adaptive"]


class Message(Lenient):
    role: Literal["user", "assistant"]
    content: str | list[dict[str, Any]]


class MessagesRequest(Lenient):
    """What a client of the Anthropic API may ask."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)]
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: Annotated[list[Stop], Field(max_length=16)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None

    def task(self, base: Sampling, grammars: Grammars, switch: bool) -> Task:
        """What is to be done: as the chat request that says the same."""
        tools = [
            {"type": "function", "function": {"name": t.name, "description": t.description or "",
                                              "parameters": t.input_schema or {"type": "object"}}}
            for t in self.tools or ()
        ]  # fmt: skip
        choice = self.tool_choice or Choice(type="auto")
        chosen: Any = {"any": "required", "tool": {"type": "function", "function": {"name": choice.name or ""}}}
        system = [{"role": "system", "content": _text(self.system, "system")}] if self.system else []
        data = {
            "messages": system + [m for i, one in enumerate(self.messages) for m in _messages(one, i)],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences or None,
            "tools": tools or None,
            "tool_choice": chosen.get(choice.type, choice.type),
            "parallel_tool_calls": not choice.disable_parallel_tool_use,
        }
        if self.thinking and switch:
            data["chat_template_kwargs"] = {"enable_thinking": self.thinking.type != "disabled"}
        return parsed(ChatRequest, json.dumps(data).encode()).task(base, grammars, switch)


class Answer:
    """One answer on its way to its client."""

    def __init__(self, request: MessagesRequest, model: str) -> None:
        self._request, self._model, self._id = request, model, f"msg_{uuid.uuid4().hex[:24]}"
        self._block = -1
        self._kind = ""

    def begin(self) -> list[dict[str, Any]]:
        """The first event of a stream. How long the prompt is, the last one tells."""
        usage = {"input_tokens": 0, "output_tokens": 0}
        return [{"type": "message_start", "message": {**self._message([], None), "usage": usage}}]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """The events of a piece."""
        event = piece.event
        if event.kind == "tool_call":
            start = {**_called(event), "input": {}}
            made = self._open("tool_use", start)
            return [*made, self._delta({"type": "input_json_delta", "partial_json": event.arguments})]
        if event.kind == "reasoning":
            made = [] if self._kind == "thinking" else self._open("thinking", {"type": "thinking", "thinking": "",
                                                                              "signature": ""})  # fmt: skip
            return [*made, self._delta({"type": "thinking_delta", "thinking": event.text})]
        made = [] if self._kind == "text" else self._open("text", {"type": "text", "text": ""})
        return [*made, self._delta({"type": "text_delta", "text": event.text})]

    def end(self, done: Done) -> list[dict[str, Any]]:
        """The last events."""
        delta = {"stop_reason": _reason(done), "stop_sequence": done.stop}
        last = {"type": "message_delta", "delta": delta, "usage": _usage(done.result)}
        return [*self._close(), last, {"type": "message_stop"}]

    def whole(self, pieces: Sequence[Piece], done: Done) -> dict[str, Any]:
        """The answer in one."""
        response = done.response
        assert response is not None
        blocks: list[dict[str, Any]] = []
        if response.reasoning:
            blocks.append({"type": "thinking", "thinking": response.reasoning, "signature": ""})
        if response.content:
            blocks.append({"type": "text", "text": response.content})
        blocks += [_called(event) for event in response.calls]
        return {**self._message(blocks, _reason(done)), "stop_sequence": done.stop, "usage": _usage(done.result)}

    def _message(self, content: list[dict[str, Any]], reason: str | None) -> dict[str, Any]:
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": content,
            "stop_reason": reason, "stop_sequence": None,
        }  # fmt: skip

    def _open(self, kind: str, block: dict[str, Any]) -> list[dict[str, Any]]:
        made = self._close()
        self._block, self._kind = self._block + 1, kind
        return [*made, {"type": "content_block_start", "index": self._block, "content_block": block}]

    def _close(self) -> list[dict[str, Any]]:
        return [{"type": "content_block_stop", "index": self._block}] if self._kind else []

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._block, "delta": delta}


def _messages(message: Message, place: int) -> list[dict[str, Any]]:
    """A message as the OpenAI API writes it: results of tools are messages of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results, texts, thoughts, calls = [], [], [], []
    for block in message.content:
        kind = block.get("type")
        if kind == "text":
            texts.append(_text([block], f"messages.{place}"))
        elif kind == "tool_result":
            text = _text(block.get("content") or "", f"messages.{place}")
            results.append({"role": "tool", "tool_call_id": str(block.get("tool_use_id")), "content": text})
        elif kind == "tool_use" and isinstance(block.get("name"), str):
            arguments = json.dumps(block.get("input") or {})
            function = {"name": block["name"], "arguments": arguments}
            calls.append({"id": str(block.get("id")), "type": "function", "function": function})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        else:
            raise ApiError(400, f"messages.{place}: a block of type {str(kind)[:40]!r} is not understood")
    made: dict[str, Any] = {"role": message.role, "content": "".join(texts)}
    if thoughts:
        made["reasoning_content"] = "".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    return results + ([made] if texts or calls or not results else [])


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ApiError(400, f"{where}: only text is understood")
    return "".join(str(text) for text in texts)


def _called(event: Event) -> dict[str, Any]:
    arguments = json.loads(event.arguments)
    return {
        "type": "tool_use",
        "id": f"toolu_{uuid.uuid4().hex[:24]}",
        "name": event.name,
        "input": arguments if isinstance(arguments, dict) else {},
    }


def _reason(done: Done) -> str:
    assert done.response is not None
    if done.response.calls:
        return "tool_use"
    if done.stop is not None:
        return "stop_sequence"
    return "end_turn" if done.result.finish == "stop" else "max_tokens"


def _usage(result: Result) -> dict[str, int]:
    return {
        "input_tokens": result.prompt_tokens - result.reused_tokens,
        "cache_read_input_tokens": result.reused_tokens,
        "output_tokens": result.generated_tokens,
    }
