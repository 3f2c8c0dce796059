"""Requests as the OpenAI API defines them: unknown fields are left alone, wrong types and what cannot be honoured are
refused."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashpack.runtime.sampling import Sampling
from flashpack.server.constraints import Constraint, Grammars
from flashpack.server.problems import ApiError
from flashpack.server.worker import Task

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]

_UNION = re.compile(r"[\[-]|^str$|^NamedTool$")  # pydantic's names of the kinds that a field may have

DEPTH = 100
"""JSON may be nested so deep."""


class Lenient(BaseModel):
    """Unknown fields may be there; those that are known must have their type."""

    model_config = ConfigDict(extra="ignore", strict=True)


class Function(Lenient):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Lenient):
    type: Literal["function"]
    function: Function


class NamedFunction(Lenient):
    name: str


class NamedTool(Lenient):
    type: Literal["function"]
    function: NamedFunction


class Call(Lenient):
    model_config = ConfigDict(extra="allow", strict=True)

    function: dict[str, Any]


class Message(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class JsonSchema(Lenient):
    model_config = ConfigDict(extra="ignore", strict=True, populate_by_name=True)

    name: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(Lenient):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Lenient):
    include_usage: bool = False


class Common(Lenient):
    """What both kinds of completion take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: int | None = None
    logit_bias: dict[str, Any] | None = None

    def sampling(self, base: Sampling) -> Sampling:
        """``base``, a pack's recommendation, with what the request says."""
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": None if self.seed is None else self.seed & (2**63 - 1),
        }
        return replace(base, **{k: v for k, v in given.items() if v is not None})

    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def refuse(self) -> None:
        """``ApiError`` for what cannot be honoured."""
        if self.n not in (None, 1):
            raise ApiError(400, f"n={self.n}: one answer per request; ask again for another", "n")
        if self.logit_bias:
            raise ApiError(400, "logit_bias is not supported", "logit_bias")

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None

    def refuse(self) -> None:
        super().refuse()
        if self.audio is not None or (self.modalities or ["text"]) != ["text"]:
            raise ApiError(400, "answers are text only", "audio" if self.audio is not None else "modalities")
        if self.functions or self.function_call:
            raise ApiError(400, "functions are the old way; use tools and tool_choice", "functions")
        for i, message in enumerate(self.messages):
            for part in message.content if isinstance(message.content, list) else ():
                if not isinstance(part.get("text"), str):
                    kind = str(part.get("type"))[:40]
                    raise ApiError(400, f"a part of type {kind!r}; only text is understood", f"messages.{i}.content")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")

    def thinking(self) -> bool | None:
        """Whether the model thinks first; None: as its template has it."""
        kwargs = self.chat_template_kwargs or {}
        if unknown := sorted(set(kwargs) - {"enable_thinking"}):
            raise ApiError(400, f"{unknown[0][:40]}: only enable_thinking is understood", "chat_template_kwargs")
        wanted = kwargs.get("enable_thinking")
        if wanted is not None and not isinstance(wanted, bool):
            raise ApiError(400, "enable_thinking is true or false", "chat_template_kwargs")
        return False if wanted is None and self.reasoning_effort == "none" else wanted

    def task(self, base: Sampling, grammars: Grammars, switch: bool) -> Task:
        """What is to be done. ``switch``: whether the template can turn thinking off. Takes time for a grammar."""
        self.refuse()
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        constraint, tools = self._constraint(grammars, tools)
        thinking = self.thinking()
        if thinking is False and not switch and self.reasoning_effort == "none":
            thinking = None
        if thinking is not None and not switch:
            raise ApiError(400, "this model's chat template knows no thinking switch", "chat_template_kwargs")
        return Task(
            "chat",
            messages=[m.model_dump(exclude_none=True) for m in self.messages],
            tools=tools,
            thinking=thinking,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            sampling=self.sampling(base),
            seeded=self.seed is not None,
            stop=self.stops(),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            constraint=constraint,
        )

    def _constraint(self, grammars: Grammars, tools: list[Any]) -> tuple[Constraint | None, list[Any]]:
        """The form of the answer, and the tools that it may call."""
        choice, form = self.tool_choice, self.response_format
        formed = form is not None and form.type != "text"
        if choice == "required" or isinstance(choice, NamedTool):
            if formed:
                raise ApiError(400, "response_format and a required tool call exclude each other", "response_format")
            named = choice.function.name if isinstance(choice, NamedTool) else None
            chosen = [t for t in tools if named in (None, t["function"]["name"])]
            if not chosen:
                raise ApiError(400, "tool_choice: no such tool is in tools", "tool_choice")
            return grammars.calls(chosen, self.parallel_tool_calls is not False and named is None), tools
        if form is not None and formed:
            if form.type == "json_object":
                return grammars.json({"type": "object"}, "response_format"), []
            if form.json_schema is None:
                raise ApiError(400, "type json_schema needs json_schema", "response_format.json_schema")
            return grammars.json(form.json_schema.schema_, "response_format.json_schema.schema"), []
        if choice == "none":
            return (grammars.no_calls() if tools else None), []
        return None, tools


class CompletionRequest(Common):
    prompt: str | list[Any]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def refuse(self) -> None:
        super().refuse()
        if self.echo:
            raise ApiError(400, "echo is not supported", "echo")
        if self.suffix:
            raise ApiError(400, "suffix is not supported", "suffix")
        if self.best_of not in (None, 1):
            raise ApiError(400, "best_of is not supported", "best_of")

    def task(self, base: Sampling) -> Task:
        """What is to be done."""
        self.refuse()
        return Task(
            "completion",
            prompt=self._prompt(),
            max_tokens=self.max_tokens or 16,  # as OpenAI has it
            sampling=self.sampling(base),
            seeded=self.seed is not None,
            stop=self.stops(),
            logprobs=self.logprobs,
        )

    def _prompt(self) -> str | list[int]:
        given = self.prompt
        if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str | list):
            given = given[0]
        if isinstance(given, str):
            return given
        if not all(type(token) is int and 0 <= token < 2**31 for token in given):
            raise ApiError(400, "one text, or one list of tokens; several prompts are several requests", "prompt")
        return given


Kind = TypeVar("Kind", bound=BaseModel)


def parsed(kind: type[Kind], body: bytes) -> Kind:
    """A request of the ``body``; ``ApiError`` 400 if it is none."""
    try:
        data = json.loads(body, parse_constant=_refuse_constant, parse_float=_finite)
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeError:
        raise ApiError(400, "the body is not valid Unicode") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None
    except ValueError as e:
        raise ApiError(400, f"the body is not JSON: {str(e)[:200]}") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body is not a JSON object")
    if _deep(data):
        raise ApiError(400, f"the body is nested deeper than {DEPTH}")
    try:
        return kind.model_validate(data)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False, include_context=False)[0]
        fields = itertools.takewhile(lambda part: not _UNION.search(str(part)), first["loc"])
        where = ".".join(map(str, fields))[:200]
        raise ApiError(400, f"{where}: {first['msg'][:300]}", where or None) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is too large")
    return value


def _deep(data: Any) -> bool:
    """Whether it is nested deeper than ``DEPTH``."""
    level = [data]
    for _ in range(DEPTH):
        level = [x for one in level if isinstance(one, dict | list)
                 for x in (one.values() if isinstance(one, dict) else one)]  # fmt: skip
        if not level:
            return False
    return True
