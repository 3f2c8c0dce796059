"""The server's routes, and how an answer gets from the worker to its client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from flashpack.runtime.messages import chat_template
from flashpack.runtime.session import Session
from flashpack.server.anthropic import Answer, MessagesRequest
from flashpack.server.chat import Chat
from flashpack.server.completions import Completion
from flashpack.server.guard import Guard, Limits
from flashpack.server.live import Live, router_for
from flashpack.server.metrics import CONTENT_TYPE, Metrics
from flashpack.server.problems import ApiError
from flashpack.server.requests import ChatRequest, CompletionRequest, parsed
from flashpack.server.worker import Done, Job, Piece, Started, Task, Worker

KEEP_ALIVE = 10.0
"""After so many seconds without a piece a stream says that it is still there."""


class Form(Protocol):
    """How an API writes an answer: ``begin``, ``chunks`` and ``end`` of a stream, or the ``whole``."""

    def begin(self) -> list[dict[str, Any]]: ...

    def chunks(self, piece: Piece) -> list[dict[str, Any]]: ...

    def end(self, done: Done) -> list[dict[str, Any]]: ...

    def whole(self, pieces: Sequence[Piece], done: Done) -> dict[str, Any]: ...


def app_of(session: Session, worker: Worker, live: Live, metrics: Metrics, limits: Limits) -> ASGIApp:
    """The whole application."""
    name = session.runtime.pack.folder.resolve().name.removesuffix(".flashpack")
    template = session.tokenizer.chat_template and chat_template(session.tokenizer)
    switch = "enable_thinking" in (template or "")
    app = FastAPI(openapi_url=None)
    app.include_router(router_for(live))
    model = {"id": name, "object": "model", "created": 0, "owned_by": "flashpack"}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = parsed(ChatRequest, await request.body())
        _needs_template(template)
        task = await run_in_threadpool(asked.task, session.sampling, worker.grammars, switch)
        return await respond(request, task, Chat(asked, name, session.tokenizer), bool(asked.stream))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parsed(CompletionRequest, await request.body())
        form = Completion(asked, name, session.tokenizer)
        return await respond(request, asked.task(session.sampling), form, bool(asked.stream))

    @app.post("/v1/messages")
    async def messages(request: Request) -> Response:
        try:
            asked = parsed(MessagesRequest, await request.body())
            _needs_template(template)
            task = await run_in_threadpool(asked.task, session.sampling, worker.grammars, switch)
            return await respond(request, task, Answer(asked, name), bool(asked.stream), anthropic=True)
        except ApiError as e:
            return e.response(anthropic=True)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{wanted}")
    async def one_model(wanted: str) -> dict[str, Any]:
        if wanted != name:
            raise ApiError(404, "the server has no model of that name", "model", "model_not_found")
        return model

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def numbers() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        answer = ApiError(error.status_code, str(error.detail)).response()
        answer.headers.update(error.headers or {})
        return answer

    async def respond(request: Request, task: Task, form: Form, stream: bool, anthropic: bool = False) -> Response:
        job = Job(task)
        worker.submit(job)
        watch = asyncio.create_task(_leave(request, job))
        streaming = False
        try:
            first = await job.items.get()
            if isinstance(first, ApiError):
                raise first
            if stream:
                streaming = True
                pieces = _events(job, form, worker, watch, anthropic)
                headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
                return StreamingResponse(pieces, media_type="text/event-stream", headers=headers)
            return JSONResponse(await _whole(job, form))
        finally:
            if not streaming:
                watch.cancel()
                worker.cancel(job)

    routes = {"/", "/live", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"}
    return Guard(app, limits, metrics, frozenset({*routes, "/v1/messages"}))


def _needs_template(template: str | None) -> None:
    if not template:
        raise ApiError(400, "this model has no chat template; /v1/completions continues plain text")


async def _leave(request: Request, job: Job) -> None:
    """End ``job`` when its client leaves; whoever waits for its items cancels it then."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.items.put_nowait(ApiError(499, "the client left"))


async def _whole(job: Job, form: Form) -> dict[str, Any]:
    pieces: list[Piece] = []
    while True:
        item = await job.items.get()
        if isinstance(item, Piece):
            pieces.append(item)
        elif isinstance(item, Done):
            return form.whole(pieces, item)
        elif isinstance(item, ApiError):
            raise item


async def _events(
    job: Job, form: Form, worker: Worker, watch: asyncio.Task[None], anthropic: bool
) -> AsyncIterator[str]:
    """The stream; an event of Anthropic's has its type as its name."""

    def written(data: dict[str, Any]) -> str:
        head = f"event: {data['type']}\n" if anthropic else ""
        return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n"

    try:
        for data in form.begin():
            yield written(data)
        while True:
            try:
                item = await asyncio.wait_for(job.items.get(), KEEP_ALIVE)
            except TimeoutError:
                yield ": still at work\n\n"
                continue
            if isinstance(item, Started):
                continue
            if isinstance(item, ApiError):
                yield written(item.anthropic_body() if anthropic else item.body())
                break
            for data in form.chunks(item) if isinstance(item, Piece) else form.end(item):
                yield written(data)
            if isinstance(item, Done):
                break
        if not anthropic:
            yield "data: [DONE]\n\n"
    finally:
        watch.cancel()
        worker.cancel(job)
