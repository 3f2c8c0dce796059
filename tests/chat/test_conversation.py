"""Conversations in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashpack.chat.conversation import Conversation, load
from flashpack.errors import OutputError, UsageError

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "two and two? ü漢👍"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "add",
        "tool_calls": [
            {"id": "call_1_0", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1_0", "name": "add", "content": "4"},
    {"role": "assistant", "content": "fo", "interrupted": True},
]


def test_a_conversation_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    Conversation("be brief", MESSAGES).save(path, ["add"])
    assert load(path) == (Conversation("be brief", MESSAGES), ["add"])
    Conversation(None, []).save(path, [])
    assert load(path) == (Conversation(), [])
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]


def test_the_template_gets_the_system_prompt_and_no_mark() -> None:
    prompt = Conversation("be brief", MESSAGES).prompt()
    assert prompt[0] == {"role": "system", "content": "be brief"}
    assert prompt[-1] == {"role": "assistant", "content": "fo"}
    assert Conversation(None, MESSAGES[:1]).prompt() == MESSAGES[:1]


def test_no_other_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(UsageError, match="no saved conversation; choose another name"):
        Conversation().save(path, [])
    assert path.read_text() == "mine"
    with pytest.raises(OutputError, match="cannot be written"):
        Conversation().save(tmp_path / "absent" / "talk.json", [])


def saved(**changes: Any) -> str:
    return json.dumps({"flashpack_chat": 1, "system": None, "tools": [], "messages": [], **changes})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"flashpack_chat": 1, "system": "\\ud800", "tools": [], "messages": []}', "not JSON in UTF-8"),
        ("[]", "has no"),
        ("{}", "has no"),
        (saved(flashpack_chat=2), "another version"),
        (saved(system=3), "system prompt is no text"),
        (saved(tools=[3]), "no list of names"),
        (saved(messages={}), "no list"),
        (saved(messages=[3]), "message 1: no object"),
        (saved(messages=[*MESSAGES, {"role": "boss", "content": ""}]), "message 5: its role"),
        (saved(messages=[{"role": "user", "content": None}]), "its content"),
        (saved(messages=[{"role": "assistant", "content": "", "reasoning_content": []}]), "its reasoning_content"),
        (saved(messages=[{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]), "its tool_calls"),
        (
            saved(
                messages=[
                    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}
                ]
            ),
            "its tool_calls",
        ),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=fault) as e:
        load(path)
    assert str(path) in str(e.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path / "x.json")
    with pytest.raises(UsageError, match="a folder, not a file"):
        load(tmp_path)
