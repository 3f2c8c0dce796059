"""How tokens are chosen: what the library would choose, and OpenAI's penalties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import flashpack
from flashpack.errors import UsageError
from flashpack.runtime.generate import generate
from flashpack.runtime.sampling import Sampler, Sampling, config_of, processors
from flashpack.runtime.tokenizer import load_tokenizer
from tests.conftest import TRAINED, PackOf

IDS = [5, 6, 7, 90, 42]


@pytest.fixture(scope="module")
def model(pack_of: PackOf) -> PreTrainedModel:
    return flashpack.load(pack_of("qwen3_moe", "source", "source"), memory="smallest", context=64)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TRAINED)


CHOICES: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.4},
    {"temperature": 0.2, "top_p": 0.95},
    {"temperature": 3.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 4.0, "min_p": 0.001},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 10_000},
]


def librarys(scores: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1, min_p: float = 0) -> Any:
    """Probabilities [vocabulary] after transformers' warpers."""
    chain: list[Any] = [TemperatureLogitsWarper(temperature)]
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    left = scores[None].clone()
    for warper in chain:
        left = warper(torch.zeros(1, 1, dtype=torch.long), left)
    return left[0].double().softmax(0)


@pytest.mark.parametrize("options", CHOICES, ids=str)
@pytest.mark.parametrize(("vocabulary", "spread"), [(7, 1.0), (900, 2.0), (5000, 0.1), (50_000, 3.0)])
def test_tokens_have_the_probabilities_that_the_library_gives_them(
    options: dict[str, Any], vocabulary: int, spread: float
) -> None:
    """Flat ones, too, of which more are kept than are looked at first; and with tokens that are forbidden."""
    for seed, forbidden in ((0, 0), (1, vocabulary // 2), (2, vocabulary - 1)):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(vocabulary, generator=generator) * spread
        scores[torch.randperm(vocabulary, generator=generator)[:forbidden]] = -torch.inf
        expected = librarys(scores, **options)
        ids, weights = Sampler(Sampling(**options)).candidates(scores)
        found = torch.zeros(vocabulary, dtype=torch.float64)
        found[ids] = weights / weights.sum()
        # Where the sum of probabilities is nearly at its bound, rounding decides about a token.
        assert (found - expected).abs().sum() <= 2e-3
        assert abs(int((found > 0).sum()) - int((expected > 0).sum())) <= max(1, vocabulary // 200)
        sorted_out = (found > 0) != (expected > 0)
        assert sorted_out.sum() == 0 or options.get("top_p", 1) < 1


def test_a_draw_is_in_proportion_to_the_probabilities() -> None:
    scores = torch.tensor([[1.0, -torch.inf, 0.0, 2.0, -1.0]])
    draw = Sampler(Sampling(0.8))
    torch.manual_seed(3)
    counts = torch.zeros(5)
    for _ in range(20_000):
        chosen = draw(torch.zeros(1, 1), scores)
        assert chosen.isfinite().sum() == 1
        counts[chosen.argmax()] += 1
    expected = (scores[0] / 0.8).softmax(0)
    assert (counts / 20_000 - expected).abs().max() < 0.012  # more than three standard deviations
    assert counts[1] == 0


@pytest.mark.parametrize("scores", [[torch.nan, 1.0], [torch.inf, 1.0], [-torch.inf, -torch.inf]])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 2}])
def test_logits_that_are_no_numbers_are_said_to_be_none(scores: list[float], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not numbers"):
        Sampler(Sampling(1.0, **options))(torch.zeros(1, 1), torch.tensor([scores]))


def test_what_the_pack_says_of_repetition_holds(
    model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generate(model, tokenizer, IDS, 20, Sampling(0.3, seed=11)).tokens
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 100.0)
    found = generate(model, tokenizer, IDS, 20, Sampling(0.3, seed=11)).tokens
    assert len(set(found)) == len(found) == 20
    assert found != plain


def test_what_only_the_library_does_holds(
    model: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cutoff that leaves one token, the best one is chosen whatever the temperature."""
    greedy = generate(model, tokenizer, IDS, 12).tokens
    hot = Sampling(5.0, top_k=40, top_p=0.99, min_p=0.001, seed=2)
    assert generate(model, tokenizer, IDS, 12, hot).tokens != greedy
    monkeypatch.setattr(model.generation_config, "epsilon_cutoff", 0.999)
    assert generate(model, tokenizer, IDS, 12, hot).tokens == greedy
    names = [type(p).__name__ for p in processors(hot, 5, "cpu", model.generation_config)]
    kinds = ["Temperature", "TopK", "TopP", "MinP", "Epsilon"]
    assert names == [*(f"{kind}LogitsWarper" for kind in kinds), "Sampler"]
    config = GenerationConfig(typical_p=0.5, eta_cutoff=0.1)  # type: ignore[no-untyped-call]
    names = [type(p).__name__ for p in processors(Sampling(1.0), 5, "cpu", config)]
    assert names == ["TypicalLogitsWarper", "EtaLogitsWarper", "Sampler"]


def test_the_library_is_told_nothing_that_it_would_warn_of(tokenizer: Any) -> None:
    numbers = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "typical_p": 0.5}
    base = GenerationConfig(do_sample=True, epsilon_cutoff=0.1, eta_cutoff=0.1, **numbers)  # type: ignore[no-untyped-call]
    config: Any = config_of(base, 8, tokenizer)
    config.validate(strict=True)


def test_seeds_repeat_and_differ(model: PreTrainedModel, tokenizer: Any) -> None:
    drawn = [generate(model, tokenizer, IDS, 12, Sampling(2.0, seed=seed)).tokens for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_penalties_count_the_answer_only() -> None:
    (penalty,) = processors(Sampling(presence_penalty=0.5, frequency_penalty=0.25), 3, "cpu", GenerationConfig())  # type: ignore[no-untyped-call]
    scores = penalty(torch.tensor([[1, 2, 3, 4, 4, 2]]), torch.zeros(1, 6))
    assert scores.tolist() == [[0, 0, -0.75, 0, -1.0, 0]]


def test_neutral_values_do_nothing() -> None:
    assert processors(Sampling(), 3, "cpu", GenerationConfig()) == []  # type: ignore[no-untyped-call]
    ids, weights = Sampler(Sampling(temperature=1.0)).candidates(torch.tensor([0.0, 3.0, 0.0]))
    assert ids.tolist() == [0, 1, 2]
    assert weights.tolist() == pytest.approx([math.exp(-3), 1, math.exp(-3)])


def test_the_smallest_temperature_is_greedy(model: PreTrainedModel, tokenizer: Any) -> None:
    expected = generate(model, tokenizer, IDS, 8).tokens
    for temperature in (5e-324, 1e-30, 1e-6):
        assert generate(model, tokenizer, IDS, 8, Sampling(temperature)).tokens == expected
    assert generate(model, tokenizer, IDS, 8, Sampling(1e-5, seed=5)).tokens == expected  # and so is what follows


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_seeds_that_are_too_large_are_refused(seed: int) -> None:
    with pytest.raises(UsageError, match=f"--seed {seed}: from"):
        Sampling(seed=seed)


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_the_largest_seeds(model: PreTrainedModel, tokenizer: Any, seed: int) -> None:
    assert generate(model, tokenizer, IDS, 2, Sampling(1.0, seed=seed)).generated_tokens == 2


def test_what_the_pack_recommends() -> None:
    assert Sampling.of(GenerationConfig(do_sample=False, temperature=0.5)) == Sampling()  # type: ignore[no-untyped-call]
    recommended = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, min_p=0.1)  # type: ignore[no-untyped-call]
    assert Sampling.of(recommended) == Sampling(0.6, top_p=0.95, top_k=20, min_p=0.1)
