"""A small server with the page, for tests of its states: a real session, one request at a time, no limits.

``Gate`` holds an answer after its first pieces, so that a test can look at it while it comes.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from flashpack.runtime.responses import Event
from flashpack.runtime.sampling import Sampling
from flashpack.runtime.session import Session
from flashpack.server.live import Live, router_for


@dataclass
class Gate:
    """``open``: answers pass; otherwise they wait after ``after`` pieces until it is, or they are cancelled."""

    after: int = 8
    open: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    requests: list[dict[str, Any]] = field(default_factory=list)


def app_of(session: Session, live: Live, gate: Gate) -> FastAPI:
    app = FastAPI()
    app.include_router(router_for(live))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "tiny", "object": "model"}]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> StreamingResponse:
        body = await request.json()
        gate.requests.append(body)
        gate.cancelled.clear()
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        def put(piece: dict[str, Any] | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        seen = 0

        def pass_on(event: Event) -> None:
            nonlocal seen
            seen += 1
            live.token()
            name = "content" if event.kind == "content" else "reasoning_content"
            put({"delta": {name: event.text}, "finish_reason": None})
            while seen >= gate.after and not gate.open.wait(0.01) and not gate.cancelled.is_set():
                pass

        def work() -> None:
            live.begin("chat", 0)
            _, result = session.answer(
                body["messages"],
                on_event=pass_on,
                max_tokens=body.get("max_tokens", 200),
                sampling=Sampling(),
                cancelled=gate.cancelled.is_set,
            )
            live.end(result)
            put({"delta": {}, "finish_reason": result.finish})
            put(None)

        async def stream() -> AsyncIterator[str]:
            worker = threading.Thread(target=work)
            worker.start()
            try:
                while (choice := await pieces.get()) is not None:
                    yield f"data: {json.dumps({'choices': [choice]})}\n\n"
                yield "data: [DONE]\n\n"
            finally:
                gate.cancelled.set()

        return StreamingResponse(stream(), media_type="text/event-stream")

    return app


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address at which ``app`` answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
