"""How tokens are chosen: as transformers chooses them, but only among those that can be chosen.

transformers sorts all logits for ``top_p``, and draws a random number for each: 13 ms a token for the settings that
Qwen recommends and its 248,320 tokens, 31 ms for ``top_p`` alone, where finding the largest takes one.
"""

from __future__ import annotations

import copy
import math
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from flashpack.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


GREEDY = 1e-5

SOME_CANDIDATES = 1024
"""So many of the largest logits are looked at first, where ``top_k`` does not say how many."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; a temperature below ``GREEDY`` takes the best one, for at its limit it would.

    ``presence_penalty`` is taken from the logit of each token that the answer has already, ``frequency_penalty`` once
    for each time.
    """

    temperature: float = 0.0
    _: KW_ONLY
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**64:
            raise UsageError(f"--seed {self.seed}: from -2^63 to 2^64 - 1")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY

    @classmethod
    def of(cls, config: GenerationConfig) -> Sampling:
        """What the makers of the model recommend; greedy if they say nothing."""
        if not config.do_sample:
            return cls()
        return cls(
            temperature=1.0 if config.temperature is None else config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            top_k=config.top_k or 0,
            min_p=config.min_p or 0.0,
        )


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token, the log of its probability, and the ``top`` likeliest ones with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Logprobs(LogitsProcessor):
    """Collects log-probabilities (natural, of the model's own distribution: before temperature and constraints), one
    entry per token; ``top`` alternatives each."""

    top: int = 0
    entries: list[TokenLogprob] = field(default_factory=list)
    _last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._last = torch.log_softmax(scores[0].float(), dim=-1)
        return scores

    def take(self, token: int) -> None:
        """``token`` was chosen."""
        assert self._last is not None
        best = torch.topk(self._last, self.top) if self.top else None
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else []
        self.entries.append(TokenLogprob(token, float(self._last[token]), top))


class _Penalties(LogitsProcessor):
    """OpenAI's presence and frequency penalties."""

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self._prompt, self._presence, self._frequency = prompt, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, counts = torch.unique(input_ids[0, self._prompt :], return_counts=True)
        scores[0, tokens] -= self._presence + self._frequency * counts
        return scores


class Sampler(LogitsProcessor):
    """Chooses a token as transformers' warpers and its draw would: temperature, ``top_k``, ``top_p``, ``min_p``, each
    of what the one before left. The others' scores become -inf, so that the best one is the one chosen."""

    def __init__(self, sampling: Sampling) -> None:
        self._how = sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids, weights = self.candidates(scores[0])
        sums = weights.cumsum(0)
        if not 0 < sums[-1] < math.inf:
            raise ValueError("the logits are not numbers")
        place = torch.searchsorted(sums, torch.rand(1, dtype=torch.float64) * sums[-1], right=True)
        token = int(ids[min(int(place), len(ids) - 1)])
        chosen = torch.full_like(scores, -math.inf)
        chosen[0, token] = 0
        return chosen

    def candidates(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Of scores [vocabulary], float32: the tokens that may be chosen, and numbers in proportion to their
        probabilities (float64, on the CPU)."""
        how, count = self._how, len(scores)
        if not how.top_k and how.top_p >= 1 and not how.min_p:
            return torch.arange(count), _weights(scores / how.temperature)
        some = min(count, how.top_k or SOME_CANDIDATES)
        while True:
            best = scores.topk(some)
            logits = best.values / how.temperature
            weights, all_here = _weights(logits), some == count or bool(how.top_k)
            kept = some
            if how.top_p < 1:
                before = weights.cumsum(0) - weights
                total = before[-1] + weights[-1]
                if not all_here:
                    scaled = (scores / how.temperature).logsumexp(0) - logits[0]
                    total = scaled.cpu().double().exp()
                kept = int((before < how.top_p * total).sum())
            if how.min_p:
                kept = min(kept, int((weights >= how.min_p).sum()))
            if kept < some or all_here:
                kept = max(1, kept)
                return best.indices[:kept].cpu(), weights[:kept]
            some = min(count, 16 * some)


def _weights(logits: Tensor) -> Tensor:
    """Probabilities over the largest one."""
    return (logits - logits.max()).cpu().double().exp()  # Metal has no float64


def processors(sampling: Sampling, prompt: int, device: str, base: GenerationConfig) -> list[LogitsProcessor]:
    """What to do with the logits of each token after a prompt of so many tokens; ``base``: the pack's configuration."""
    made: list[Any] = []
    if sampling.presence_penalty or sampling.frequency_penalty:
        made.append(_Penalties(prompt, sampling.presence_penalty, sampling.frequency_penalty))
    if sampling.greedy:
        return made
    rare = _rare(base, device)
    if not rare:
        return [*made, Sampler(sampling)]
    if sampling.temperature != 1:
        made.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        made.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        made.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        made.append(MinPLogitsWarper(sampling.min_p))
    return [*made, *rare, Sampler(Sampling(1.0))]


def _rare(base: GenerationConfig, device: str) -> list[Any]:
    """What only transformers does, if a pack asks for it; after the usual ones, as there."""
    made: list[Any] = []
    if base.typical_p is not None and base.typical_p < 1:
        made.append(TypicalLogitsWarper(base.typical_p))
    if base.epsilon_cutoff:
        made.append(EpsilonLogitsWarper(base.epsilon_cutoff))
    if base.eta_cutoff:
        made.append(EtaLogitsWarper(base.eta_cutoff, device=device))
    return made


def config_of(base: GenerationConfig, max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The pack's configuration without what ``processors`` do."""
    config = copy.deepcopy(base)
    config.do_sample = False  # ``Sampler`` leaves one token
    for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
        setattr(config, name, None)
    config.return_dict_in_generate = True
    config.max_new_tokens = max_tokens
    config.max_length = None
    stops = stop_tokens(base, tokenizer)
    config.eos_token_id = stops or None
    if config.pad_token_id is None:
        config.pad_token_id = stops[0] if stops else 0
    return config


def stop_tokens(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All stop tokens of the generation config; the tokenizer's if it names none; empty if there is none."""
    eos = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    if eos is None:
        return []
    return list(eos) if isinstance(eos, (list, tuple)) else [eos]
