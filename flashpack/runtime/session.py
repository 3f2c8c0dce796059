"""A loaded pack that answers, one text after the other, and remembers what it has read."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from flashpack.runtime.generate import Result, generate
from flashpack.runtime.load import Runtime, load
from flashpack.runtime.messages import Message, chat_template, encode_chat
from flashpack.runtime.prefix_cache import PrefixCache
from flashpack.runtime.responses import Event, Response
from flashpack.runtime.sampling import Logprobs, Sampling
from flashpack.runtime.tokenizer import load_tokenizer


class Session:
    """``pack`` loaded with ``options`` (``load``'s). ``sampling``: what the pack recommends.

    ``answer`` and ``complete`` may be called from any thread, and take turns.
    """

    def __init__(self, pack: str | os.PathLike[str], prefix_memory: int = 0, **options: Any) -> None:
        self.model: PreTrainedModel = load(pack, prefix_memory=prefix_memory, **options)
        self.runtime: Runtime = getattr(self.model, "flashpack")  # noqa: B009 - the class does not know it
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.runtime.pack.folder)
        self.prefix_cache = PrefixCache(self.runtime.prefix_memory)
        self.sampling = Sampling.of(self.model.generation_config)
        self._turn = threading.Lock()

    def answer(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        on_event: Callable[[Event], object] | None = None,
        thinking: bool | None = None,
        **how: Any,
    ) -> tuple[Response, Result]:
        """The next message of a conversation; ``on_event`` gets it piece by piece. ``how``: as ``complete`` takes it.

        Raises ``ContextError`` if the conversation fills the context, ``UsageError`` for what cannot be rendered.
        """
        prompt = encode_chat(self.tokenizer, messages, tools, thinking)
        response = Response(chat_template(self.tokenizer), prompt.opening, tools)

        def pass_on(events: list[Event]) -> None:
            for event in events if on_event else ():
                assert on_event is not None
                on_event(event)

        result = self.complete(prompt.ids, lambda piece: pass_on(response.feed(piece)), branch=prompt.branch, **how)
        pass_on(response.finish())
        return response, result

    def complete(
        self,
        ids: list[int],
        on_text: Callable[[str], object] | None = None,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        branch: int | None = None,
        stop: Sequence[str] = (),
        constraint: LogitsProcessor | None = None,
        logprobs: Logprobs | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Result:
        """Continue tokens: ``generate`` with what was read before; by default up to the end of the context, sampled as
        the pack recommends, each time with another seed."""
        most = self.runtime.context if max_tokens is None else max_tokens
        how = sampling or replace(self.sampling, seed=random.getrandbits(63))
        with self._turn:
            return generate(
                self.model, self.tokenizer, ids, most, how, on_text, prefix_cache=self.prefix_cache, branch=branch,
                stop=stop, constraint=constraint, logprobs=logprobs, cancelled=cancelled,
            )  # fmt: skip
