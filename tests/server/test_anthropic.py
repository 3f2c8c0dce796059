"""The official Anthropic client against the server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from flashpack.runtime.sampling import Sampling
from tests.conftest import PackOf
from tests.serving import ALARM, CALCULATOR, SUM, Served, served, session_of, until

USER = [{"role": "user", "content": "Tell me about the weather."}]


def tool(function: dict[str, Any]) -> dict[str, Any]:
    given = function["function"]
    return {"name": given["name"], "input_schema": given["parameters"]}


@pytest.fixture(scope="module")
def server(pack_of: PackOf) -> Iterator[Served]:
    with served(session_of(pack_of("trained")), key="secret") as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as made:
        yield made


def ask(client: anthropic.Anthropic, temperature: float = 0, **how: Any) -> Any:
    base: dict[str, Any] = {"model": "any", "messages": USER, "max_tokens": 24}
    return client.messages.create(**base | how, extra_body={"temperature": temperature})


def test_an_answer_is_the_sessions_own(server: Served, client: anthropic.Anthropic) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *USER]
    _, alone = server.session.answer(messages, sampling=Sampling(), max_tokens=24)
    answer = ask(client, system="Be brief.")
    assert [block.text for block in answer.content] == [alone.text]
    assert answer.stop_reason == "max_tokens"
    assert answer.usage.output_tokens == 24
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == alone.prompt_tokens


def test_streaming(client: anthropic.Anthropic) -> None:
    how: Any = {"model": "any", "messages": USER, "max_tokens": 24}
    with client.messages.stream(extra_body={"temperature": 0}, **how) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == ask(client).content[0].text
    assert final.content[0].type == "text"
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 24


def test_every_block_of_a_stream_is_opened_and_closed(client: anthropic.Anthropic) -> None:
    with ask(client, messages=SUM, tools=[tool(CALCULATOR)], max_tokens=60, stream=True) as stream:
        kinds = [event.type for event in stream]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    blocks = [kind.removeprefix("content_block_") for kind in kinds if kind.startswith("content_block_")]
    opened = 0
    for kind in blocks:
        opened += {"start": 1, "delta": 0, "stop": -1}[kind]
        assert opened == (kind != "stop")
    assert blocks.count("start") == blocks.count("stop") == 1


def test_tools(client: anthropic.Anthropic) -> None:
    answer = ask(client, messages=SUM, tools=[tool(CALCULATOR)], max_tokens=60)
    assert answer.stop_reason == "tool_use"
    (call,) = answer.content
    assert (call.type, call.name, call.input) == ("tool_use", "calculator", {"expression": "922 + 291"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "1213"}]}
    later = [*SUM, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert ask(client, messages=later, tools=[tool(CALCULATOR)]).role == "assistant"


def test_streamed_and_required_tools(client: anthropic.Anthropic) -> None:
    how: Any = {"model": "any", "messages": SUM, "max_tokens": 100}
    choice: Any = {"type": "tool", "name": "set_alarm"}
    tools: Any = [tool(CALCULATOR), tool(ALARM)]
    with client.messages.stream(extra_body={"temperature": 0}, tools=tools, tool_choice=choice, **how) as stream:
        (call,) = stream.get_final_message().content
    assert call.type == "tool_use"
    assert call.name == "set_alarm"
    assert set(call.input) == {"hour", "day"}


def test_stop(client: anthropic.Anthropic) -> None:
    text = ask(client).content[0].text
    answer = ask(client, stop_sequences=[text[8:11]])
    assert answer.content[0].text == text[: text.index(text[8:11])]
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", text[8:11])


def test_errors(server: Served, client: anthropic.Anthropic) -> None:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    for how in ({"messages": []}, {"messages": [{"role": "user", "content": [picture]}]}, {"temperature": 3}):
        with pytest.raises(anthropic.BadRequestError) as caught:
            ask(client, **how)
        body: Any = caught.value.body
        assert body["type"] == "error"
        assert body["error"]["type"] == "invalid_request_error"
    with (
        anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as other,
        pytest.raises(anthropic.AuthenticationError),
    ):
        ask(other)


def test_a_client_that_leaves_cancels(server: Served, client: anthropic.Anthropic) -> None:
    with ask(client, max_tokens=2000, temperature=1, stream=True) as stream:
        next(iter(stream))
    until(lambda: not server.service.worker.busy())
    assert ask(client).stop_reason == "max_tokens"
