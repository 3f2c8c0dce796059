"""While a long prompt is read: who leaves ends it, and a stream says that it is still there."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from flashpack.runtime.store import ExpertStore
from flashpack.server import app
from tests.conftest import PackOf
from tests.serving import SUM, Served, served, session_of, until

LONG = "What is 922 plus 291, and what else do you know of numbers? " * 60


@pytest.fixture
def server(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """Each layer of a prompt takes a while; tokens after it do not."""
    real = ExpertStore.batches

    def slow(store: ExpertStore, layer: int, experts: list[int]) -> object:
        if store.cancelled is not None:
            time.sleep(0.05)
        return real(store, layer, experts)

    monkeypatch.setattr(ExpertStore, "batches", slow)
    with served(session_of(pack_of("trained"))) as made:
        yield made


def request(stream: bool) -> bytes:
    message = {"role": "user", "content": LONG}
    body = json.dumps({"messages": [message], "max_tokens": 2, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_ends_it(server: Served, stream: bool) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
        link.sendall(request(stream))
        until(lambda: server.service.live.state()["busy"])
    until(lambda: not server.service.live.state()["busy"])
    numbers = server.get("/metrics")[2]
    assert 'flashpack_generations_total{finish="cancelled"} 1.0' in numbers
    assert "flashpack_generated_tokens_total 0.0" in numbers
    assert server.post("/v1/chat/completions", {"messages": SUM, "max_tokens": 5})[0] == 200


def test_a_stream_says_that_it_is_still_there(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "KEEP_ALIVE", 0.1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as link:
        link.sendall(request(stream=True))
        got = b""
        while b"[DONE]" not in got:
            got += link.recv(65536)
    before, _, after = got.partition(b": still at work\n\n")
    assert b'"role"' in before
    assert b'"content": "' in after.replace(b'"content":"', b'"content": "')
