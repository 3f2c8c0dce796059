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
        """Seconds that the next ``tokens`` tokens take at once: a prompt, or 1 to decode."""
        import torch

        from flashpack.skeleton import library_errors

        ids = [self._ids[(self._next + i) % len(self._ids)] for i in range(tokens)]
        self._next += tokens
        begun = time.perf_counter()
        with torch.inference_mode(), library_errors("the model of this pack cannot be computed"):
            inputs = torch.tensor([ids], device=self._model.device)
            answer = self._model(inputs, past_key_values=self._cache, use_cache=True, **self._options)
            answer.logits[0, -1, :1].item()  # wait for an asynchronous device
        self._cache = answer.past_key_values
        return time.perf_counter() - begun

    def restart(self) -> None:
        """Begin with an empty context; the text goes on."""
        self._cache = None
