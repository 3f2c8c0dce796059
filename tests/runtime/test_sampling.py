"""How tokens are chosen: what the library would choose, and OpenAI's penalties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

import flashpack
from flashpack.errors import UsageError
from flashpack.runtime.generate import generate
from flashpack.runtime.sampling import Sampling, processors
from flashpack.runtime.tokenizer import load_tokenizer
from tests.conftest import TRAINED, PackOf

IDS = [5, 6, 7, 90, 42]


@pytest.fixture(scope="module")
def model(pack_of: PackOf) -> PreTrainedModel:
    return flashpack.load(pack_of("qwen3_moe", "source", "source"), memory="smallest", context=64)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TRAINED)


@pytest.mark.parametrize(
    ("options", "repetition"),
    [
        ({"temperature": 0.7}, None),
        ({"temperature": 1.3, "top_k": 5}, None),
        ({"temperature": 1.0, "top_p": 0.4}, None),
        ({"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.02}, None),
        ({"temperature": 1.0}, 1.5),  # what the pack says of it holds
    ],
)
def test_the_library_draws_the_same(
    model: PreTrainedModel, tokenizer: Any, options: dict[str, Any], repetition: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(model.generation_config, "repetition_penalty", repetition)
    found = generate(model, tokenizer, IDS, 20, Sampling(seed=11, **options)).tokens
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True, max_new_tokens=20, pad_token_id=0, eos_token_id=model.generation_config.eos_token_id,
        repetition_penalty=repetition, **({"top_k": 0} | options),
    )  # fmt: skip
    torch.manual_seed(11)
    whole: Any = model
    inputs = torch.tensor([IDS])
    expected = whole.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    assert found == expected[0, len(IDS) :].tolist()


def test_seeds_repeat_and_differ(model: PreTrainedModel, tokenizer: Any) -> None:
    drawn = [generate(model, tokenizer, IDS, 12, Sampling(2.0, seed=seed)).tokens for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_penalties_count_the_answer_only() -> None:
    (penalty,) = processors(Sampling(presence_penalty=0.5, frequency_penalty=0.25), 3, "cpu")
    scores = penalty(torch.tensor([[1, 2, 3, 4, 4, 2]]), torch.zeros(1, 6))
    assert scores.tolist() == [[0, 0, -0.75, 0, -1.0, 0]]


def test_neutral_values_do_nothing() -> None:
    assert processors(Sampling(), 3, "cpu") == []
    assert processors(Sampling(temperature=1.0), 3, "cpu") == []


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
