"""How many tool calls of a model are valid JSON, and how many are the right ones."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashpack.errors import UsageError
from flashpack.runtime.generate import generate
from flashpack.runtime.messages import encode_prompt
from flashpack.runtime.predict import json_lines, text_of
from flashpack.runtime.tokenizer import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SYSTEM = "You are a helpful assistant. Use the tools when they help."
"""The system prompt, if there is no other."""

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_FIELDS = {"user": str, "name": str, "arguments": dict}


@dataclass(frozen=True)
class Case:
    """What the user says, and the call that is right."""

    user: str
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Counts:
    """Calls asked for, those that are valid JSON, and those with the right name and arguments."""

    calls: int
    valid: int
    exact: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def read_cases(path: Path) -> list[Case]:
    """The cases of a file with one JSON object per line: "user", "name" and "arguments".

    Raises ``UsageError`` for any other file.
    """
    cases = []
    for number, line in json_lines(text_of("--tools", path)):
        try:
            data = json.loads(line)
        except ValueError as e:
            raise UsageError(f"--tools {path}, line {number}: not JSON: {e}") from e
        if not isinstance(data, dict) or not all(isinstance(data.get(k), kind) for k, kind in _FIELDS.items()):
            raise UsageError(f"--tools {path}, line {number}: not an object with user, name and arguments")
        cases.append(Case(*(data[k] for k in _FIELDS)))
    if not cases:
        raise UsageError(f"--tools {path}: empty")
    return cases


def judge(text: str, case: Case, ignore: Collection[tuple[str, str]] = ()) -> tuple[bool, bool]:
    """(valid, exact): whether what stands between <tool_call> and </tool_call> in ``text`` is JSON, and whether name
    and arguments are the right ones, but for the arguments (tool, argument) in ``ignore``."""
    found = _CALL.search(text)
    try:
        call = json.loads(found[1]) if found else None
    except (ValueError, RecursionError):
        return False, False
    if not found:
        return False, False
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
        return True, False
    name = call.get("name")
    return True, name == case.name and _kept(call["arguments"], name, ignore) == _kept(case.arguments, name, ignore)


def tool_calls(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: list[Case],
    system: str = SYSTEM,
    ignore: Collection[tuple[str, str]] = (),
    advance: Callable[[int], object] | None = None,
) -> Counts:
    """Let the model answer each case greedily, one after the other, and count. ``advance`` is called after each.

    An answer may be twice as long as the right call, and a little more.
    """
    valid = exact = 0
    for case in cases:
        right = json.dumps({"name": case.name, "arguments": case.arguments})
        most = 64 + 2 * len(encode(tokenizer, right, special=False))
        answer = generate(model, tokenizer, encode_prompt(tokenizer, case.user, system=system), most)
        is_valid, is_exact = judge(answer.text, case, ignore)
        valid += is_valid
        exact += is_exact
        if advance:
            advance(1)
    return Counts(len(cases), valid, exact)


def _kept(arguments: dict[str, Any], tool: str, ignore: Collection[tuple[str, str]]) -> str:
    """The arguments that count, as one text; in it true is not 1, as it would be for Python."""
    return json.dumps({k: v for k, v in arguments.items() if (tool, k) not in ignore}, sort_keys=True)
