"""Tokens to text: nothing is lost, nothing comes twice, nothing comes before it is sure."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashpack.runtime.sampling import Logprobs
from flashpack.runtime.stream import Text
from flashpack.runtime.tokenizer import load_tokenizer
from tests.conftest import TRAINED

END = 2


@cache
def tokenizer() -> Any:
    return load_tokenizer(TRAINED)


def tokens_of(text: str) -> list[int]:
    return list(tokenizer()(text, add_special_tokens=False)["input_ids"])


def stream(tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[Text, list[str]]:
    pieces: list[str] = []
    text = Text(tokenizer(), pieces.append, {END}, stop)
    for token in tokens:
        text.put(token)
        if text.stopped:
            break
    text.end()
    assert "".join(pieces) == text.all
    return text, pieces


@given(st.text(max_size=60))
def test_pieces_make_the_text(text: str) -> None:
    tokens = tokens_of(text)
    assert stream(tokens)[0].all == tokenizer().decode(tokens)


@given(st.lists(st.integers(0, 4095).filter(lambda token: token != END), max_size=30))
def test_pieces_of_any_tokens_make_what_the_tokenizer_says(tokens: list[int]) -> None:
    found, whole = stream(tokens)[0].all, tokenizer().decode(tokens)
    # Bytes that are no character are decoded one by one where the stream ends, together in the whole.
    assert found.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_every_token_is_heard_at_once() -> None:
    tokens = tokens_of("The quick brown fox")
    assert len(stream(tokens)[1]) == len(tokens)


def test_an_incomplete_character_waits() -> None:
    tokens = tokens_of("a🎈b")
    assert len(tokens) > 3
    _, pieces = stream(tokens)
    assert pieces == ["a", "🎈", "b"]


def test_an_incomplete_character_at_the_end_is_said() -> None:
    assert stream(tokens_of("a🎈")[:-1])[0].all == "a\ufffd"


def test_end_tokens_are_no_text() -> None:
    assert stream([*tokens_of("yes"), END])[0].all == "yes"


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("wo t",), "one t"),
        ("one two three", ("three", "two"), "one "),
        ("one two three", ("x",), "one two three"),
        ("one two thr", ("three",), "one two thr"),
        ("aaab", ("aab",), "a"),
        ("abababc", ("ababc",), "ab"),
        ("one two", ("one",), ""),
    ],
)
def test_stop_texts_end_it(text: str, stop: tuple[str, ...], left: str) -> None:
    found, pieces = stream(tokens_of(text), stop)
    assert found.all == left
    assert found.stopped == (left != text)
    assert not any(s in "".join(pieces) for s in stop)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_first_stop_text_ends_it(text: str, stop: list[str]) -> None:
    ends = [i for i in range(len(text)) if any(text.startswith(s, i) for s in stop)]
    found = stream(tokens_of(text), tuple(stop))[0]
    if not ends:
        assert found.all == text
        return
    # Of two that overlap, the one that is complete first.
    first = min((text.find(s) + len(s), text.find(s)) for s in stop if s in text)
    assert found.all in {text[:i] for i in ends}
    assert len(found.all) <= first[1]


def test_an_error_of_the_listener_is_marked() -> None:
    def fail(piece: str) -> None:
        raise OSError("gone")

    text = Text(tokenizer(), fail, {END})
    with pytest.raises(OSError, match="gone"):
        text.put(tokens_of("x")[0])
    assert text.handing_over


def test_log_probabilities_are_taken_for_each_token() -> None:
    import torch

    logprobs = Logprobs(top=2)
    text = Text(tokenizer(), None, {END}, logprobs=logprobs)
    for token in (5, 7):
        scores = torch.full((1, 10), -5.0)
        scores[0, token], scores[0, 3] = 2.0, 1.0
        assert logprobs(torch.zeros(1, 1), scores) is scores
        text.put(token)
    assert [one.token for one in logprobs.entries] == [5, 7]
    first = logprobs.entries[0]
    assert first.top == [(5, pytest.approx(first.logprob)), (3, pytest.approx(first.logprob - 1))]
    assert 0 > first.logprob > -1


class SentencePieces:
    """A tokenizer whose texts have no space at their beginning, as SentencePiece's have not."""

    PIECES = ("▁one", "▁two", "", "▁three")

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.PIECES[token] for token in tokens).replace("▁", " ").removeprefix(" ")


def test_words_keep_their_distance() -> None:
    tokenizer: Any = SentencePieces()
    pieces: list[str] = []
    text = Text(tokenizer, pieces.append, {END})
    tokens = [0, 1, *[3] * 12]
    for token in tokens:
        text.put(token)
    text.end()
    assert text.all == "one two" + " three" * 12
    assert pieces[:3] == ["one", " two", " three"]
