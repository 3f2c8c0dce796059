"""The official OpenAI client against the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from flashpack.runtime.messages import encode_prompt
from flashpack.runtime.sampling import Sampling
from tests.conftest import PackOf
from tests.serving import ALARM, CALCULATOR, SUM, Served, served, session_of, until

USER = [{"role": "user", "content": "Tell me about the weather."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server(pack_of: PackOf) -> Iterator[Served]:
    with served(session_of(pack_of("trained"))) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, **how: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "any", "messages": USER, "temperature": 0, "max_tokens": 24} | how
    )


def test_an_answer_is_the_sessions_own(server: Served, client: openai.OpenAI) -> None:
    _, alone = server.session.answer(USER, sampling=Sampling(), max_tokens=24)
    answer = chat(client)
    assert answer.choices[0].message.content == alone.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == alone.prompt_tokens
    assert answer.usage.completion_tokens == 24
    again = chat(client)
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert again.choices[0].message.content == alone.text


def test_streaming(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == chat(client).choices[0].message.content
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 24
    assert len({c.id for c in chunks}) == 1
    assert not any(c.usage for c in chat(client, stream=True))


def test_tools(client: openai.OpenAI) -> None:
    answer = chat(client, messages=SUM, tools=[CALCULATOR], max_tokens=60)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.id.startswith("call_")
    assert (call.function.name, json.loads(call.function.arguments)) == ("calculator", {"expression": "922 + 291"})
    later = [*SUM, choice.message.model_dump(exclude_none=True)]
    later.append({"role": "tool", "tool_call_id": call.id, "content": "1213"})
    assert chat(client, messages=later, tools=[CALCULATOR]).choices[0].message.role == "assistant"


def test_streamed_tools(client: openai.OpenAI) -> None:
    chunks = list(chat(client, messages=SUM, tools=[CALCULATOR], max_tokens=60, stream=True))
    calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
    assert [(c.index, c.function.name) for c in calls] == [(0, "calculator")]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "set_alarm"}}])
def test_required_tools_are_called_as_their_schema_says(client: openai.OpenAI, choice: Any) -> None:
    tools = [ALARM] if choice == "required" else [CALCULATOR, ALARM]
    answer = chat(client, messages=SUM, tools=tools, tool_choice=choice, max_tokens=100, parallel_tool_calls=False)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "set_alarm"
    assert set(arguments) == {"hour", "day"}
    assert 0 <= arguments["hour"] <= 23
    assert arguments["day"] in ("Monday", "Tuesday")


def test_references_in_the_schema_of_a_tool(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"day": {"$ref": "#/$defs/Day"}},
        "required": ["day"],
        "$defs": {"Day": {"enum": ["Monday", "Tuesday"]}},
    }
    tool = {"type": "function", "function": {"name": "remind", "parameters": schema}}
    answer = chat(client, tools=[tool], tool_choice="required", max_tokens=60, parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments)["day"] in ("Monday", "Tuesday")


def test_no_tools_are_called_where_none_may_be(client: openai.OpenAI) -> None:
    answer = chat(client, messages=SUM, tools=[CALCULATOR], tool_choice="none")
    assert answer.choices[0].message.tool_calls is None
    assert "<tool_call>" not in answer.choices[0].message.content


def test_json_of_a_schema(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    for how in ({"temperature": 0}, {"temperature": 1.5, "seed": 1}, {"temperature": 1.5, "seed": 2}):
        answer = chat(client, response_format=form, max_tokens=200, **how)
        person = json.loads(answer.choices[0].message.content)
        assert answer.choices[0].finish_reason == "stop"
        assert set(person) == {"name", "age"}
        assert type(person["age"]) is int


def test_numbers_of_a_schema_may_be_large(client: openai.OpenAI) -> None:
    schema = {"type": "integer", "minimum": 0, "maximum": 10**40}
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    answer = chat(client, response_format=form, max_tokens=60)
    assert int(answer.choices[0].message.content) >= 0


def test_any_json(client: openai.OpenAI) -> None:
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=400)
    assert answer.choices[0].message.content.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_stop(client: openai.OpenAI) -> None:
    text = chat(client).choices[0].message.content
    stop = text[8:11]
    answer = chat(client, stop=[stop, "never there"])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_log_probabilities(client: openai.OpenAI) -> None:
    whole = chat(client, logprobs=True, top_logprobs=3).choices[0]
    entries = whole.logprobs.content
    assert len(entries) == 24
    assert "".join(e.token for e in entries) == whole.message.content
    assert all(e.logprob == e.top_logprobs[0].logprob for e in entries)
    assert all(len(e.top_logprobs) == 3 for e in entries)
    chunks = chat(client, logprobs=True, top_logprobs=3, stream=True)
    streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in entries]
    assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in entries], abs=1e-3)


def test_the_seed_decides(client: openai.OpenAI) -> None:
    def said(seed: int | None) -> str:
        return str(chat(client, temperature=2, seed=seed).choices[0].message.content)

    assert said(7) == said(7)
    assert len({said(7), said(8), said(None)}) == 3


def test_penalties_change_the_answer(client: openai.OpenAI) -> None:
    def repeated(penalty: float) -> float:
        answer = client.completions.create(
            model="any", prompt="the the the the the", max_tokens=40, temperature=0, frequency_penalty=penalty
        )
        words = answer.choices[0].text.split()
        return len(set(words)) / len(words)

    assert repeated(2) > repeated(0)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_completions(server: Served, client: openai.OpenAI) -> None:
    ids = encode_prompt(server.session.tokenizer, "The weather", raw=True)
    alone = server.session.complete(ids, max_tokens=12, sampling=Sampling())
    how: Any = {"model": "any", "max_tokens": 12, "temperature": 0}
    answer = client.completions.create(prompt="The weather", logprobs=2, **how)
    assert answer.choices[0].text == alone.text
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == alone.text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
    assert client.completions.create(prompt=ids, **how).choices[0].text == alone.text
    pieces = client.completions.create(prompt="The weather", stream=True, **how)
    assert "".join(p.choices[0].text for p in pieces) == alone.text


@pytest.mark.parametrize(
    ("how", "param"),
    [
        ({"n": 2}, "n"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
        ),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"tool_choice": {"type": "function", "function": {"name": "none"}}, "tools": [CALCULATOR]}, "tool_choice"),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, "chat_template_kwargs"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strange"}}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"enum": ["x" * 1000] * 100}},
                }
            },
            "response_format.json_schema.schema",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(client: openai.OpenAI, how: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **how)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == param
    assert "\n" not in caught.value.body["message"]  # type: ignore[index]


def test_tokens_that_the_model_has_not(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="token 4096: the model has 4096") as caught:
        client.completions.create(model="any", prompt=[1, 4096])
    assert caught.value.param == "prompt"


def test_a_prompt_beyond_the_context(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, messages=[{"role": "user", "content": "one two " * 3000}], stream=stream)
        assert caught.value.code == "context_length_exceeded"


def test_a_client_that_leaves_cancels(server: Served, client: openai.OpenAI) -> None:
    before = cancelled(server)
    stream = chat(client, max_tokens=2000, temperature=1, stream=True, stop=None, extra_body={"min_p": 0.0})
    next(iter(stream))
    stream.close()
    until(lambda: cancelled(server) == before + 1)
    assert chat(client).choices[0].finish_reason == "length"


def cancelled(server: Served) -> float:
    return server.service.metrics.registry.get_sample_value(
        "flashpack_generations_total", {"finish": "cancelled"}
    ) or 0.0  # fmt: skip
