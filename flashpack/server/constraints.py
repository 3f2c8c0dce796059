"""Answers that must have a form: JSON, JSON of a schema, calls of given tools. The grammar is llguidance's."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from flashpack.runtime.messages import chat_template
from flashpack.runtime.sampling import stop_tokens
from flashpack.runtime.session import Session
from flashpack.server.problems import ApiError

SCHEMA_BYTES = 64 * 2**10
"""A schema may have so many bytes as JSON. With ``_limits`` this bounds the time it takes."""

_COMPACT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # no endless white space


def _limits() -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(initial_lexer_fuel=1_000_000, max_grammar_size=100_000, verbose_errors=False)


@dataclass(frozen=True)
class Constraint:
    """``grammar``: what the answer must be, after its thoughts; None: anything. ``forbidden`` tokens never come."""

    grammar: str | None
    forbidden: tuple[int, ...] = ()


class Processor(LogitsProcessor):
    """Sets the logits of tokens that may not come to -inf. ``after``: the token from which on the grammar counts; None:
    from the beginning. ``error``: why the grammar could not be followed to its end."""

    def __init__(
        self, matcher: llguidance.LLMatcher | None, forbidden: Sequence[int], after: int | None, stops: Sequence[int]
    ) -> None:
        self.error: str | None = None
        self._matcher, self._forbidden, self._after, self._stops = matcher, list(forbidden), after, list(stops)
        self._first = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._forbidden:
            scores[0, self._forbidden] = -torch.inf
        last, first, self._first = int(input_ids[0, -1]), self._first, False
        if self._matcher is None:
            return scores
        if self._after is not None:
            if first or last != self._after:
                return scores
            self._after = None
        elif not first and not self._matcher.is_stopped():
            self._matcher.consume_token(last)
        allowed = np.zeros(scores.shape[-1], bool)
        mask = b"" if self._matcher.is_stopped() else self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self.error = self._matcher.get_error().strip().partition("\n")[0]
        if self.error or self._matcher.is_stopped():
            allowed[self._stops] = True
        else:
            bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[: len(allowed)]
            allowed[: len(bits)] = bits.astype(bool)
        scores[0, torch.from_numpy(~allowed).to(scores.device)] = -torch.inf
        return scores


class Grammars:
    """Makes constraints for the tokenizer and the chat template of a session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.stops = stop_tokens(session.model.generation_config, session.tokenizer)
        self._lock = threading.Lock()
        self._made: llguidance.LLTokenizer | None = None

    def json(self, schema: dict[str, Any] | bool, param: str) -> Constraint:
        """JSON of a schema; ``ApiError`` 400 for one that is too large or not supported."""
        return self._checked(_json_grammar(_bounded(schema, param)), param)

    def calls(self, tools: Sequence[dict[str, Any]], several: bool) -> Constraint:
        """One call of one of ``tools``, or ``several``, and nothing else."""
        template = self._template()
        opening, closing = self._written("<tool_call>"), self._written("</tool_call>")
        one = _tagged_rules(tools) if "<function=" in template else _json_rules(tools)
        for tool in tools:
            _bounded(tool["function"].get("parameters") or {}, "tools")
        more = '("\\n" call)*' if several else ""
        lark = f'start: call {more}\ncall: {opening} "\\n" body "\\n" {closing}\n{one}'
        return self._checked(llguidance.LLMatcher.grammar_from_lark(lark), "tools")

    def no_calls(self) -> Constraint:
        """Anything but a call, as far as one token begins it."""
        token = self._token("<tool_call>")
        return Constraint(None, () if token is None else (token,))

    def processor(self, constraint: Constraint, opening: str) -> Processor:
        """For one answer that the template begins with ``opening``: thoughts that it opens are free."""
        after = None
        if constraint.grammar is None:
            return Processor(None, constraint.forbidden, None, self.stops)
        if opening.rfind("<think>") > opening.rfind("</think>"):
            after = self._token("</think>")
            if after is None:
                raise ApiError(400, "this model's thoughts cannot be told from an answer of a given form")
        matcher = llguidance.LLMatcher(self._tokenizer(), constraint.grammar, log_level=0, limits=_limits())
        return Processor(matcher, constraint.forbidden, after, self.stops)

    def _checked(self, grammar: str, param: str) -> Constraint:
        self._template()
        problem = llguidance.LLMatcher.validate_grammar(grammar, self._tokenizer(), limits=_limits())
        if problem:
            raise ApiError(400, f"not supported: {problem.strip().splitlines()[0][:300]}", param, "unsupported_schema")
        return Constraint(grammar)

    def _template(self) -> str:
        template = chat_template(self._session.tokenizer)
        if "<|channel|>" in template:
            raise ApiError(400, "answers of a given form are not supported for this model's format of messages")
        return template

    def _token(self, text: str) -> int | None:
        ids = self._tokenizer().tokenize_str(text, parse_special=True)
        return ids[0] if len(ids) == 1 else None

    def _written(self, tag: str) -> str:
        """In lark: the special token, or the text."""
        token = self._token(tag)
        special = token is not None and self._tokenizer().is_special_token(token)
        return f"<[{token}]>" if special else json.dumps(tag)

    def _tokenizer(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._made is None:
                embeddings: Any = self._session.model.get_input_embeddings()
                tokenizer: Any = self._session.tokenizer
                try:
                    self._made = llguidance.hf.from_tokenizer(tokenizer, embeddings.num_embeddings, self.stops)
                except Exception as e:
                    raise ApiError(400, "answers of a given form are not supported for this model's tokenizer") from e
            return self._made


def _json_grammar(schema: Any) -> str:
    # As text: llguidance takes no integers beyond 64 bits from Python.
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_COMPACT)


def _bounded(schema: Any, param: str) -> Any:
    if (size := len(json.dumps(schema))) > SCHEMA_BYTES:
        raise ApiError(400, f"a schema of {size} bytes; at most {SCHEMA_BYTES} are understood", param)
    return schema


def _json_rules(tools: Sequence[dict[str, Any]]) -> str:
    """Rule "body": {"name": ..., "arguments": ...}"""
    lines = [f"body: {' | '.join(f'c{i}' for i in range(len(tools)))}"]
    for i, tool in enumerate(tools):
        function = tool["function"]
        head = f'{{"name": {json.dumps(function["name"])}, "arguments": '
        lines.append(f'c{i}: {json.dumps(head)} a{i} "}}"')
        # A document of its own: "#" in its references means the tool's schema.
        lines.append(f"a{i}: %json {json.dumps({**_parameters(function), 'x-guidance': _COMPACT})}")
    return "\n".join(lines)


def _tagged_rules(tools: Sequence[dict[str, Any]]) -> str:
    """Rule "body": <function=NAME>, parameters that the tool has, any text in them, in any number and order."""
    lines = [f"body: {' | '.join(f'c{i}' for i in range(len(tools)))}", r'value[suffix="\n</parameter>\n"]: /(.|\n)*/']
    for i, tool in enumerate(tools):
        function = tool["function"]
        given = (function.get("parameters") or {}).get("properties")
        names = list(given) if isinstance(given, dict) else []
        head = json.dumps(f"<function={function['name']}>\n")
        each = " | ".join(f"{json.dumps(f'<parameter={name}>' + chr(10))} value" for name in names)
        lines.append(f'c{i}: {head} {f"p{i}*" if names else ""} "</function>"')
        if names:
            lines.append(f"p{i}: {each}")
    return "\n".join(lines)


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """A tool's schema; it takes no parameters but its own, unless it says so: small models would invent some."""
    given = function.get("parameters") or {"type": "object"}
    return {"additionalProperties": False, **given} if "properties" in given else given
