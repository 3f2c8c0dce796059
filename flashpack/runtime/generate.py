"""One prompt through a loaded model: limits, what was read before, streaming, stopping, statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from flashpack.errors import CancelledError, ContextError, FormatError, UsageError
from flashpack.runtime.budget import PROMPT_CHUNK
from flashpack.runtime.memory import Usage, usage
from flashpack.runtime.prefix_cache import Prefix, PrefixCache
from flashpack.runtime.sampling import Logprobs, Sampling, config_of, processors, stop_tokens
from flashpack.runtime.stream import Text
from flashpack.skeleton import library_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flashpack.runtime.load import Runtime
    from flashpack.runtime.timing import Split, Timing


@dataclass(frozen=True)
class Result:
    """What a run produced. Rates in tokens per second, memory in bytes.

    ``finish``: "stop" (a stop token or text), "length" or "cancelled". ``reused_tokens`` of the prompt's were not read
    again; ``prompt_seconds`` are for the others.
    """

    text: str
    tokens: list[int]
    finish: str
    reused_tokens: int
    prompt_tokens: int
    generated_tokens: int
    prompt_seconds: float
    generate_seconds: float
    peak: Usage
    budget: dict[str, int]
    store: dict[str, Any]
    kernels: str
    decoding: str
    experts_per_token: tuple[int, int]
    prefer_cached: float | None
    split: Split | None

    @property
    def prompt_rate(self) -> float:
        return (self.prompt_tokens - self.reused_tokens) / self.prompt_seconds

    @property
    def generate_rate(self) -> float:
        """Over the tokens after the first, which the prompt's pass yields."""
        return (self.generated_tokens - 1) / self.generate_seconds if self.generate_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "finish": self.finish,
            "prompt_tokens": self.prompt_tokens,
            "reused_tokens": self.reused_tokens,
            "generated_tokens": self.generated_tokens,
            "prompt_tokens_per_second": self.prompt_rate,
            "generated_tokens_per_second": self.generate_rate,
            "peak_anonymous_bytes": self.peak.anonymous,
            "peak_file_bytes": self.peak.file,
            "memory": self.budget,
            "kernels": self.kernels,
            "decoding": self.decoding,
            "experts_per_token": dict(zip(("used", "model"), self.experts_per_token, strict=True)),
            "prefer_cached": self.prefer_cached,
            "experts": self.store,
            "timing": self.split.to_json() if self.split else None,
        }


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    max_tokens: int = 512,
    sampling: Sampling | None = None,
    on_text: Callable[[str], object] | None = None,
    timing: Timing | None = None,
    prefix_cache: PrefixCache | None = None,
    branch: int | None = None,
    stop: Sequence[str] = (),
    constraint: LogitsProcessor | None = None,
    logprobs: Logprobs | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Result:
    """Continue ``ids``; ``on_text`` gets the text piece by piece as it comes. ``timing``, of ``model``, splits the time
    of the tokens after the first.

    ``prefix_cache``: what was read before and need not be read again, if ``ids`` begin with it; what is read now is
    kept there. ``branch``: a place in ``ids`` after which a later text may go on in another way. ``stop``: texts that
    end the answer, and are not part of it. ``constraint``: sets logits of forbidden tokens to -inf. ``logprobs``
    collects probabilities. ``cancelled`` is asked before each layer of the prompt and after each token whether to stop.

    Raises ``ContextError`` if the prompt fills the context, ``UsageError`` for an empty prompt.
    """
    model_: Any = model
    runtime: Runtime = model_.flashpack
    _check(model, runtime, ids)
    before = runtime.store.stats.copied()
    stops = stop_tokens(model.generation_config, tokenizer)
    sampling = sampling or Sampling()
    if not sampling.greedy:
        torch.manual_seed(sampling.seed)
    watch = _Watch(Text(tokenizer, on_text, stops, stop, logprobs), timing, runtime, cancelled)
    prefix = prefix_cache.take(ids) if prefix_cache else Prefix()
    reused = len(prefix.ids)
    most = min(max_tokens, runtime.context - len(ids))
    runtime.store.cancelled = cancelled
    out = None
    try:
        with torch.inference_mode(), library_errors("the model of this pack cannot be computed"):
            if prefix_cache:
                _read(model_, prefix, ids, branch, prefix_cache.limit)
            inputs = torch.tensor([ids], device=model_.device)
            chosen = processors(sampling, len(ids), str(model.device), model.generation_config)
            out = model_.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=config_of(model.generation_config, most, tokenizer),
                stopping_criteria=StoppingCriteriaList([watch]),
                logits_processor=LogitsProcessorList([*(p for p in (logprobs, constraint) if p), *chosen]),
                past_key_values=prefix.cache,
            )
    except CancelledError:
        watch.cancelled = True
    except FormatError as e:
        if watch.text.handing_over and e.__cause__:
            raise e.__cause__ from None  # the caller's own error
        raise
    finally:
        runtime.store.cancelled = None
        if prefix_cache:
            if out is None:
                prefix.recover()
            else:
                prefix.ids, prefix.cache = [*ids, *watch.text.tokens[:-1]], out.past_key_values
            prefix_cache.give(prefix)
    watch.text.end()
    new = watch.text.tokens
    first, last = (watch.times[0], watch.times[-1]) if new else (time.perf_counter(),) * 2
    stopped = watch.text.stopped or (bool(new) and new[-1] in stops)
    return Result(
        text=watch.text.all,
        tokens=new,
        finish="stop" if stopped else "cancelled" if watch.cancelled else "length",
        reused_tokens=reused,
        prompt_tokens=len(ids),
        generated_tokens=len(new),
        prompt_seconds=first - watch.begun,
        generate_seconds=last - first,
        peak=watch.peak,
        budget=runtime.budget.to_json(),
        store=runtime.store.stats.since(before).to_json(),
        kernels=runtime.kernels,
        decoding=runtime.decoding,
        experts_per_token=runtime.experts_per_token,
        prefer_cached=runtime.prefer_cached,
        split=timing.split(len(new) - 1, last - first) if timing and len(new) > 1 else None,
    )


def _check(model: PreTrainedModel, runtime: Runtime, ids: list[int]) -> None:
    if not ids:
        raise UsageError("the prompt is empty")
    if len(ids) >= runtime.context:
        raise ContextError(
            f"the prompt has {len(ids)} tokens, the context {runtime.context}; shorten it or raise --context"
        )
    embeddings: Any = model.get_input_embeddings()
    if max(ids) >= embeddings.num_embeddings:
        raise FormatError(f"the pack's tokenizer gives token {max(ids)}, but the model has {embeddings.num_embeddings}")


def _read(model: Any, prefix: Prefix, ids: list[int], branch: int | None, room: int) -> None:
    """Bring ``prefix`` from where it is to the last chunk of ``ids``, with a mark at ``branch``."""
    ends = [end for end in (branch, len(ids)) if end and len(prefix.ids) < end]
    for end in ends:
        while (begin := len(prefix.ids)) < end:
            chunk = ids[begin : min(begin + PROMPT_CHUNK, end)]
            if begin + len(chunk) == len(ids):
                return  # generate's
            inputs = torch.tensor([chunk], device=model.device)
            out = model(input_ids=inputs, past_key_values=prefix.cache, use_cache=True, logits_to_keep=1)
            prefix.ids, prefix.cache = ids[: begin + len(chunk)], out.past_key_values
        if end == branch:
            prefix.mark(room)


class _Watch(StoppingCriteria):
    """After each token: the time, the memory, the text; ends the generation when it should end."""

    def __init__(
        self, text: Text, timing: Timing | None, runtime: Runtime, cancelled: Callable[[], bool] | None
    ) -> None:
        self.text = text
        self.times: list[float] = []
        self.peak = usage()
        self.cancelled = False
        self._timing, self._runtime, self._asked = timing, runtime, cancelled
        self.begun = time.perf_counter()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        token = int(input_ids[0, -1])
        self.times.append(time.perf_counter())
        self._runtime.store.cancelled = None  # from here on between tokens
        if self._timing and len(self.times) == 1:
            self._timing.start()
        now = usage()
        self.peak = Usage(max(now.anonymous, self.peak.anonymous), max(now.file, self.peak.file))
        self.text.put(token)
        self.cancelled = self._asked is not None and self._asked()
        return torch.tensor([self.text.stopped or self.cancelled], device=input_ids.device)
