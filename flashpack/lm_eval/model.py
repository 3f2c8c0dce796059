"""The model itself: lm_eval's for transformers, with what a budget of memory and experts on a disk need.

Texts, tokens, chat templates and generation are lm_eval's. Log-likelihoods are flashpack's own: lm_eval asks for the
logits of every token at once, which take more memory than the model where the vocabulary is large, and reads a
question again for each of its answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found, import-untyped, unused-ignore]
from tqdm import tqdm

from flashpack.errors import UsageError
from flashpack.lm_eval.scoring import Continuation, score
from flashpack.runtime.session import Session

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""As lm_eval has it: context and continuation as texts and as tokens; no texts for pieces of a long text."""


class PackLM(HFLM):  # type: ignore[misc, unused-ignore]
    """``pack``: its folder. ``memory`` up to ``device`` are ``flashpack.load``'s; what is longer than the context is
    cut as lm_eval does. ``options`` are those of lm_eval's ``hf`` that are about texts (``add_bos_token``,
    ``enable_thinking``, ``think_end_token``, ``chat_template_args``).

    Raises what ``flashpack.load`` does, and ``UsageError`` for batches: a pack computes one text at a time.
    """

    def __init__(
        self,
        pack: str,
        memory: int | str | None = None,
        context: int | None = None,
        expect: str | None = None,
        experts_per_token: int | None = None,
        reference: bool = False,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        if str(batch_size) != "1":
            raise UsageError(f"batch size {batch_size}: a pack computes one text at a time; leave it out")
        if device == "cuda:0":
            device = None  # lm_eval's command says so where nobody has said anything
        session = Session(
            pack, memory=memory, context=context, expect=expect, experts_per_token=experts_per_token,
            reference=reference, device=device,
        )  # fmt: skip
        self._runtime = session.runtime
        model: Any = session.model
        # lm_eval would tie weights anew; here they are what the pack says, in modules that are not the library's.
        model.tie_weights = lambda *args, **kwargs: None
        super().__init__(model, tokenizer=session.tokenizer, max_length=self._runtime.context, batch_size=1, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        asked = [Continuation.cut(context, tokens, self.max_length) for _, context, tokens in requests]
        with tqdm(total=len(asked), desc="log-likelihoods", disable=disable_tqdm or len(asked) < 2) as bar:
            found = score(self.model, asked, self._runtime.prefix_memory, lambda: bar.update(1))
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes beside its results."""
        pack = self._runtime.pack
        used, own = self._runtime.experts_per_token
        return {"model_sha": pack.identity, "pack_recipe": pack.manifest.recipe, "experts_per_token": [used, own]}
