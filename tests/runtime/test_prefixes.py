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
from flashpack.runtime.prefixes import Prefix, Prefixes
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
    return flashpack.load(pack_of(request.param, "source", "source"), memory="smallest", context=128, saved=2**24)


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
    prefixes = Prefixes(0)
    first, _ = say(model, A, prefixes=prefixes)
    longer = [*A, *first.tokens, *B]
    said = say(model, longer, prefixes=prefixes)
    assert said[0].reused_tokens == len(A) + len(first.tokens) - 1
    assert said[0].store["steps"] == len(said[0].tokens)  # what is new of the prompt in one pass, then a token each
    assert_same(model, longer, said)


def test_another_text_goes_on_at_the_branch(model: PreTrainedModel) -> None:
    prefixes = Prefixes(2**24)
    first, _ = say(model, A + B, prefixes=prefixes, branch=len(A))
    said = say(model, A + C, prefixes=prefixes, branch=len(A))
    assert said[0].reused_tokens == len(A)
    assert_same(model, A + C, said)
    longer = [*A, *B, *first.tokens, *C]
    again = say(model, longer, prefixes=prefixes)  # the first is still there
    assert again[0].reused_tokens == len(longer) - len(C) - 1
    assert_same(model, longer, again)


def test_what_cannot_be_cut_begins_anew(pack_of: PackOf) -> None:
    for name, uncut in KINDS.items():
        model = flashpack.load(pack_of(name, "source", "source"), memory="smallest", context=128)
        prefixes = Prefixes(0)
        say(model, A + B, prefixes=prefixes)
        said = say(model, A + C, prefixes=prefixes)
        assert said[0].reused_tokens == (0 if uncut else len(A))
        assert_same(model, A + C, said)


def test_a_mark_is_used_again_and_again(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("trained", "source", "source"), memory="smallest", context=128, saved=0)
    prefixes = Prefixes(model.flashpack.saved)  # no room for a copy: the same one goes back and forth
    for end in (B, C, B[::-1], C[::-1]):
        said = say(model, A + end, prefixes=prefixes, branch=len(A))
        assert said[0].reused_tokens == (0 if end is B else len(A))
        assert_same(model, A + end, said)
        assert len(prefixes._kept) == 1


def test_marks_of_a_text_that_was_left_are_forgotten(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("trained", "source", "source"), memory="smallest", context=128, saved=0)
    prefixes = Prefixes(2 * model.flashpack.saved)  # two marks, and no room for a copy
    say(model, A + B, prefixes=prefixes, branch=len(A))
    say(model, A + B + C, prefixes=prefixes, branch=len(A + B))
    assert set(prefixes._kept[-1].marks) == {len(A), len(A + B)}
    say(model, A + C + B, prefixes=prefixes)
    other = [*A, *C, 7, 7, 7]
    said = say(model, other, prefixes=prefixes)
    assert said[0].reused_tokens == len(A)
    assert_same(model, other, said)


def test_a_mark_behind_what_is_shared_is_not_used(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("trained", "source", "source"), memory="smallest", context=128, saved=0)
    prefixes = Prefixes(model.flashpack.saved)
    say(model, A + B, prefixes=prefixes, branch=len(A))
    other = A[:-2] + C
    said = say(model, other, prefixes=prefixes)
    assert said[0].reused_tokens == 0
    assert_same(model, other, said)


def test_the_same_text_again_reads_its_last_token_only(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("qwen3_moe", "source", "source"), memory="smallest", context=128)
    prefixes = Prefixes(0)
    first, _ = say(model, A, prefixes=prefixes)
    said = say(model, A, prefixes=prefixes)
    assert said[0].reused_tokens == len(A) - 1
    assert said[0].tokens == first.tokens


def test_nobody_is_given_anothers_text(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("qwen3_moe", "source", "source"), memory="smallest", context=128)
    prefixes = Prefixes(2**24)
    for ids in (A, C, B, A + B):
        assert_same(model, ids, say(model, ids, prefixes=prefixes))
    assert say(model, [1, *A], prefixes=prefixes)[0].reused_tokens == 0


def test_what_is_kept_stays_within_its_limit(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("qwen3_moe", "source", "source"), memory="smallest", context=128)
    one = Prefixes(2**30)
    say(model, A, prefixes=one)
    for kept in one._kept:
        kept.compact()
    size = one._bytes()
    assert size > 0
    prefixes = Prefixes(2 * size)
    texts = [[k, *A[1:]] for k in range(1, 6)]
    for ids in texts:
        say(model, ids, prefixes=prefixes)
        assert prefixes._bytes() - prefixes._kept[-1].nbytes() <= 2 * size
    # The last one, and two more beside it; the others have been forgotten.
    assert [prefixes._kept[i].ids[0] for i in range(3)] == [3, 4, 5]


def test_marks_stay_within_the_limit(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("trained", "source", "source"), memory="smallest", context=128)
    none = Prefixes(0)
    say(model, A + B, prefixes=none, branch=len(A))
    assert not none._kept[-1].marks
    many = Prefixes(2**30)
    say(model, A + B, prefixes=many, branch=len(A))
    size = many._kept[-1].marked_bytes()
    assert size > 0
    small = Prefixes(size)
    say(model, A + B, prefixes=small, branch=len(A))
    said, _ = say(model, A + B + C, prefixes=small, branch=len(A + B))
    assert said.reused_tokens == len(A)  # the answer went another way
    assert list(small._kept[-1].marks) == [len(A + B)]


def counting(limit: int) -> Callable[[], bool]:
    asked = iter(range(limit))
    return lambda: next(asked, None) is None


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5])
def test_a_prompt_can_be_cancelled(model: PreTrainedModel, after: int) -> None:
    prefixes = Prefixes(2**24)
    first, _ = say(model, A, prefixes=prefixes, branch=len(A) - 3)
    longer = [*A, *first.tokens, *B]
    cancelled, _ = say(model, longer, prefixes=prefixes, cancelled=counting(after))
    assert cancelled.finish == "cancelled"
    assert cancelled.tokens == [] or after > 1
    said = say(model, longer, prefixes=prefixes)
    assert said[0].reused_tokens >= len(A) - 3
    assert_same(model, longer, said)
    assert_same(model, longer, say(model, longer))  # the store works on


def test_an_answer_can_be_cancelled_and_continued(model: PreTrainedModel) -> None:
    prefixes = Prefixes(0)
    seen: list[str] = []
    cut, _ = say(model, A, 20, prefixes=prefixes, on_text=seen.append, cancelled=lambda: len(seen) >= 3)
    assert cut.finish == "cancelled"
    assert 3 <= len(cut.tokens) < 20
    assert cut.text == "".join(seen)
    longer = [*A, *cut.tokens, *B]
    said = say(model, longer, prefixes=prefixes)
    assert said[0].reused_tokens == len(A) + len(cut.tokens) - 1
    assert_same(model, longer, said)


def test_an_error_of_the_caller_leaves_a_sound_state(model: PreTrainedModel) -> None:
    prefixes = Prefixes(2**24)

    def gone(piece: str) -> None:
        raise UsageError("the reader is gone")

    with pytest.raises(UsageError, match="gone"):
        say(model, A + B, prefixes=prefixes, branch=len(A), on_text=gone)
    assert_same(model, A + C, say(model, A + C, prefixes=prefixes))


def test_long_prompts_are_read_in_the_chunks_of_run(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits with and without prefixes, where nothing is reused and nothing branches off."""
    monkeypatch.setattr("flashpack.runtime.budget.PROMPT_CHUNK", 8)
    monkeypatch.setattr("flashpack.runtime.generate.PROMPT_CHUNK", 8)
    for name in ("trained", "qwen3_moe"):
        model = flashpack.load(pack_of(name, "source", "source"), memory="smallest", context=128)
        assert model.generation_config.prefill_chunk_size == 8
        plain, read = say(model, A + B), say(model, A + B, prefixes=Prefixes(0))
        assert plain[1] == read[1]
        assert plain[0].store["steps"] == read[0].store["steps"] == 4 + len(plain[0].tokens) - 1


def test_an_empty_one_can_be_given_back() -> None:
    prefixes = Prefixes(0)
    prefixes.give(Prefix())
    assert prefixes.take(A).ids == []


def test_what_is_shared_with_a_long_text_takes_no_more_than_it_needs(pack_of: PackOf) -> None:
    model = flashpack.load(pack_of("qwen3_moe", "source", "source"), memory="smallest", context=128)
    prefixes = Prefixes(2**30)
    say(model, A + B + C, 40, prefixes=prefixes)
    long = prefixes._kept[0]
    short = long.copied(len(A))
    size = short.nbytes() / len(A)
    assert size == pytest.approx(Prefix.nbytes(long.copied(len(A) // 2)) / (len(A) // 2))
    assert sum(t.untyped_storage().nbytes() for t in tensors(short.cache)) == short.nbytes()
    assert long.usable([*A, *B, *C, 5]) == len(A + B + C)  # and the long one is as it was
