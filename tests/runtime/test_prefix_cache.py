"""Texts that were read before: what follows is what a fresh model says, whatever kind of state the family keeps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import flashpack
from flashpack.errors import UsageError
from flashpack.runtime.generate import Result, generate
from flashpack.runtime.kv import tensors
from flashpack.runtime.prefix_cache import Prefix, PrefixCache
from flashpack.runtime.sampling import Logprobs
from flashpack.runtime.tokenizer import load_tokenizer
from tests.conftest import TRAINED, PackOf

KINDS = {
    "qwen3_moe": False, "deepseek_v3": False, "mixtral": False,  # can be cut
    "trained": True, "qwen3_next": True, "gpt_oss": True,  # recurrent states, sliding windows
}  # fmt: skip
"""Packs of the tests, and whether they keep something that cannot be cut."""

A = [7, 30, 11, 90, 42, 18, 64, 5, 77, 101, 23, 9, 120, 33, 14, 55, 81, 6, 99, 70]
B = [44, 8, 150, 27, 61]
C = [13, 88, 19, 102, 36, 71]


@cache
def tokenizer() -> Any:
    return load_tokenizer(TRAINED)


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, pack_of: PackOf) -> PreTrainedModel:
    pack = pack_of(request.param, "source", "source")
    return flashpack.load(pack, memory="smallest", context=128, prefix_memory=2**24)


def say(model: PreTrainedModel, ids: list[int], tokens: int = 6, **options: Any) -> tuple[Result, list[float]]:
    """A result, and the log-probabilities of its tokens."""
    logprobs = Logprobs()
    result = generate(model, tokenizer(), ids, tokens, logprobs=logprobs, **options)
    return result, [one.logprob for one in logprobs.entries]


def assert_same(model: PreTrainedModel, ids: list[int], said: tuple[Result, list[float]]) -> None:
    """As if ``ids`` had been read from the beginning."""
    fresh, expected = say(model, ids)
    assert said[0].tokens == fresh.tokens
    assert torch.allclose(torch.tensor(said[1]), torch.tensor(expected), rtol=0, atol=1e-3)


def test_a_text_goes_on_where_it_ended(model: PreTrainedModel) -> None:
    prefix_cache = PrefixCache(0)
    first, _ = say(model, A, prefix_cache=prefix_cache)
    longer = [*A, *first.tokens, *B]
    said = say(model, longer, prefix_cache=prefix_cache)
    assert said[0].reused_tokens == len(A) + len(first.tokens) - 1
    assert said[0].store["steps"] == len(said[0].tokens)  # what is new of the prompt in one pass, then a token each
    assert_same(model, longer, said)


def test_another_text_goes_on_at_the_branch(model: PreTrainedModel) -> None:
    prefix_cache = PrefixCache(2**24)
    first, _ = say(model, A + B, prefix_cache=prefix_cache, branch=len(A))
    said = say(model, A + C, prefix_cache=prefix_cache, branch=len(A))
    assert said[0].reused_tokens == len(A)
    assert_same(model, A + C, said)
    longer = [*A, *B, *first.tokens, *C]
    again = say(model, longer, prefix_cache=prefix_cache)  # the first is still there
    assert again[0].reused_tokens == len(longer) - len(C) - 1
    assert_same(model, longer, again)


def test_what_cannot_be_cut_begins_anew(pack_of: PackOf) -> None:
    for name, uncut in KINDS.items():
        model = flashpack.load(pack_of(name, "source", "source"), memory="smallest", context=128)
        prefix_cache = PrefixCache(0)
        say(model, A + B, prefix_cache=prefix_cache)
        said = say(model, A + C, prefix_cache=prefix_cache)
        assert said[0].reused_tokens == (0 if uncut else len(A))
        assert_same(model, A + C, said)


def test_a_mark_is_used_again_and_again(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("trained", "source", "source"), memory="smallest", context=128, prefix_memory=0)
    prefix_cache = PrefixCache(model.flashpack.prefix_memory)  # no room for a copy: the same one goes back and forth
    for end in (B, C, B[::-1], C[::-1]):
        said = say(model, A + end, prefix_cache=prefix_cache, branch=len(A))
        assert said[0].reused_tokens == (0 if end is B else len(A))
        assert_same(model, A + end, said)
        assert len(prefix_cache._kept) == 1


def test_marks_of_a_text_that_was_left_are_forgotten(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("trained", "source", "source"), memory="smallest", context=128, prefix_memory=0)
    prefix_cache = PrefixCache(2 * model.flashpack.prefix_memory)  # two marks, and no room for a copy
    say(model, A + B, prefix_cache=prefix_cache, branch=len(A))
    say(model, A + B + C, prefix_cache=prefix_cache, branch=len(A + B))
    assert set(prefix_cache._kept[-1].marks) == {len(A), len(A + B)}
    say(model, A + C + B, prefix_cache=prefix_cache)
    other = [*A, *C, 7, 7, 7]
    said = say(model, other, prefix_cache=prefix_cache)
    assert said[0].reused_tokens == len(A)
    assert_same(model, other, said)


def test_a_mark_behind_what_is_shared_is_not_used(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("trained", "source", "source"), memory="smallest", context=128, prefix_memory=0)
    prefix_cache = PrefixCache(model.flashpack.prefix_memory)
    say(model, A + B, prefix_cache=prefix_cache, branch=len(A))
    other = A[:-2] + C
    said = say(model, other, prefix_cache=prefix_cache)
    assert said[0].reused_tokens == 0
    assert_same(model, other, said)


def test_the_same_text_again_reads_its_last_token_only(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("qwen3_moe", "source", "source"), memory="smallest", context=128)
    prefix_cache = PrefixCache(0)
    first, _ = say(model, A, prefix_cache=prefix_cache)
    said = say(model, A, prefix_cache=prefix_cache)
    assert said[0].reused_tokens == len(A) - 1
    assert said[0].tokens == first.tokens


def test_nobody_is_given_anothers_text(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("qwen3_moe", "source", "source"), memory="smallest", context=128)
    prefix_cache = PrefixCache(2**24)
    for ids in (A, C, B, A + B):
        assert_same(model, ids, say(model, ids, prefix_cache=prefix_cache))
    assert say(model, [1, *A], prefix_cache=prefix_cache)[0].reused_tokens == 0


def test_what_is_kept_stays_within_its_limit(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("qwen3_moe", "source", "source"), memory="smallest", context=128)
    one = PrefixCache(2**30)
    say(model, A, prefix_cache=one)
    for kept in one._kept:
        kept.compact()
    size = one._bytes()
    assert size > 0
    prefix_cache = PrefixCache(2 * size)
    texts = [[k, *A[1:]] for k in range(1, 6)]
    for ids in texts:
        say(model, ids, prefix_cache=prefix_cache)
        assert prefix_cache._bytes() - prefix_cache._kept[-1].nbytes() <= 2 * size
    # The last one, and two more beside it; the others have been forgotten.
    assert [prefix_cache._kept[i].ids[0] for i in range(3)] == [3, 4, 5]


def test_marks_stay_within_the_limit(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("trained", "source", "source"), memory="smallest", context=128)
    none = PrefixCache(0)
    say(model, A + B, prefix_cache=none, branch=len(A))
    assert not none._kept[-1].marks
    many = PrefixCache(2**30)
    say(model, A + B, prefix_cache=many, branch=len(A))
    size = many._kept[-1].marked_bytes()
    assert size > 0
    small = PrefixCache(size)
    say(model, A + B, prefix_cache=small, branch=len(A))
    said, _ = say(model, A + B + C, prefix_cache=small, branch=len(A + B))
    assert said.reused_tokens == len(A)  # the answer went another way
    assert list(small._kept[-1].marks) == [len(A + B)]


def counting(limit: int) -> Callable[[], bool]:
    asked = iter(range(limit))
    return lambda: next(asked, None) is None


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5])
def test_a_prompt_can_be_cancelled(model: PreTrainedModel, after: int) -> None:
    prefix_cache = PrefixCache(2**24)
    first, _ = say(model, A, prefix_cache=prefix_cache, branch=len(A) - 3)
    longer = [*A, *first.tokens, *B]
    cancelled, _ = say(model, longer, prefix_cache=prefix_cache, cancelled=counting(after))
    assert cancelled.finish == "cancelled"
    assert cancelled.tokens == [] or after > 1
    assert model(torch.tensor([B])).logits.isfinite().all()  # nobody is asked any more
    said = say(model, longer, prefix_cache=prefix_cache)
    assert said[0].reused_tokens >= len(A) - 3
    assert_same(model, longer, said)
    assert_same(model, longer, say(model, longer))  # the store works on


def test_cancelling_is_asked_for_before_layers_of_the_prompt_and_after_tokens(model: PreTrainedModel) -> None:
    asked: list[bool] = []
    whole: Any = model
    said, _ = say(model, A, cancelled=lambda: bool(asked.append(False)))
    assert len(asked) == len(whole.flashpack.pack.manifest.layers) + len(said.tokens)


def test_an_answer_can_be_cancelled_and_continued(model: PreTrainedModel) -> None:
    prefix_cache = PrefixCache(0)
    seen: list[str] = []
    cut, _ = say(model, A, 20, prefix_cache=prefix_cache, on_text=seen.append, cancelled=lambda: len(seen) >= 3)
    assert cut.finish == "cancelled"
    assert 3 <= len(cut.tokens) < 20
    assert cut.text == "".join(seen)
    longer = [*A, *cut.tokens, *B]
    said = say(model, longer, prefix_cache=prefix_cache)
    assert said[0].reused_tokens == len(A) + len(cut.tokens) - 1
    assert_same(model, longer, said)


def test_an_error_of_the_caller_leaves_a_sound_state(model: PreTrainedModel) -> None:
    prefix_cache = PrefixCache(2**24)

    def gone(piece: str) -> None:
        raise UsageError("the reader is gone")

    with pytest.raises(UsageError, match="gone"):
        say(model, A + B, prefix_cache=prefix_cache, branch=len(A), on_text=gone)
    assert_same(model, A + C, say(model, A + C, prefix_cache=prefix_cache))


def test_long_prompts_are_read_in_the_chunks_of_run(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits with and without prefix_cache, where nothing is reused and nothing branches off."""
    monkeypatch.setattr("flashpack.runtime.budget.PROMPT_CHUNK", 8)
    monkeypatch.setattr("flashpack.runtime.generate.PROMPT_CHUNK", 8)
    for name in ("trained", "qwen3_moe"):
        model = flashpack.load(pack_of(name, "source", "source"), memory="smallest", context=128)
        assert model.generation_config.prefill_chunk_size == 8
        plain, read = say(model, A + B), say(model, A + B, prefix_cache=PrefixCache(0))
        assert plain[1] == read[1]
        assert plain[0].store["steps"] == read[0].store["steps"] == 4 + len(plain[0].tokens) - 1


def test_an_empty_one_can_be_given_back() -> None:
    prefix_cache = PrefixCache(0)
    prefix_cache.give(Prefix())
    assert prefix_cache.take(A).ids == []


def test_what_is_shared_with_a_long_text_takes_no_more_than_it_needs(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("qwen3_moe", "source", "source"), memory="smallest", context=128)
    prefix_cache = PrefixCache(2**30)
    say(model, A + B + C, 40, prefix_cache=prefix_cache)
    long = prefix_cache._kept[0]
    short = long.copied(len(A))
    size = short.nbytes() / len(A)
    assert size == pytest.approx(Prefix.nbytes(long.copied(len(A) // 2)) / (len(A) // 2))
    assert sum(t.untyped_storage().nbytes() for t in tensors(short.cache)) == short.nbytes()
    assert long.usable([*A, *B, *C, 5]) == len(A + B + C)  # and the long one is as it was
