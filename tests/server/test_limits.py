"""What a server does to requests that are too many, too large, too slow, hostile, or not allowed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from flashpack.runtime.session import Session
from flashpack.server import guard
from flashpack.server.guard import host_name, is_local
from flashpack.server.serving import hosts_of
from tests.conftest import PackOf
from tests.serving import LIMITS, Served, served, session_of, until

CHAT = "/v1/chat/completions"
LONG = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1900, "temperature": 1, "min_p": 0.0}
SHORT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def session(pack_of: PackOf) -> Session:
    return session_of(pack_of("trained"))


@pytest.fixture(scope="module")
def server(session: Session) -> Iterator[Served]:
    with served(session) as made:
        yield made


@pytest.fixture
def held(session: Session) -> Iterator[threading.Event]:
    """Generations begin when this is set."""
    go = threading.Event()
    complete = session.complete

    def waiting(*args: Any, **kwargs: Any) -> Any:
        go.wait(60)
        return complete(*args, **kwargs)

    session.complete = waiting  # type: ignore[method-assign]
    yield go
    go.set()
    session.complete = complete  # type: ignore[method-assign]


BODIES = [
    (b"", 400),
    (b"[]", 400),
    (b"null", 400),
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b'{"messages": NaN}', 400),
    (b'{"messages": 1e999}', 400),
    (b'{"messages": "\\ud800"}', 400),
    (b'{"max_tokens": ' + b"9" * 10000 + b"}", 400),
    (b"[" * 50000, 400),
    (b'{"a":' * 5000 + b"1" + b"}" * 5000, 400),
    (b'{"a":' * 101 + b"1" + b"}" * 101, 400),
    (b" " * 200_001, 413),
]


@pytest.mark.parametrize(("body", "status"), BODIES, ids=range(len(BODIES)))
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages"])
def test_hostile_bodies(server: Served, path: str, body: bytes, status: int) -> None:
    got, _, answer = server.post(path, body)
    assert got == status
    assert answer["error"]["message"]


def test_a_body_without_a_length_is_counted(server: Served) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert b" 413 " in server.first_line(head + 25 * (b"2710\r\n" + b"x" * 10000 + b"\r\n"))


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 100 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX\x01: y\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"DELETE /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET /page/../live.py HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ],
)
def test_hostile_headers(server: Served, data: bytes) -> None:
    first = server.first_line(data)
    assert first.startswith(b"HTTP/1.1 4"), first


def test_pages_of_others_are_kept_out(server: Served) -> None:
    for host in ("evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example:80"):
        assert server.get("/v1/models", f"Host: {host}")[0] == 403
    for host in ("localhost", f"127.0.0.1:{server.port}", "[::1]:80"):
        assert server.get("/v1/models", f"Host: {host}")[0] == 200
    assert server.get("/v1/models", "Origin: http://evil.example")[0] == 403
    assert server.post(CHAT, SHORT, "Origin: http://evil.example")[0] == 403
    status, headers, _ = server.get("/v1/models", "Origin: http://localhost")
    assert status == 200
    assert "access-control-allow-origin" not in headers


def test_an_allowed_origin(session: Session) -> None:
    with served(session, origins=["http://chat.example"]) as server:
        status, headers, _ = server.get("/v1/models", "Origin: http://chat.example")
        assert (status, headers["access-control-allow-origin"]) == (200, "http://chat.example")
        ask = b"OPTIONS /v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: http://chat.example\r\n"
        ask += b"Connection: close\r\n\r\n"
        assert b" 204 " in server.first_line(ask)


def test_the_key(session: Session) -> None:
    with served(session, key="secret") as server:
        assert server.get("/health")[0] == 200
        assert server.get("/")[0] == 200
        for path in ("/v1/models", "/metrics", "/live", "/elsewhere"):
            for header in ("X: y", "Authorization: Bearer wrong", "Authorization: Basic secret", "X-Api-Key: \xe9"):
                status, _, answer = server.get(path, header)
                assert status == 401
                assert answer["error"]["code"] == "invalid_api_key"
        assert server.get("/v1/models", "Authorization: Bearer secret")[0] == 200
        assert server.get("/metrics", "X-Api-Key: secret")[0] == 200


def test_the_queue_has_a_bound(server: Served, held: threading.Event) -> None:
    answers: list[tuple[int, dict[str, str], Any]] = []
    threads = []
    worker = server.service.worker
    for i in range(3):  # one runs, two wait
        threads.append(threading.Thread(target=lambda: answers.append(server.post(CHAT, SHORT))))
        threads[-1].start()
        until(lambda i=i: worker.busy() and worker.waiting() == i)
    status, headers, answer = server.post(CHAT, SHORT)
    assert status == 429
    assert int(headers["retry-after"]) >= 1
    assert answer["error"]["type"] == "rate_limit_error"
    assert server.get("/health")[0] == 200
    assert "flashpack_queue_length 2.0" in server.get("/metrics")[2]
    held.set()
    for thread in threads:
        thread.join()
    assert [status for status, _, _ in answers] == [200] * 3


def test_without_a_queue_one_after_the_other_is_answered(server: Served) -> None:
    with served(server.session, queue=0) as other:
        assert [other.post(CHAT, SHORT)[0] for _ in range(3)] == [200] * 3


def test_who_leaves_while_waiting_gives_the_place_back(server: Served, held: threading.Event) -> None:
    worker = server.service.worker
    first = threading.Thread(target=lambda: server.post(CHAT, SHORT))
    first.start()
    until(worker.busy)
    body = b'{"prompt": "x"}'
    link = socket.create_connection(("127.0.0.1", server.port))
    link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    until(lambda: worker.waiting() == 1)
    link.close()
    until(lambda: worker.waiting() == 0)
    held.set()
    first.join()


def test_slow_requests_are_given_up(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    with served(session) as server:
        assert server.raw(b"") == b""
        assert server.raw(b"GET / HTTP/1.1\r\nHost: loc") == b""
        late = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{"
        assert b" 408 " in server.first_line(late)


def test_a_failure_in_the_middle_of_a_stream(session: Session) -> None:
    def failing(ids: Any, on_text: Any, *args: Any) -> Any:
        on_text("so far")
        raise RuntimeError("a secret path")

    complete = session.complete
    with served(session) as server:
        session.complete = failing  # type: ignore[method-assign]
        try:
            status, _, text = server.post(CHAT, {**SHORT, "stream": True})
            alone = server.post(CHAT, SHORT)
        finally:
            session.complete = complete  # type: ignore[method-assign]
        assert status == 200
        assert "so far" in text
        assert '"type": "server_error"' in text
        assert "[DONE]" in text
        assert "secret" not in text
        assert alone[0] == 500
        assert server.post(CHAT, SHORT)[0] == 200


def test_metrics_agree_with_the_sessions_results(session: Session) -> None:
    before = session.runtime.store.stats.total()
    with served(session) as server:
        usages = [server.post(CHAT, SHORT)[2]["usage"] for _ in range(3)]
        server.post(CHAT, b"{")
        lines = server.get("/metrics")[2].splitlines()
    values = {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}
    after = session.runtime.store.stats.total()
    assert values["flashpack_prompt_tokens_total"] == sum(u["prompt_tokens"] for u in usages)
    assert values["flashpack_generated_tokens_total"] == sum(u["completion_tokens"] for u in usages)
    assert values["flashpack_reused_tokens_total"] == sum(u["prompt_tokens_details"]["cached_tokens"] for u in usages)
    assert values["flashpack_expert_hits_total"] == after.hits - before.hits
    assert values["flashpack_expert_misses_total"] == after.misses - before.misses
    assert values['flashpack_requests_total{route="/v1/chat/completions",status="200"}'] == 3
    assert values['flashpack_requests_total{route="/v1/chat/completions",status="400"}'] == 1


def test_stopping_ends_what_runs(session: Session) -> None:
    got: list[Any] = []
    with served(session) as server:
        thread = threading.Thread(target=lambda: got.append(server.post(CHAT, {**LONG, "stream": True})))
        thread.start()
        until(server.service.worker.busy)
    thread.join()
    assert "going down" in str(got[0][2])


def test_names_of_hosts() -> None:
    assert host_name("[::1]:80") == "::1"
    assert host_name("LOCALHOST:8080") == "localhost"
    assert [is_local(x) for x in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [True] * 3 + [
        False
    ] * 2
    assert hosts_of("0.0.0.0", ()) is None
    assert hosts_of("127.0.0.1", ["Box"]) == LIMITS.hosts | {"box"}  # type: ignore[operator]
