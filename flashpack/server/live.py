"""The page and what it shows while it runs: a small picture of the run, made anew at most ten times a second.

The thread that generates tells ``Live`` what it does; any other thread may ask ``Live.state`` at the same time.
Counters of the store are read while they change, so numbers that belong together may differ by one request.
"""

from __future__ import annotations

import base64
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import JSONResponse

from flashpack.runtime.cache import Key
from flashpack.runtime.generate import Result
from flashpack.runtime.session import Session
from flashpack.runtime.stats import LayerStats

WINDOW = 2.0
"""Seconds over which "now" is taken: tokens, reads and bytes per second, hit rate."""

FRESH = 0.1
"""Seconds for which a state is good: so often it is made at the most, however many look."""

_PAGE = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class _Mark:
    """The counters of all layers at a time, and the tokens so far."""

    at: float
    stats: LayerStats
    tokens: int


@dataclass
class _Run:
    """A generation. ``begun`` and ``first``: counters at its begin and after its first token; ``last``: at its end."""

    kind: str
    prompt_tokens: int
    begun: _Mark
    first: _Mark | None = None
    last: _Mark | None = None
    result: Result | None = None


class Live:
    """What a ``session`` does. ``clock``: seconds, of any beginning.

    The thread that generates calls ``begin``, then ``token`` after each token, then ``end``, once each in this order.
    """

    def __init__(self, session: Session, clock: Callable[[], float] = time.monotonic) -> None:
        self._runtime, self._clock = session.runtime, clock
        self._layers = sorted(session.runtime.pack.manifest.layers, key=lambda layer: layer.index)
        self._width = max((layer.experts for layer in self._layers), default=0)
        self._indices = np.array([layer.index for layer in self._layers], np.intp)
        self._lock = threading.Lock()  # of all that follows
        self._tokens = self._runs = 0
        self._times: deque[float] = deque(maxlen=1024)  # of tokens
        self._used: list[Key] = []  # by the last token
        self._run: _Run | None = None
        self._marks: deque[_Mark] = deque()
        self._state: dict[str, Any] = {}
        self._made = float("-inf")

    def begin(self, kind: str, prompt_tokens: int) -> None:
        """A generation begins; ``kind`` says for whom, in a word."""
        with self._lock:
            self._runs += 1
            self._times.clear()
            self._run = _Run(kind, prompt_tokens, self._mark())
            self._before(self._run.begun)

    def token(self) -> None:
        """A token has been chosen."""
        used = self._runtime.store.used()
        with self._lock:
            self._tokens += 1
            self._used = used
            self._times.append(self._clock())
            if self._run and self._run.first is None:
                self._run.first = self._mark()

    def end(self, result: Result | None) -> None:
        """The generation has ended; without a result if it failed."""
        with self._lock:
            self._used = []
            if self._run:
                self._run.last, self._run.result = self._mark(), result

    def state(self) -> dict[str, Any]:
        """What the page shows, to be written as JSON. Rates are per second, sizes in bytes, times in seconds."""
        with self._lock:
            now = self._mark()
            if now.at - self._made >= FRESH:
                self._state, self._made = self._picture(now), now.at
            return self._state

    def _mark(self) -> _Mark:
        return _Mark(self._clock(), self._runtime.store.stats.total(), self._tokens)

    def _before(self, now: _Mark) -> _Mark:
        """Keep ``now``, and what "now" is compared with: the newest mark that is a window old. After a pause in which
        nobody looked, marks are too old for that; then a later one."""
        self._marks.append(now)
        while len(self._marks) > 1 and self._marks[1].at <= now.at - WINDOW:
            self._marks.popleft()
        if self._marks[0].at < now.at - 2 * WINDOW:
            self._marks.popleft()
        return self._marks[0]

    def _picture(self, now: _Mark) -> dict[str, Any]:
        before = self._before(now)
        seconds, spent = now.at - before.at, now.stats.less(before.stats)
        runtime, run = self._runtime, self._run
        busy = run is not None and run.last is None
        resident = runtime.store.resident()
        return {
            "model": runtime.pack.folder.name,
            "context": runtime.context,
            "kernels": runtime.kernels,
            "runs": self._runs,
            "tokens": self._tokens,
            "busy": busy,
            "tokens_per_second": self._rate(now.at) if busy else 0.0,
            "hit_rate": _share(spent),
            "hit_rate_total": _share(now.stats),
            "reads_per_second": max(0.0, spent.reads / seconds) if seconds else 0.0,
            "bytes_per_second": max(0.0, spent.bytes_read / seconds) if seconds else 0.0,
            "run": _told(run, now) if run else None,
            "memory": runtime.budget.to_json(),
            "map": {
                "layers": [layer.index for layer in self._layers],
                "experts": [layer.experts for layer in self._layers],
                "in_memory": len(resident),
                "resident": self._bits(resident),
                "used": self._bits(self._used if self._times else runtime.store.used()) if busy else "",
            },
        }

    def _rate(self, now: float) -> float:
        """Tokens per second over the last window, or the last two tokens; it falls while the next one is late."""
        times = [at for at in self._times if at >= now - WINDOW]
        if len(times) < 2:
            times = list(self._times)[-2:]
        if len(times) < 2:
            return 0.0
        between = len(times) - 1
        return between / max(times[-1] - times[0], (now - times[0]) * between / len(times), 1e-9)

    def _bits(self, keys: list[Key]) -> str:
        """A row of bits for each layer, the lowest bit of a byte first, rows of whole bytes, in base64."""
        pairs = np.fromiter(chain.from_iterable(keys), np.intp, 2 * len(keys)).reshape(-1, 2)
        bits = np.zeros((len(self._layers), self._width), np.bool_)
        bits[np.searchsorted(self._indices, pairs[:, 0]), pairs[:, 1]] = True
        return base64.b64encode(np.packbits(bits, axis=1, bitorder="little").tobytes()).decode()


def _share(stats: LayerStats) -> float | None:
    """Requests found in memory; None without requests."""
    requests = stats.hits + stats.misses
    return min(1.0, max(0.0, stats.hits / requests)) if requests > 0 else None


def _told(run: _Run, now: _Mark) -> dict[str, Any]:
    """One generation: how far it is, and where the time goes: of writing, or of reading while there is no token."""
    end, since = run.last or now, run.first or run.begun
    spent, seconds = end.stats.less(since.stats), max(0.0, end.at - since.at)
    parts = {"hits": spent.hit_seconds, "waits": spent.wait_seconds, "misses": spent.miss_seconds}
    parts = {name: max(0.0, value) for name, value in parts.items()}
    return {
        "kind": run.kind,
        "phase": "done" if run.last else "writing" if run.first else "reading",
        "prompt_tokens": run.prompt_tokens,
        "reused_tokens": run.result.reused_tokens if run.result else None,
        "tokens": end.tokens - run.begun.tokens,
        "seconds": end.at - run.begun.at,
        "tokens_per_second": run.result.generate_rate if run.result else None,
        "time": {
            "of": "writing" if run.first else "reading",
            "tokens": end.tokens - run.first.tokens if run.first else 0,
            "seconds": seconds,
            **parts,
            "rest": max(0.0, seconds - sum(parts.values())),
        },
    }


def router_for(live: Live) -> APIRouter:
    """``/``, the files of the page below ``/page/``, and ``/live``: the state as JSON."""
    files = {path.name: path.read_bytes() for path in _PAGE.iterdir() if path.suffix in _TYPES}
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def index() -> Response:
        return file("index.html")

    @router.get("/page/{name}")
    async def file_of(name: str) -> Response:
        return file(name)

    def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "the page has no such file")
        headers = {**_HEADERS, "Cache-Control": "no-cache"}
        return Response(files[name], media_type=_TYPES[Path(name).suffix], headers=headers)

    @router.get("/live")
    async def state() -> Response:
        return JSONResponse(live.state(), headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})

    return router
