"""Answers taken apart, in the formats of known chat templates, however the pieces fall."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flashpack.runtime.responses import Event, Response

JSON_CALLS = "<think> <tool_call> {{ tools }}"
XML_CALLS = "<think> <tool_call> <function= {{ tools }}"
HARMONY = "<|channel|>"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"type": "array"}},
        },
    },
}


def parse(text: str, template: str = JSON_CALLS, opening: str = "", tools: tuple[Any, ...] = (WEATHER,)) -> Response:
    """``text`` in pieces of every size; all must give the same."""
    found = []
    for size in (1, 2, 3, 7, len(text) or 1):
        response = Response(template, opening, tools)
        events: list[Event] = []
        for i in range(0, len(text), size):
            events += response.feed(text[i : i + size])
        events += response.finish()
        assert "".join(e.text for e in events if e.kind == "content") == response.content
        assert "".join(e.text for e in events if e.kind == "reasoning") == response.reasoning
        assert [e for e in events if e.kind == "tool_call"] == response.calls
        found.append(response)
    assert len({json.dumps(one.message()) for one in found}) == 1
    return found[0]


def calls_of(response: Response) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in response.calls]


def test_plain_text_is_content() -> None:
    assert parse("Hello, <b>you</b>.\n\nBye").content == "Hello, <b>you</b>.\n\nBye"
    assert parse("").content == ""


def test_thoughts_are_apart() -> None:
    response = parse("<think>\nhm\n</think>\n\nYes.")
    assert (response.reasoning.strip(), response.content) == ("hm", "Yes.")


def test_thoughts_that_the_template_begins() -> None:
    response = parse("hm</think>Yes.", opening="<|im_start|>assistant\n<think>\n")
    assert (response.reasoning, response.content) == ("hm", "Yes.")


def test_what_the_template_has_written_is_not_the_models() -> None:
    response = parse("two numbers.</think>Yes.", opening="<think>\nThese are ")
    assert (response.reasoning, response.content) == ("two numbers.", "Yes.")


def test_thoughts_that_the_template_leaves_out() -> None:
    response = parse("Yes.", opening="<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert (response.reasoning, response.content) == ("", "Yes.")


def test_a_template_without_thoughts_has_none() -> None:
    assert parse("<think>x</think>y", "<tool_call>").content == "<think>x</think>y"


def test_calls() -> None:
    text = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 2}}\n</tool_call>'
    response = parse(text + text.removeprefix("Let me see."))
    assert response.content.startswith("Let me see.")
    assert "tool_call" not in response.content
    assert calls_of(response) == [("weather", {"city": "Köln", "days": 2})] * 2
    assert response.message()["tool_calls"][0]["function"]["name"] == "weather"


def test_without_tools_a_call_is_text() -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    response = parse(text, tools=())
    assert response.content == text
    assert not response.calls


@pytest.mark.parametrize("body", ["{", "[]", '{"name": 5}', "", "[" * 100_000])
def test_a_call_that_is_none_is_text(body: str) -> None:
    response = Response(JSON_CALLS, "", (WEATHER,))
    response.feed(f"<tool_call>{body}</tool_call>")
    response.finish()
    assert not response.calls
    assert response.content == f"<tool_call>{body}</tool_call>"


def test_a_call_that_is_cut_off_is_text() -> None:
    response = parse('<tool_call>{"name": "weather", "argum')
    assert not response.calls
    assert '{"name": "weather", "argum' in response.content


def test_a_call_that_is_cut_off_is_not_closed() -> None:
    assert parse('<tool_call>\n{"na').content == '<tool_call>\n{"na'


@pytest.mark.parametrize("value", ['"\\ud83d"', "NaN", "1e999"])
def test_a_call_that_nobody_could_be_sent_is_text(value: str) -> None:
    text = f'<tool_call>{{"name": "weather", "arguments": {{"city": {value}}}}}</tool_call>'
    response = parse(text)
    assert (response.calls, response.content) == ([], text)


def test_calls_in_tags_have_the_types_of_the_tool() -> None:
    text = (
        "<think>\nhm\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\n50\n</parameter>\n"
        '<parameter=days>\n3\n</parameter>\n<parameter=units>\n["C"]\n</parameter>\n'
        "<parameter=more>\nx y\n</parameter>\n</function>\n</tool_call>"
    )
    response = parse(text, XML_CALLS)
    assert calls_of(response) == [("weather", {"city": "50", "days": 3, "units": ["C"], "more": "x y"})]
    assert response.reasoning.strip() == "hm"


@pytest.mark.parametrize("properties", [{"a": True}, ["a"]])
def test_calls_in_tags_of_tools_that_say_no_types(properties: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}
    text = "<tool_call><function=f><parameter=a>1</parameter></function></tool_call>"
    assert calls_of(parse(text, tools=(tool,))) == [("f", {"a": 1})]


def test_harmony() -> None:
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Rome"}'
    )
    response = parse(text, HARMONY)
    assert response.reasoning == "hm"
    assert calls_of(response) == [("weather", {"city": "Rome"})]
    assert response.content == ""
    answer = parse("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.", HARMONY)
    assert (answer.reasoning, answer.content) == ("hm", "Yes.")
