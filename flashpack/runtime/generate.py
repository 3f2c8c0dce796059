"""One prompt through a loaded model: chat template, limits, streaming, statistics."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashpack.errors import ContextError, FormatError, UsageError
from flashpack.runtime import template
from flashpack.runtime.memory import Usage, usage
from flashpack.runtime.tokenizer import encode
from flashpack.runtime.tokenizer import load_tokenizer as load_tokenizer
from flashpack.skeleton import library_errors

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from flashpack.runtime.load import Runtime
    from flashpack.runtime.timing import Split, Timing


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What a run produced. Rates in tokens per second, memory in bytes, ``finish`` is "stop" or "length"."""

    text: str
    finish: str
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
        return self.prompt_tokens / self.prompt_seconds

    @property
    def generate_rate(self) -> float:
        """Over the tokens after the first, which the prompt's pass yields."""
        return (self.generated_tokens - 1) / self.generate_seconds if self.generate_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "finish": self.finish,
            "prompt_tokens": self.prompt_tokens,
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


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    raw: bool = False,
    thinking: bool | None = None,
    system: str | None = None,
) -> list[int]:
    """Token ids of a prompt: one user message in the chat template, after a ``system`` message if there is one, or the
    text as it is (``raw``)."""
    if raw:
        if thinking is not None:
            raise UsageError("--thinking needs the chat template; leave out --raw")
        return encode(tokenizer, prompt, special=True)
    if not tokenizer.chat_template:
        raise UsageError("the pack has no chat template; use --raw for plain continuation")
    with library_errors("the pack's chat template"):
        chosen = tokenizer.get_chat_template()
    extra: dict[str, Any] = {}
    if thinking is not None:
        if "enable_thinking" not in chosen:
            raise UsageError("the pack's chat template knows no thinking switch; leave out --thinking")
        extra["enable_thinking"] = thinking
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt})
    text = template.render(chosen, messages, **{**tokenizer.special_tokens_map, **extra})
    return encode(tokenizer, text, special=False)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    max_tokens: int = 512,
    sampling: Sampling | None = None,
    on_text: Callable[[str], object] | None = None,
    timing: Timing | None = None,
) -> Result:
    """Continue ``ids``; ``on_text`` gets the text piece by piece as it comes. ``timing``, of ``model``, splits the time
    of the tokens after the first.

    Raises ``ContextError`` if the prompt fills the context, ``UsageError`` for an empty prompt.
    """
    import torch
    from transformers import TextStreamer

    model_: Any = model
    runtime: Runtime = model_.flashpack
    if not ids:
        raise UsageError("the prompt is empty")
    room = runtime.context - len(ids)
    if room < 1:
        raise ContextError(
            f"the prompt has {len(ids)} tokens, the context {runtime.context}; shorten it or raise --context"
        )

    rows: int = model_.get_input_embeddings().num_embeddings
    if max(ids) >= rows:
        raise FormatError(f"the pack's tokenizer gives token {max(ids)}, but the model has {rows}")

    class Stream(TextStreamer):
        """Passes text on and takes the time and memory at each token."""

        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True)
            self.times: list[float] = []
            self.peak = usage()
            self.handing_over = False

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())
            if timing and len(self.times) == 2:
                timing.start()
            now = usage()
            self.peak = Usage(max(now.anonymous, self.peak.anonymous), max(now.file, self.peak.file))
            if value.numel() > 1 or value.item() not in stops:
                super().put(value)  # type: ignore[no-untyped-call]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text:
                self.handing_over = True
                on_text(text)
                self.handing_over = False

    stops = _stop_tokens(model.generation_config, tokenizer)
    stream = Stream()
    sampling = sampling or Sampling()
    if sampling.temperature > 0:
        torch.manual_seed(sampling.seed)
    inputs = torch.tensor([ids], device=model_.device)
    try:
        with torch.inference_mode(), library_errors("the model of this pack cannot be computed"):
            out = model_.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=_config(model.generation_config, sampling, min(max_tokens, room), tokenizer),
                streamer=stream,
            )
    except FormatError as e:
        if stream.handing_over and e.__cause__:
            raise e.__cause__ from None  # the caller's own error
        raise
    new = out[0, len(ids) :].tolist()
    # The stream's first entry is the prompt, handed over before it is processed.
    begun, first, last = stream.times[0], stream.times[1], stream.times[-1]
    return Result(
        text=str(tokenizer.decode([t for t in new if t not in stops])),
        finish="stop" if new[-1] in stops else "length",
        prompt_tokens=len(ids),
        generated_tokens=len(new),
        prompt_seconds=first - begun,
        generate_seconds=last - first,
        peak=stream.peak,
        budget=runtime.budget.to_json(),
        store=runtime.store.stats.to_json(),
        kernels=runtime.kernels,
        decoding=runtime.decoding,
        experts_per_token=runtime.experts_per_token,
        prefer_cached=runtime.prefer_cached,
        split=timing.split(len(new) - 1, last - first) if timing and len(new) > 1 else None,
    )


def _stop_tokens(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All stop tokens of the generation config; the tokenizer's if it names none; empty if there is none."""
    eos = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    if eos is None:
        return []
    return list(eos) if isinstance(eos, (list, tuple)) else [eos]


def _config(
    base: GenerationConfig, sampling: Sampling, max_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    config = copy.deepcopy(base)
    greedy = sampling.temperature == 0
    config.do_sample = not greedy
    # Neutral values where greedy, so that nothing of the checkpoint's sampling defaults is left.
    config.temperature = 1.0 if greedy else sampling.temperature
    config.top_p = 1.0 if greedy else sampling.top_p
    config.top_k = 0 if greedy else sampling.top_k
    config.max_new_tokens = max_tokens
    config.max_length = None
    stops = _stop_tokens(base, tokenizer)
    config.eos_token_id = stops or None
    if config.pad_token_id is None:
        config.pad_token_id = stops[0] if stops else 0
    return config
