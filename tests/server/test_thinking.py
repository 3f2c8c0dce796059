"""A chat template that begins thoughts: they come apart, the switch is honoured, and a given form counts after them.

The bundled model does not think: its first tokens are chosen for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from flashpack.runtime import sampling
from tests.conftest import PackOf
from tests.serving import CALCULATOR, SUM, Served, served, session_of

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    "{% endif %}{# <tool_call> #}"
)
FORM: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"sum": {"enum": [1213]}},
            "required": ["sum"],
            "additionalProperties": False,
        },
    },
}
OFF = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}


class Script(LogitsProcessor):
    """The first tokens of the answer."""

    def __init__(self, prompt: int, tokens: list[int]) -> None:
        self._prompt, self._tokens = prompt, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at = input_ids.shape[1] - self._prompt
        if at >= len(self._tokens):
            return scores
        assert scores[0, self._tokens[at]] > -torch.inf  # thoughts are free
        forced = torch.full_like(scores, -torch.inf)
        forced[0, self._tokens[at]] = 0
        return forced


@pytest.fixture(scope="module")
def server(pack_of: PackOf) -> Iterator[Served]:
    session = session_of(pack_of("trained"))
    session.tokenizer.chat_template = TEMPLATE
    with served(session) as made:
        yield made


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def thinks(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = server.session.tokenizer("two numbers</think>", add_special_tokens=False)["input_ids"]
    real = sampling.processors

    def processors(how: Any, prompt: int, *others: Any) -> list[Any]:
        return [Script(prompt, ids), *real(how, prompt, *others)]

    monkeypatch.setattr("flashpack.runtime.generate.processors", processors)


def message(client: openai.OpenAI, **how: Any) -> Any:
    options = {"model": "any", "messages": SUM, "temperature": 0, "max_tokens": 40} | how
    return client.chat.completions.create(**options).choices[0].message


@pytest.mark.usefixtures("thinks")
def test_thoughts_come_apart(client: openai.OpenAI) -> None:
    said = message(client)
    assert said.reasoning_content == "two numbers"
    assert "</think>" not in said.content
    assert said.content


@pytest.mark.usefixtures("thinks")
def test_thoughts_come_apart_in_a_stream(client: openai.OpenAI) -> None:
    stream: Any = client.chat.completions.create(
        model="any",
        messages=SUM,
        temperature=0,
        max_tokens=40,
        stream=True,  # type: ignore[arg-type]
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    thought = [i for i, d in enumerate(deltas) if getattr(d, "reasoning_content", None)]
    said = [i for i, d in enumerate(deltas) if d.content]
    assert "".join(deltas[i].reasoning_content for i in thought) == "two numbers"
    assert max(thought) < min(said)


@pytest.mark.usefixtures("thinks")
def test_a_given_form_counts_after_the_thoughts(client: openai.OpenAI) -> None:
    said = message(client, response_format=FORM)
    assert said.reasoning_content == "two numbers"
    assert json.loads(said.content) == {"sum": 1213}


@pytest.mark.usefixtures("thinks")
def test_a_required_call_comes_after_the_thoughts(client: openai.OpenAI) -> None:
    said = message(client, tools=[CALCULATOR], tool_choice="required")
    assert said.reasoning_content == "two numbers"
    assert said.tool_calls[0].function.name == "calculator"


def test_without_thoughts_the_form_counts_at_once(client: openai.OpenAI) -> None:
    said = message(client, response_format=FORM, **OFF)
    assert not getattr(said, "reasoning_content", None)
    assert json.loads(said.content) == {"sum": 1213}
    assert message(client, response_format=FORM, reasoning_effort="none").content == said.content
