"""The default recipe on the trained model: tool calls stay intact (100 of the 500 held-out requests)."""

from __future__ import annotations

import json

import pytest

import flashpack
from flashpack.runtime.generate import encode_prompt, generate, load_tokenizer
from tests.conftest import ROOT, PackOf


def judge(text: str, request: dict[str, object]) -> tuple[bool, bool]:
    """(valid JSON between the tags, equal to the right call). `timeout` of the tool `python` is random in the data."""
    try:
        call = json.loads(text.split("<tool_call>")[1].split("</tool_call>")[0])
    except (IndexError, ValueError):
        return False, False
    arguments = dict(call.get("arguments", {}))
    expected = dict(request["arguments"])  # type: ignore[call-overload]
    if request["name"] == "python":
        arguments.pop("timeout", None)
        expected.pop("timeout", None)
    return True, (call.get("name"), arguments) == (request["name"], expected)


@pytest.mark.parametrize(("start", "count"), [(0, 25), (250, 25)])
def test_tool_calls_at_4_bits(pack_of: PackOf, start: int, count: int) -> None:
    pack = pack_of("trained", "q4", "q8")
    model, tokenizer = flashpack.load(pack), load_tokenizer(pack)
    lines = (ROOT / "tests" / "data" / "toolcalls.jsonl").read_text().splitlines()
    requests = [json.loads(line) for line in lines[start : start + count]]
    results = []
    for request in requests:
        text = generate(model, tokenizer, encode_prompt(tokenizer, request["user"]), max_tokens=120).text
        results.append(judge(text, request))
    assert len(results) == count
    assert all(valid for valid, _ in results)
    assert sum(exact for _, exact in results) >= 0.99 * count
