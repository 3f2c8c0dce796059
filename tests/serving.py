"""A server of the bundled model for tests, in a thread, and raw requests to it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashpack.runtime.session import Session
from flashpack.server.guard import Limits
from flashpack.server.serving import Service, bound, hosts_of

LIMITS = Limits(200_000, hosts=hosts_of("127.0.0.1", ()))

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Computes.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
ALARM = {
    "type": "function",
    "function": {
        "name": "set_alarm",
        "parameters": {
            "type": "object",
            "properties": {
                "hour": {"type": "integer", "minimum": 0, "maximum": 23},
                "day": {"enum": ["Monday", "Tuesday"]},
            },
            "required": ["hour", "day"],
        },
    },
}
SUM = [{"role": "user", "content": "What is 922 plus 291?"}]


@dataclass(frozen=True)
class Served:
    service: Service
    session: Session
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def raw(self, data: bytes) -> bytes:
        """All that the server answers to these bytes, up to the end of the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as link:
            link.sendall(data)
            return b"".join(iter(lambda: link.recv(65536), b""))

    def first_line(self, data: bytes) -> bytes:
        """The first line of the answer, which may come before all is sent, and leave the connection open."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as link:
            with contextlib.suppress(ConnectionError):
                link.sendall(data)
            return link.recv(65536).split(b"\r\n")[0]

    def post(self, path: str, body: Any, *headers: str) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of the answer; ``body``: bytes, or what is written as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}", "Connection: close"]
        return taken(self.raw("\r\n".join([*head, *headers, "", ""]).encode() + data))

    def get(self, path: str, *headers: str) -> tuple[int, dict[str, str], Any]:
        head = [f"GET {path} HTTP/1.1", *(() if any(h.startswith("Host") for h in headers) else ("Host: localhost",))]
        return taken(self.raw("\r\n".join([*head, "Connection: close", *headers, "", ""]).encode()))


def taken(answer: bytes) -> tuple[int, dict[str, str], Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    kind = headers.get("content-type", "")
    return int(first.split()[1]), headers, json.loads(body) if kind == "application/json" else body.decode()


@contextmanager
def served(session: Session, limits: Limits = LIMITS, queue: int = 2, **changes: Any) -> Iterator[Served]:
    listening = bound("127.0.0.1", 0)
    service = Service(session, listening, replace(limits, **changes), queue)
    thread = threading.Thread(target=service.serve_all)
    port = listening.getsockname()[1]
    thread.start()
    try:
        until(lambda: service.started)
        yield Served(service, session, port)
    finally:
        service.stop()
        thread.join()
        assert not service.worker._thread.is_alive()


def until(true: Callable[[], object]) -> None:
    """Wait; a test that waits for ever has failed."""
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def session_of(pack: Path) -> Session:
    return Session(pack, prefix_memory=100 * 10**6, context=2048, memory="smallest")
