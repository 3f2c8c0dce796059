"""Tool calls of ``eval``: what is valid JSON, what is the right call, and what is no file of cases."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import flashpack
from flashpack.errors import UsageError
from flashpack.runtime import toolcalls
from flashpack.runtime.messages import encode_prompt
from flashpack.runtime.tokenizer import load_tokenizer
from flashpack.runtime.toolcalls import Case, Counts, judge, read_cases, tool_calls
from tests.conftest import ROOT, TRAINED, PackOf

CASE = Case("Run it.", "python", {"code": "f()", "timeout": 3, "quiet": True})
RIGHT = {"name": "python", "arguments": {"code": "f()", "timeout": 3, "quiet": True}}


def call(**arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'python', 'arguments': arguments})}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (call(code="f()", timeout=3, quiet=True), (True, True)),
        ("I will. " + call(quiet=True, timeout=3, code="f()") + " Done.", (True, True)),
        (call(code="f()", timeout=4, quiet=True), (True, False)),
        (call(code="f()", timeout=3, quiet=1), (True, False)),
        (call(code="f()", timeout=3), (True, False)),
        (call(code="f()", timeout=3, quiet=True).replace("python", "shell"), (True, False)),
        (call(code="f()", timeout=3, quiet=True).replace("}}", "}"), (False, False)),
        (call(code="f()", timeout=3, quiet=True).replace("</tool_call>", ""), (False, False)),
        ("<tool_call></tool_call>", (False, False)),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", (False, False)),
        ("<tool_call>null</tool_call>", (True, False)),
        ("<tool_call>[1]</tool_call>", (True, False)),
        ('<tool_call>{"name": "python", "arguments": "f()"}</tool_call>', (True, False)),
        (json.dumps(RIGHT), (False, False)),
        ("", (False, False)),
    ],
)
def test_judging(text: str, expected: tuple[bool, bool]) -> None:
    assert judge(text, CASE) == expected


def test_arguments_of_one_tool_can_be_ignored() -> None:
    ignore = [("python", "timeout")]
    assert judge(call(code="f()", timeout=9, quiet=True), CASE, ignore) == (True, True)
    assert judge(call(code="f()", quiet=True), CASE, ignore) == (True, True)
    assert judge(call(code="g()", timeout=3, quiet=True), CASE, ignore) == (True, False)
    assert judge(call(code="f()", timeout=9, quiet=True), CASE, [("shell", "timeout")]) == (True, False)


def test_the_file_of_cases(tmp_path: Path) -> None:
    cases = read_cases(ROOT / "tests" / "data" / "toolcalls.jsonl")
    assert len(cases) == 500
    assert cases[2] == Case("What is 922 plus 291?", "calculator", {"expression": "922 + 291"})
    path = tmp_path / "cases.jsonl"
    good = '{"user": "a", "name": "b", "arguments": {}}\n'
    for content, message in (
        (good + "{", "line 2: not JSON"),
        (good + "[]", "line 2: not an object with user, name and arguments"),
        ('{"user": "a", "name": "b", "arguments": []}', "line 1: not an object"),
        ('{"user": "a", "name": "b"}', "line 1: not an object"),
        ("", "empty"),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            read_cases(path)
    path.write_text(good.replace('"a"', '"a\u2028b\x85"') + "\n\r\n" + good, encoding="utf-8")
    assert [case.user for case in read_cases(path)] == ["a\u2028b\x85", "a"]
    with pytest.raises(UsageError, match=r"absent\.jsonl: cannot be read: No such file or directory$"):
        read_cases(tmp_path / "absent.jsonl")


def test_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four answers one is right, one wrong, and two are broken; a system prompt comes first."""
    answers = iter([call(**CASE.arguments), call(code="g()"), call(**CASE.arguments)[:-14], "I cannot."])
    prompts, advanced = [], []

    def generate(model: Any, tokenizer: Any, ids: list[int], most: int) -> Any:
        prompts.append(tokenizer.decode(ids))
        assert 64 < most < 200
        return SimpleNamespace(text=next(answers))

    monkeypatch.setattr(toolcalls, "generate", generate)
    model: Any = None
    found = tool_calls(model, load_tokenizer(TRAINED), [CASE] * 4, "Be brief.", advance=advanced.append)
    assert found == Counts(calls=4, valid=2, exact=1)
    assert advanced == [1] * 4
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRun it.<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [prompt] * 4


def test_the_default_system_prompt_is_that_of_the_trained_model() -> None:
    tokenizer = load_tokenizer(TRAINED)
    assert encode_prompt(tokenizer, "Hi", system=toolcalls.SYSTEM) == encode_prompt(tokenizer, "Hi")


@pytest.mark.parametrize("start", [0, 250])
def test_the_default_recipe_keeps_tool_calls_intact(pack_of: PackOf, start: int) -> None:
    """25 of the 500 held-out requests each time."""
    pack = pack_of("trained", "q4", "q8")
    cases = read_cases(ROOT / "tests" / "data" / "toolcalls.jsonl")[start : start + 25]
    found = tool_calls(flashpack.load(pack), load_tokenizer(pack), cases, ignore=[("python", "timeout")])
    assert (found.calls, found.valid) == (25, 25)
    assert found.exact >= 0.99 * 25
