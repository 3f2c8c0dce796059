"""``Service``: a session behind a socket, until it is told to end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Sequence
from types import FrameType

import uvicorn

from flashpack.errors import UsageError
from flashpack.runtime.session import Session
from flashpack.server.app import app_of
from flashpack.server.guard import Limits, Protocol, is_local
from flashpack.server.live import Live
from flashpack.server.metrics import Metrics
from flashpack.server.worker import Worker

CONNECTIONS = 256
"""More at a time get 503: each may hold a body."""

GRACE = 5
"""Seconds that streams have for their end when the server goes down."""


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet. Raises ``UsageError`` if there can be none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
    except (OSError, UnicodeError, OverflowError) as e:
        why = getattr(e, "strerror", None) or e
        raise UsageError(f"--host {host} --port {port}: {why}; choose another, or --port 0 for a free one") from e
    return made


def hosts_of(host: str, more: Sequence[str]) -> frozenset[str] | None:
    """The names by which a server bound to ``host`` may be called; None: any."""
    if not is_local(host):
        return frozenset(more) if more else None
    return frozenset({"localhost", "127.0.0.1", "::1", host.lower(), *(name.lower() for name in more)})


class Service(uvicorn.Server):
    """``session`` behind ``listening``; at most ``queue`` requests wait. ``run`` serves until ``stop`` or a signal."""

    def __init__(self, session: Session, listening: socket.socket, limits: Limits, queue: int) -> None:
        self.metrics = Metrics(session)
        self.live = Live(session)
        self.worker = Worker(session, self.live, self.metrics, queue)
        self._listening = listening
        app = app_of(session, self.worker, self.live, self.metrics, limits)
        super().__init__(
            uvicorn.Config(
                app, http=Protocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
                limit_concurrency=CONNECTIONS, timeout_keep_alive=30, timeout_graceful_shutdown=GRACE,
                proxy_headers=False, backlog=CONNECTIONS,
            )
        )  # fmt: skip

    def stop(self) -> None:
        """From any thread: what runs is cancelled, streams end, and ``run`` returns."""
        self.worker.stop()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal; a second Ctrl-C does not wait for streams. Unlike uvicorn's, it is not raised again at the end."""
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's; then it listens."""
        await super().startup(sockets)
        self._ready()

    def serve_all(self, ready: Callable[[], object] = lambda: None) -> None:
        """Until the end, and then until the worker has ended. ``ready`` is called when clients may come."""
        self._ready = ready
        try:
            self.run([self._listening])
        finally:
            self.worker.stop()
            self.worker.join()
            self._listening.close()
