"""Log-likelihoods of continuations, with little memory and with what several of them begin with read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashpack.runtime.budget import PROMPT_CHUNK
from flashpack.runtime.predict import inference, log_probabilities
from flashpack.runtime.prefix_cache import Prefix
from flashpack.skeleton import library_errors

SHORT = 64
"""Tokens of a continuation whose logits are computed at once, which is memory that no budget counts."""


@dataclass(frozen=True)
class Continuation:
    """``context``: tokens that are given, one or more; ``tokens``: those that follow, one or more."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def cut(cls, context: Sequence[int], tokens: Sequence[int], limit: int) -> Continuation:
        """With the end of the context only, so that no more than ``limit`` tokens have to be read; that many tokens
        may follow at the most."""
        assert context
        assert 0 < len(tokens) <= limit
        return cls(tuple(context[-(limit + 1 - len(tokens)) :]), tuple(tokens))


def score(
    model: Any, asked: Sequence[Continuation], room: int, advance: Callable[[], object] | None = None
) -> list[tuple[float, bool]]:
    """Of each continuation the sum of its tokens' log-probabilities in nats, and whether each token is the likeliest.

    ``model`` is a loaded pack; ``room``: bytes for the copy of a recurrent state, ``Runtime.prefix_memory``. A result
    does not depend on the others: what is read once is read as it would have been alone. ``advance`` is called after
    each. Raises ``FormatError`` if the model cannot be computed.
    """
    found: dict[int, tuple[float, bool]] = {}
    reader = _Reader(model, room)
    with inference(), library_errors("the model of this pack cannot be computed"):
        for i in sorted(range(len(asked)), key=lambda i: (asked[i].context, asked[i].tokens[:-1])):
            found[i] = _sum(reader, asked[i])
            if advance:
                advance()
    return [found[i] for i in range(len(asked))]


def _sum(reader: _Reader, asked: Continuation) -> tuple[float, bool]:
    total, likeliest, done = 0.0, True, 0
    for rows in reader.rows(asked):
        tokens = torch.tensor(asked.tokens[done : done + len(rows)])
        total += float(rows.gather(1, tokens[:, None]).sum(dtype=torch.float64))
        likeliest &= bool((rows.argmax(-1) == tokens).all())
        done += len(rows)
    return total, likeliest


class _Reader:
    """Reads contexts, and goes on from one in several ways."""

    def __init__(self, model: Any, room: int) -> None:
        self._model, self._room = model, room
        self._prefix = Prefix()
        self._place = 0
        """So much of it is the last context."""
        self._last: tuple[Continuation, Tensor] | None = None

    def rows(self, asked: Continuation) -> Iterator[Tensor]:
        """Log-probabilities of what stands in the place of each token that follows: float32 [tokens, vocabulary] on
        the CPU, some tokens at a time."""
        if len(asked.tokens) <= SHORT:
            yield self._short(asked)
            return
        # The decoder takes the whole, so that experts are read once for all tokens; the head takes a few at a time.
        ids = torch.tensor([asked.context + asked.tokens[:-1]])
        before = len(asked.context) - 1
        for rows in log_probabilities(self._model, 1, ids, single=False):
            if len(rows) > before:
                yield rows[before:]
            before = max(0, before - len(rows))

    def _short(self, asked: Continuation) -> Tensor:
        """Where only the last token differs from the one before (A, B, C or D), it has been computed already."""
        same = Continuation(asked.context, (*asked.tokens[:-1], 0))
        if self._last is None or self._last[0] != same:
            # The last token of the context goes with those that follow: its logits are of the first of them.
            place = len(asked.context) - 1
            self._read(asked.context[:place])
            logits = self._pass((*asked.context[place:], *asked.tokens[:-1]), len(asked.tokens))
            self._last = same, logits.float().cpu().log_softmax(-1)
        return self._last[1]

    def _read(self, context: tuple[int, ...]) -> None:
        """Have exactly ``context`` read: what is there already stays, if it was read in the same chunks."""
        prefix, ids = self._prefix, [*context, -1]
        # What follows the last context was not read as a context is.
        place = min(prefix.usable(ids), self._place)
        if place < len(context):
            # The kernels round products of few tokens otherwise than those of many.
            place -= place % PROMPT_CHUNK
        if prefix.usable(ids[: place + 1]) == place:
            prefix.rewind(place)
        else:
            self._prefix = Prefix()
        while (begin := len(self._prefix.ids)) < len(context):
            self._pass(context[begin : begin + PROMPT_CHUNK], 1)
        self._prefix.mark(self._room)
        self._place = len(context)

    def _pass(self, ids: tuple[int, ...], logits: int) -> Tensor:
        """Logits [logits, vocabulary] of the last tokens of ``ids``, which come after all that was read."""
        prefix = self._prefix
        inputs = torch.tensor([ids], device=self._model.device)
        out = self._model(input_ids=inputs, past_key_values=prefix.cache, use_cache=True, logits_to_keep=logits)
        prefix.ids, prefix.cache = [*prefix.ids, *ids], out.past_key_values
        found: Tensor = out.logits[0]
        return found
