"""Turns of a conversation: what the user says, answers, calls of tools, until an answer calls none."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from flashpack.chat.conversation import INTERRUPTED, Conversation
from flashpack.chat.tools import Declined, Tools
from flashpack.runtime.generate import Result
from flashpack.runtime.responses import Event
from flashpack.runtime.sampling import Sampling
from flashpack.runtime.session import Session

ROUNDS = 8
"""Most answers with tool calls in one turn."""


class View(Protocol):
    """Who is told what happens in a turn."""

    def event(self, event: Event) -> None:
        """A piece of an answer, or a call."""

    def answered(self, result: Result) -> None:
        """An answer is complete, or was stopped."""

    def returned(self, name: str, result: str) -> None:
        """A tool has done its work; ``result`` is JSON."""

    def remark(self, text: str) -> None:
        """A line for the person."""


@dataclass
class Totals:
    """What a chat took so far."""

    answers: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    last_tokens: int = 0
    """Of the conversation, at its last answer."""

    def add(self, result: Result) -> None:
        self.answers += 1
        self.prompt_tokens += result.prompt_tokens
        self.reused_tokens += result.reused_tokens
        self.generated_tokens += result.generated_tokens
        self.last_tokens = result.prompt_tokens + result.generated_tokens


@dataclass
class Chat:
    """A conversation with a model. ``seed`` None: another one for each answer. ``cancelled`` says whether the answer
    that is coming should stop; ``generating`` is called with True and False around each."""

    session: Session
    conversation: Conversation
    tools: Tools
    view: View
    sampling: Sampling
    seed: int | None
    thinking: bool | None
    max_tokens: int | None
    cancelled: Callable[[], bool]
    generating: Callable[[bool], object]

    def __post_init__(self) -> None:
        self.totals = Totals()

    def turn(self, text: str) -> None:
        """Say ``text`` and hear the answer. If it raises, the conversation is what it was before.

        Raises ``ContextError`` if the conversation fills the context.
        """
        messages = self.conversation.messages
        before = len(messages)
        messages.append({"role": "user", "content": text})
        try:
            for _ in range(ROUNDS):
                if not self._answer():
                    return
            self.view.remark(f"{ROUNDS} rounds of tool calls are the most in a turn; say something to go on")
        except BaseException:
            del messages[before:]
            raise

    def _answer(self) -> bool:
        """One answer and the calls in it; whether there is to be another."""
        self.generating(True)
        try:
            calls = self._said()
        finally:
            self.generating(False)
        stopped = False
        for call in calls:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            found = '{"error": "the user stopped it"}'
            if not stopped:
                try:
                    found = self.tools.call(name, arguments)
                except KeyboardInterrupt:
                    stopped = True
                except Declined as e:
                    found, stopped = json.dumps({"error": str(e)}), True
            self.view.returned(name, found)
            self.conversation.messages.append(
                {"role": "tool", "tool_call_id": call["id"], "name": name, "content": found}
            )
        return bool(calls) and not stopped

    def _said(self) -> list[dict[str, Any]]:
        """One answer, as it is shown and as it stays in the conversation; the calls in it that are to be made."""
        how = replace(self.sampling, seed=random.getrandbits(63) if self.seed is None else self.seed)
        response, result = self.session.answer(
            self.conversation.prompt(), self.tools.schemas, self.view.event, self.thinking,
            max_tokens=self.max_tokens, sampling=how, cancelled=self.cancelled,
        )  # fmt: skip
        if result.finish == "cancelled" and not result.tokens:
            self._take_back()
            return []
        self.totals.add(result)
        self.view.answered(result)
        message = response.message()
        calls: list[dict[str, Any]] = message.get("tool_calls", [])
        if result.finish != "stop":
            message.pop("tool_calls", None)
            message[INTERRUPTED] = True
            calls = []
        for number, call in enumerate(calls):
            call["id"] = f"call_{len(self.conversation.messages)}_{number}"
        self.conversation.messages.append(message)
        if result.finish != "stop":
            self.view.remark(self._why_cut(result))
        return calls

    def _take_back(self) -> None:
        """Stopped before a word was said: what nobody has read yet is not read at the next turn either."""
        messages = self.conversation.messages
        if messages[-1]["role"] == "user":
            del messages[-1]
            self.view.remark("stopped before the answer began; what you said is taken back")
        else:
            self.view.remark("stopped before the answer began; what the tool returned stays in the conversation")

    def _why_cut(self, result: Result) -> str:
        context = self.session.runtime.context
        if result.finish == "cancelled":
            return "stopped; what was said stays in the conversation"
        if result.prompt_tokens + result.generated_tokens >= context:
            return f"the context of {context} tokens is full; /reset begins anew, --context N makes room"
        return f"cut at {result.generated_tokens} tokens (--max-tokens)"
