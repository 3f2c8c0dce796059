"""Giving a loaded model the tokens of a text as decoding does, one by one, whatever it would have said itself."""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Feed:
    """Feeds ``ids`` one after the other; the text begins again when it has ended."""

    def __init__(self, model: PreTrainedModel, ids: list[int]) -> None:
        self._model: Any = model
        self._ids = ids
        self._next = 0
        self._cache: Any = None
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if last_only else {}

    def __call__(self, tokens: int) -> float:
        """Seconds that the next ``tokens`` tokens take: a prompt, in chunks as when it is run, or 1 to decode."""
        import torch

        from flashpack.runtime.budget import PROMPT_CHUNK
        from flashpack.skeleton import library_errors

        ids = [self._ids[(self._next + i) % len(self._ids)] for i in range(tokens)]
        self._next += tokens
        begun = time.perf_counter()
        with torch.inference_mode(), library_errors("the model of this pack cannot be computed"):
            for chunk in torch.split(torch.tensor([ids], device=self._model.device), PROMPT_CHUNK, dim=1):
                answer = self._model(chunk, past_key_values=self._cache, use_cache=True, **self._options)
                self._cache = answer.past_key_values
            answer.logits[0, -1, :1].item()  # wait for an asynchronous device
        return time.perf_counter() - begun

    def restart(self) -> None:
        """Begin with an empty context; the text goes on."""
        self._cache = None
