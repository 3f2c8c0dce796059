"""What every request passes before it is read: host, key, size of the body, time for the body. Plain ASGI."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from flashpack.server.metrics import Metrics
from flashpack.server.problems import ApiError

HEADER_SECONDS = 10.0
"""A request's headers must have come after so long."""

BODY_SECONDS = 30.0
"""And its body after so long more."""

HEADERS = 100
HEADER_BYTES = 32 * 2**10

DROP_SECONDS = 1.0
"""What is too large is read on for so long after each piece, and dropped."""

_OPEN = ("/health", "/", "/page/")
"""Without the key: whether the server lives, and the page, which asks for the key."""


@dataclass(frozen=True)
class Limits:
    """``key``: None for none. ``hosts``: names by which the server may be called, None: any; against pages of others
    whose name leads here. ``origins``: of pages that may use the server from a browser."""

    max_body: int
    key: str | None = None
    hosts: frozenset[str] | None = None
    origins: Sequence[str] = ()


class Guard:
    """Answers what may not pass; counts all answers."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app, self._limits, self._metrics, self._routes = app, limits, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        route = path if path in self._routes else "/page/" if path.startswith("/page/") else "other"
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin")
        allowed = origin if origin in self._limits.origins else None

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.request(route, message["status"])
                if allowed:
                    extra = [(b"access-control-allow-origin", allowed.encode()), (b"vary", b"Origin")]
                    message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            _check_head(scope)
            self._check_host(headers)
            if scope["method"] == "OPTIONS" and allowed:
                await _preflight(answer)
                return
            self._check_origin(headers, allowed)
            self._check_key(path, headers)
            body = await self._body(headers, receive)
        except ApiError as e:
            await e.response(path == "/v1/messages")(scope, receive, answer)
            return
        except _GoneError:
            return
        await self._app(scope, _replayed(body, receive), answer)

    def _check_host(self, headers: dict[str, str]) -> None:
        hosts = self._limits.hosts
        if hosts is not None and host_name(headers.get("host", "")) not in hosts:
            raise ApiError(403, "this server does not go by that host name; --allow-host NAME makes it do so")

    def _check_origin(self, headers: dict[str, str], allowed: str | None) -> None:
        """A page of another site may not even send a request whose answer it could not read."""
        origin = headers.get("origin")
        if origin is None or allowed or origin.partition("://")[2].lower() == headers.get("host", "").lower():
            return
        raise ApiError(403, "pages of that origin may not use this server; --allow-origin ORIGIN lets them")

    def _check_key(self, path: str, headers: dict[str, str]) -> None:
        key = self._limits.key
        if key is None or path in _OPEN or path.startswith(_OPEN[-1]):
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode("latin-1", "replace"), key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole of it. The rest of one that is too large is read, in reason, and dropped: a client that still
        sends would not see the answer."""
        most, size = self._limits.max_body, 0
        too_large = ApiError(413, f"the body has more than {most} bytes", code="body_too_large")
        if int(headers.get("content-length", "0")[:20]) > 4 * most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS) as limit:
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    size += len(message.get("body", b""))
                    if size <= most:
                        body += message.get("body", b"")
                    ended = not message.get("more_body")
                    if size > most:
                        if ended or size > 4 * most:
                            raise too_large
                        limit.reschedule(min(limit.when() or 0.0, asyncio.get_running_loop().time() + DROP_SECONDS))
                    if ended:
                        return bytes(body)
        except TimeoutError:
            if size > most:
                raise too_large from None
            raise ApiError(408, f"the body did not come in {BODY_SECONDS:g} s") from None


def _check_head(scope: Scope) -> None:
    """h11 bounds what it waits for, but not what comes at once."""
    if scope["http_version"] not in ("1.0", "1.1"):
        raise ApiError(400, "HTTP 1.0 and 1.1 are spoken here")
    sizes = [len(name) + len(value) for name, value in scope["headers"]]
    if len(sizes) > HEADERS or sum(sizes) + len(scope["raw_path"]) + len(scope["query_string"]) > HEADER_BYTES:
        raise ApiError(431, f"at most {HEADERS} headers and {HEADER_BYTES} bytes of them are read")


class _GoneError(Exception):
    """The client left before its request was whole."""


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


async def _preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, content-type, x-api-key, anthropic-version"),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def host_name(value: str) -> str:
    """The name in a Host header, without the port."""
    value = value.strip().lower()
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.partition(":")[0]


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Protocol(H11Protocol):
    """uvicorn's, but a connection on which no request becomes whole is closed after ``HEADER_SECONDS``."""

    _late: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        asking = self.conn.their_state is h11.IDLE
        if asking and self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self._give_up)
        elif not asking:
            self._forget()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _give_up(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
