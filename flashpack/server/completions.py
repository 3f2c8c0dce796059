"""/v1/completions: the continuation of a text, as the OpenAI API has it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from flashpack.runtime.sampling import TokenLogprob
from flashpack.server.chat import usage_of
from flashpack.server.requests import CompletionRequest
from flashpack.server.worker import Done, Piece


class Completion:
    """One continuation on its way to its client."""

    def __init__(self, request: CompletionRequest, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.request = request
        self._tokenizer = tokenizer
        made = int(time.time())
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": made, "model": model}
        self._said = 0

    def begin(self) -> list[dict[str, Any]]:
        """The first chunk of a stream: none."""
        return []

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Those of a piece."""
        return [self._chunk(piece.event.text, piece.logprobs)]

    def end(self, done: Done) -> list[dict[str, Any]]:
        """The last ones."""
        made = [self._chunk("", done.logprobs, _finish(done))]
        if self.request.usage_wanted:
            made.append({**self._head, "choices": [], "usage": usage_of(done.result)})
        return made

    def whole(self, pieces: Sequence[Piece], done: Done) -> dict[str, Any]:
        """The continuation in one."""
        entries = [entry for piece in pieces for entry in piece.logprobs] + done.logprobs
        return {**self._chunk(done.result.text, entries, _finish(done)), "usage": usage_of(done.result)}

    def _chunk(self, text: str, entries: Sequence[TokenLogprob], finish: str | None = None) -> dict[str, Any]:
        logprobs = self._logprobs(entries) if self.request.logprobs is not None else None
        return {**self._head, "choices": [{"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}]}

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        tokens = [str(self._tokenizer.decode([e.token])) for e in entries]
        offsets = []
        for token in tokens:
            offsets.append(self._said)
            self._said += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [max(e.logprob, -9999.0) for e in entries],
            "top_logprobs": [{str(self._tokenizer.decode([t])): max(p, -9999.0) for t, p in e.top} for e in entries],
            "text_offset": offsets,
        }


def _finish(done: Done) -> str:
    return "stop" if done.result.finish == "stop" else "length"
