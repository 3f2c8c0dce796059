"""Conversations as tokens: the pack's chat template over messages and tools, as the OpenAI API writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashpack.errors import FormatError, UsageError
from flashpack.runtime import template
from flashpack.runtime.tokenizer import encode
from flashpack.skeleton import library_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""``role`` (system, developer, user, assistant, tool) and ``content``; an assistant's may have ``tool_calls`` and
``reasoning_content``, a tool's has ``tool_call_id``."""


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the model's next answer.

    ``branch``: so many of ``ids`` any later conversation that begins with these messages has, too. ``opening``: the
    beginning of the answer, which the template writes ("<think>" may be in it).
    """

    ids: list[int]
    branch: int | None
    opening: str


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    raw: bool = False,
    thinking: bool | None = None,
    system: str | None = None,
) -> list[int]:
    """Token ids of a prompt: one user message in the chat template, after a ``system`` message if there is one, or the
    text as it is (``raw``)."""
    if raw:
        if thinking is not None:
            raise UsageError("--thinking needs the chat template; leave out --raw")
        return encode(tokenizer, prompt, special=True)
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return encode_chat(tokenizer, [*messages, {"role": "user", "content": prompt}], thinking=thinking).ids


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] = (),
    thinking: bool | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Prompt:
    """The tokens of ``messages`` in the pack's chat template. ``tools``: functions as the OpenAI API describes them.
    ``thinking``: on or off, where the template has such a switch. ``variables``: what else the template takes.

    Raises ``UsageError`` without a template, for a switch it has not, and for messages that are no text.
    """
    chosen = chat_template(tokenizer)
    given: dict[str, Any] = {**tokenizer.special_tokens_map, **(variables or {})}
    if thinking is not None:
        if "enable_thinking" not in chosen:
            raise UsageError("the pack's chat template knows no thinking switch; leave out --thinking")
        given["enable_thinking"] = thinking
    if tools:
        given["tools"] = list(tools)
    written = [_written(message, "tool_calls" in chosen) for message in messages]
    text = template.render(chosen, written, **given)
    ids = encode(tokenizer, text, special=False)
    before = template.render(chosen, written, **given, add_generation_prompt=False)
    if not text.startswith(before):
        return Prompt(ids, None, "")
    shared = encode(tokenizer, before, special=False)
    return Prompt(ids, len(shared) if shared and shared == ids[: len(shared)] else None, text[len(before) :])


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The pack's chat template; ``UsageError`` if it has none."""
    if not tokenizer.chat_template:
        raise UsageError("the pack has no chat template; use --raw for plain continuation")
    with library_errors("the pack's chat template"):
        found: Any = tokenizer.get_chat_template()
    if not isinstance(found, str):
        raise FormatError("the pack's chat template is not a text; use --raw without it")
    return found


def shows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template tells the model which tools there are; one that was trained on fixed tools may know."""
    code = re.findall(r"{[{%](.*?)[%}]}", chat_template(tokenizer), re.DOTALL)
    return any(re.search(r"\btools\b", re.sub(r"'[^']*'|\"[^\"]*\"", "", part)) for part in code)


def _written(message: Message, knows_calls: bool) -> Message:
    """``message`` as templates expect it: text instead of parts, arguments as objects; calls as text for a template
    that does not know them."""
    out = {k: v for k, v in message.items() if v is not None}
    content = message.get("content")
    if isinstance(content, list):
        out["content"] = "".join(_text(part) for part in content)
    calls = [_call(one) for one in message.get("tool_calls") or []]
    if calls and not knows_calls:
        lines = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
        out["content"] = (out.get("content") or "") + "\n".join(f"<tool_call>\n{x}\n</tool_call>" for x in lines)
        del out["tool_calls"]
    elif calls:
        out["tool_calls"] = calls
    out.setdefault("content", "")
    return out


def _text(part: Any) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise UsageError(f"a message has a part of type {kind!r}; only text is understood")
    return str(part["text"])


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError("a tool call has no function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")  # some clients write no arguments so
        except (ValueError, RecursionError) as e:
            raise UsageError(f"the arguments of a call of {function['name'][:60]!r} are not JSON") from e
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
