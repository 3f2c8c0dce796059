"""Tokens to text while they come."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from flashpack.runtime.sampling import Logprobs

_CONTEXT = 8
"""Tokens before the new ones that are decoded with them: some tokenizers write a token by what stands before it."""


class Text:
    """The text of tokens that come one by one, without ``end_tokens``; ``on_text`` gets each piece when it is sure.

    A piece waits while its last character is incomplete, or while it may be the beginning of one of ``stop``, texts
    that end the answer (``stopped``) and are not part of it. ``handing_over``: ``on_text`` is at work.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[str], object] | None,
        end_tokens: Collection[int],
        stop: Sequence[str] = (),
        logprobs: Logprobs | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self.all = ""
        self.stopped = self.handing_over = False
        self._tokenizer, self._on_text, self._end_tokens, self._stop = tokenizer, on_text, end_tokens, stop
        self._logprobs = logprobs
        self._said: list[int] = []
        self._decoded = 0  # so many of _said are in the text
        self._held = ""

    def put(self, token: int) -> None:
        """The next token."""
        self.tokens.append(token)
        if self._logprobs:
            self._logprobs.take(token)
        if token not in self._end_tokens:
            self._said.append(token)
            self._advance(final=False)

    def end(self) -> None:
        """There are no more."""
        self._advance(final=True)

    def _advance(self, final: bool) -> None:
        if self.stopped:
            return
        begin = max(0, self._decoded - _CONTEXT)
        known = self._decode(self._said[begin : self._decoded])
        text = self._decode(self._said[begin:])
        piece = ""
        if final or not text.endswith("\ufffd"):
            piece = text[len(known) :]
            self._decoded = len(self._said)
        held = self._held + piece
        found = min((at for s in self._stop if (at := held.find(s)) >= 0), default=None)
        if found is not None:
            self.stopped, self._held = True, ""
            self._hand_over(held[:found])
            return
        keep = 0 if final else max((_overlap(held, s) for s in self._stop), default=0)
        self._held = held[len(held) - keep :]
        self._hand_over(held[: len(held) - keep])

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    def _hand_over(self, piece: str) -> None:
        self.all += piece
        if piece and self._on_text:
            self.handing_over = True
            self._on_text(piece)
            self.handing_over = False


def _overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of ``stop`` that ``text`` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
