"""Conversations as tokens."""

from __future__ import annotations

from typing import Any

import pytest

from flashpack.errors import FlashpackError, UsageError
from flashpack.runtime.messages import Message, encode_chat, encode_prompt, shows_tools
from flashpack.runtime.tokenizer import load_tokenizer
from tests.conftest import TRAINED

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL: Message = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "\u00fc"}'}}],
}
HI: Message = {"role": "user", "content": "Hi"}


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(TRAINED)


def text_of(tokenizer: Any, messages: list[Message], **options: Any) -> str:
    return str(tokenizer.decode(encode_chat(tokenizer, messages, **options).ids))


def test_a_prompt_is_a_conversation_of_one_message(tokenizer: Any) -> None:
    assert encode_prompt(tokenizer, "Hi") == encode_chat(tokenizer, [HI]).ids


def test_the_branch_is_before_the_answer(tokenizer: Any) -> None:
    prompt = encode_chat(tokenizer, [HI])
    assert prompt.opening == "<|im_start|>assistant\n"
    assert prompt.branch is not None
    longer = encode_chat(tokenizer, [HI, {"role": "assistant", "content": "Yes"}, HI])
    assert longer.ids[: prompt.branch] == prompt.ids[: prompt.branch]
    assert tokenizer.decode(prompt.ids[prompt.branch :]) == prompt.opening


def test_a_template_that_always_begins_an_answer_has_no_branch(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}{% if not add_generation_prompt %}!{% endif %}"
    prompt = encode_chat(tokenizer, [HI])
    assert (prompt.branch, prompt.opening) == (None, "")


def test_a_beginning_whose_tokens_change_with_what_follows_is_no_branch(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}e end{% endif %}"
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "Th"}])
    before = tokenizer("Th", add_special_tokens=False)["input_ids"]
    assert before != prompt.ids[: len(before)]
    assert (prompt.branch, prompt.opening) == (None, "e end")


def test_parts_become_text(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert encode_chat(tokenizer, [{"role": "user", "content": parts}]) == encode_chat(tokenizer, [HI])


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, "x", {"type": "text", "text": 5}])
def test_parts_that_are_no_text_are_refused(tokenizer: Any, part: Any) -> None:
    with pytest.raises(UsageError, match="only text"):
        encode_chat(tokenizer, [{"role": "user", "content": [part]}])


def test_calls_are_text_where_the_template_does_not_know_them(tokenizer: Any) -> None:
    text = text_of(tokenizer, [HI, CALL, {"role": "tool", "content": "5", "tool_call_id": "1"}])
    assert '<tool_call>\n{"name": "f", "arguments": {"a": "ü"}}\n</tool_call><|im_end|>' in text
    assert "<|im_start|>tool\n5<|im_end|>" in text


def test_calls_are_objects_where_it_does(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[1].tool_calls[0].function.arguments.a }}{{ messages[1].content }}|"
    assert text_of(tokenizer, [HI, CALL]) == "ü|"


def test_no_arguments_may_be_an_empty_text(tokenizer: Any) -> None:
    call: Message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}
    assert '{"name": "f", "arguments": {}}' in text_of(tokenizer, [HI, call])


@pytest.mark.parametrize("call", ["x", {}, {"function": {"name": 5}}, {"function": {"name": "f", "arguments": "{"}}])
def test_calls_that_are_none_are_refused(tokenizer: Any, call: Any) -> None:
    with pytest.raises(UsageError, match=r"tool call|arguments"):
        encode_chat(tokenizer, [HI, {"role": "assistant", "tool_calls": [call]}])


def test_tools_are_given_to_templates_that_show_them(tokenizer: Any) -> None:
    assert not shows_tools(tokenizer)
    assert encode_chat(tokenizer, [HI], [TOOL]) == encode_chat(tokenizer, [HI])
    tokenizer.chat_template = "{{ tools | tojson }}{{ messages[0].content }}"
    assert shows_tools(tokenizer)
    assert '"name": "f"' in text_of(tokenizer, [HI], tools=[TOOL])


def test_thinking_is_the_templates_switch(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="no thinking switch"):
        encode_chat(tokenizer, [HI], thinking=True)
    tokenizer.chat_template = "{{ enable_thinking }}"
    assert text_of(tokenizer, [HI], thinking=False) == "False"


@pytest.mark.parametrize("template", [None, 5])
def test_without_a_template_there_is_no_conversation(tokenizer: Any, template: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(FlashpackError, match="--raw"):
        encode_chat(tokenizer, [HI])
