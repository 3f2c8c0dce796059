"""/v1/chat/completions: answers and streams as the OpenAI API has them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from flashpack.runtime.generate import Result
from flashpack.runtime.responses import Event
from flashpack.runtime.sampling import TokenLogprob
from flashpack.server.requests import ChatRequest
from flashpack.server.worker import Done, Piece


def usage_of(result: Result) -> dict[str, Any]:
    """Tokens, as the OpenAI API counts them."""
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.generated_tokens,
        "total_tokens": result.prompt_tokens + result.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": result.reused_tokens},
    }


class Chat:
    """One answer on its way to its client."""

    def __init__(self, request: ChatRequest, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.request = request
        self._model, self._tokenizer = model, tokenizer
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._calls = 0

    def begin(self) -> list[dict[str, Any]]:
        """The first chunk of a stream."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Those of a piece."""
        event = piece.event
        delta: dict[str, Any]
        if event.kind == "tool_call":
            delta = {"tool_calls": [{"index": self._calls, **_call(event)}]}
            self._calls += 1
        else:
            delta = {"content" if event.kind == "content" else "reasoning_content": event.text}
        return [self._chunk(delta, logprobs=piece.logprobs)]

    def end(self, done: Done) -> list[dict[str, Any]]:
        """The last ones."""
        made = [self._chunk({}, self._finish(done), done.logprobs)]
        if self.request.usage_wanted:
            made.append({**self._chunk({}), "choices": [], "usage": usage_of(done.result)})
        return made

    def whole(self, pieces: Sequence[Piece], done: Done) -> dict[str, Any]:
        """The answer in one."""
        response = done.response
        assert response is not None
        message: dict[str, Any] = {"role": "assistant", "content": response.content, "refusal": None}
        if response.reasoning:
            message["reasoning_content"] = response.reasoning
        if response.calls:
            message["tool_calls"] = [_call(event) for event in response.calls]
            message["content"] = response.content or None
        entries = [entry for piece in pieces for entry in piece.logprobs] + done.logprobs
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": self._finish(done),
            "logprobs": self._logprobs(entries) if self.request.logprobs else None,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage_of(done.result)}

    def _chunk(
        self, delta: dict[str, Any], finish: str | None = None, logprobs: Sequence[TokenLogprob] = ()
    ) -> dict[str, Any]:
        entries = self._logprobs(logprobs) if self.request.logprobs and logprobs else None
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": entries}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _finish(self, done: Done) -> str:
        assert done.response is not None
        return "tool_calls" if done.response.calls else "stop" if done.result.finish == "stop" else "length"

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        def told(token: int, logprob: float) -> dict[str, Any]:
            text = str(self._tokenizer.decode([token]))
            return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

        content = [{**told(e.token, e.logprob), "top_logprobs": [told(*one) for one in e.top]} for e in entries]
        return {"content": content, "refusal": None}


def _call(event: Event) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": event.name, "arguments": event.arguments},
    }
