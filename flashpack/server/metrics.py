"""Numbers for Prometheus: what the sessions' results say, added up."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, generate_latest

from flashpack.runtime.generate import Result
from flashpack.runtime.memory import usage
from flashpack.runtime.session import Session

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, session: Session) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._session = session
        self._requests = self._counter("requests", "Requests, by route and HTTP status.", "route", "status")
        self._generations = self._counter("generations", "Generations, by their end.", "finish")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts, those that were not read again among them.")
        self._reused = self._counter("reused_tokens", "Tokens of prompts that were not read again.")
        self._generated = self._counter("generated_tokens", "Tokens generated.")
        self._prompt_seconds = self._counter("prompt_seconds", "Time for reading prompts.")
        self._generate_seconds = self._counter("generate_seconds", "Time for the tokens after the first.")
        self._hits = self._counter("expert_hits", "Requests for experts that were in memory.")
        self._misses = self._counter("expert_misses", "Requests for experts that were not.")
        self._bytes = self._counter("expert_read_bytes", "Bytes of experts read.")
        self._wait = self._counter("expert_wait_seconds", "Time in which only reads were waited for.")
        self._gauge("memory_bytes", "Memory of the process, without mapped files.", lambda: usage().anonymous)
        self._gauge("mapped_bytes", "Mapped files in memory.", lambda: usage().file)
        self._gauge("experts_in_memory", "Experts in memory.", lambda: len(session.runtime.store.resident()))

    def watch(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """What the queue says of itself."""
        self._gauge("queue_length", "Requests that wait.", waiting)
        self._gauge("running", "Requests that are answered now: 0 or 1.", running)

    def request(self, route: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()

    def add(self, result: Result) -> None:
        """A generation ended."""
        total = result.store["total"]
        self._generations.labels(result.finish).inc()
        self._prompt.inc(result.prompt_tokens)
        self._reused.inc(result.reused_tokens)
        self._generated.inc(result.generated_tokens)
        self._prompt_seconds.inc(result.prompt_seconds)
        self._generate_seconds.inc(result.generate_seconds)
        self._hits.inc(total["hits"])
        self._misses.inc(total["misses"])
        self._bytes.inc(total["bytes_read"])
        self._wait.inc(total["wait_seconds"])

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"flashpack_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"flashpack_{name}", text, registry=self.registry).set_function(value)
