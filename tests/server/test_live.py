"""What the page asks for: the state agrees with the store, and only the page's own files are served."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from flashpack.runtime.sampling import Sampling
from flashpack.runtime.session import Session
from flashpack.runtime.stats import LayerStats, StoreStats
from flashpack.server.live import FRESH, WINDOW, Live, router_for
from tests.conftest import PackOf


@pytest.fixture(scope="module")
def session(pack_of: PackOf) -> Session:
    return Session(pack_of("trained"), context=512, memory="smallest")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Store:
    """Counters and residents that a test sets."""

    def __init__(self, layers: int) -> None:
        self.stats = StoreStats("direct", "", {i: LayerStats() for i in range(layers)})
        self.here: list[tuple[int, int]] = []
        self.asked: list[tuple[int, int]] = []

    def resident(self) -> list[tuple[int, int]]:
        return self.here

    def used(self) -> list[tuple[int, int]]:
        return self.asked


def simulated(layers: int, experts: int) -> tuple[Live, Store, Clock]:
    store, clock = Store(layers), Clock()
    kinds = [SimpleNamespace(index=i, experts=experts) for i in range(layers)]
    runtime = SimpleNamespace(
        store=store,
        pack=SimpleNamespace(manifest=SimpleNamespace(layers=kinds), folder=SimpleNamespace(name="large.flashpack")),
        budget=SimpleNamespace(to_json=lambda: {"base": 1, "dense": 2, "kv": 3, "work": 4, "arena": 5, "total": 15}),
        context=4096,
        kernels="none",
    )
    whole: Any = SimpleNamespace(runtime=runtime)
    return Live(whole, clock), store, clock


def bits(state: dict[str, Any], name: str) -> set[tuple[int, int]]:
    """The (layer, expert) pairs of a bitmap, read as the page reads it."""
    rows, counts = base64.b64decode(state[name]), state["experts"]
    stride = -(-max(counts) // 8)
    assert len(rows) in (0, stride * len(counts))
    return {
        (layer, e)
        for i, layer in enumerate(state["layers"])
        for e in range(counts[i] if rows else 0)
        if rows[i * stride + (e >> 3)] >> (e & 7) & 1
    }


def test_the_state_agrees_with_the_store_after_a_generation(session: Session) -> None:
    clock = Clock()
    live = Live(session, clock)
    ids = session.tokenizer("Hello, how are you?")["input_ids"]
    live.state()
    clock.now += 1
    before = session.runtime.store.stats.total()
    live.begin("chat", len(ids))
    seen: list[dict[str, Any]] = []

    def on_token() -> bool:
        clock.now += 0.2
        live.token()
        seen.append(live.state())
        return False

    # ``cancelled`` is asked before each layer of the prompt, too: tokens are those that follow.
    result = session.complete(ids, max_tokens=6, sampling=Sampling(), on_text=lambda _: on_token())
    live.end(result)
    clock.now += 0.2
    state, now = live.state(), session.runtime.store.stats.total()
    spent = now.less(before)
    elapsed = clock.now - 100
    assert state["reads_per_second"] == pytest.approx(spent.reads / elapsed)
    assert state["bytes_per_second"] == pytest.approx(spent.bytes_read / elapsed)
    assert spent.bytes_read > 0
    assert state["hit_rate"] == pytest.approx(spent.hits / (spent.hits + spent.misses))
    assert bits(state["map"], "resident") == set(session.runtime.store.resident())
    assert state["map"]["in_memory"] == len(session.runtime.store.resident())
    assert state["map"]["experts"] == [layer.experts for layer in session.runtime.pack.manifest.layers]
    assert state["memory"] == session.runtime.budget.to_json()
    assert not state["busy"]
    assert state["map"]["used"] == ""
    assert state["run"]["prompt_tokens"] == len(ids)
    assert state["run"]["tokens"] == state["tokens"] == len(seen) > 1
    assert state["run"]["tokens_per_second"] == result.generate_rate
    parts = state["run"]["time"]
    assert parts["hits"] + parts["waits"] + parts["misses"] + parts["rest"] >= parts["seconds"] > 0
    writing = seen[-1]
    assert writing["busy"]
    assert writing["run"]["phase"] == "writing"
    chosen = session.runtime.experts_per_token[0]
    assert len(bits(writing["map"], "used")) == chosen * len(writing["map"]["layers"])


def test_bits_of_layers_of_several_sizes() -> None:
    live, store, _ = simulated(3, 9)
    store.here = [(0, 0), (0, 7), (1, 8), (2, 3)]
    state = live.state()["map"]
    assert base64.b64decode(state["resident"]) == bytes([0b10000001, 0, 0, 1, 0b1000, 0])
    assert bits(state, "resident") == set(store.here)


def test_rates_are_of_now() -> None:
    live, store, clock = simulated(1, 8)
    live.state()
    live.begin("chat", 10)
    for _ in range(40):
        clock.now += 0.25
        one = store.stats.layers[0]
        one.hits, one.misses, one.reads, one.bytes_read = (
            one.hits + 3,
            one.misses + 1,
            one.reads + 1,
            one.bytes_read + 8,
        )
        live.token()
        state = live.state()
    assert state["tokens_per_second"] == pytest.approx(4)
    assert (state["reads_per_second"], state["bytes_per_second"]) == pytest.approx((4, 32))
    assert state["hit_rate"] == pytest.approx(0.75)
    clock.now += 2  # the next token is late
    assert 0 < live.state()["tokens_per_second"] < 1
    live.end(None)
    clock.now += 60  # nobody looked
    state = live.state()
    assert (state["tokens_per_second"], state["reads_per_second"], state["hit_rate"]) == (0, 0, None)
    assert state["hit_rate_total"] == 0.75
    assert state["run"]["phase"] == "done"


def test_counters_that_begin_again_give_no_negative_rates() -> None:
    live, store, clock = simulated(1, 8)
    store.stats.layers[0] = LayerStats(hits=9, misses=9, reads=9, bytes_read=9, hit_seconds=9)
    live.state()
    live.begin("chat", 1)
    store.stats.reset()
    clock.now += 1
    state = live.state()
    assert (state["reads_per_second"], state["bytes_per_second"], state["hit_rate"]) == (0, 0, None)
    assert state["run"]["time"]["hits"] == 0


def test_however_many_look_the_state_is_made_once_in_a_while() -> None:
    live, store, clock = simulated(1, 8)
    first = live.state()
    store.here = [(0, 1)]
    clock.now += FRESH / 2
    assert live.state() is first
    clock.now += FRESH
    assert bits(live.state()["map"], "resident") == {(0, 1)}


def test_a_large_model_makes_a_small_answer_and_nothing_grows() -> None:
    live, store, clock = simulated(94, 512)
    store.here = [(layer, e) for layer in range(94) for e in range(0, 512, 2)]
    with TestClient(app_of(live)) as client:
        assert len(client.get("/live").content) < 12_000
    for _ in range(500):
        clock.now += 0.5
        live.begin("chat", 1)
        live.end(None)
    assert len(live._marks) <= WINDOW / 0.5 + 2


def app_of(live: Live) -> FastAPI:
    app = FastAPI()
    app.include_router(router_for(live))
    return app


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(app_of(simulated(2, 8)[0])) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/", "text/html"), ("/page/app.js", "text/javascript"), ("/page/style.css", "text/css"),
     ("/page/icon.svg", "image/svg+xml")],
)  # fmt: skip
def test_files_of_the_page_have_types_and_a_strict_policy(client: TestClient, path: str, kind: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].split(";")[0] == kind
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    "path",
    ["/page/", "/page/../live.py", "/page/%2e%2e/live.py", "/page/..%2flive.py", "/page/%2fetc%2fpasswd",
     "/page/..\\live.py", "/page/app.js/", "/page/app.js%00", "/page/APP.JS", "/page/none.js"],
)  # fmt: skip
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path, follow_redirects=False).status_code in (404, 307)
    assert b"router_for" not in client.get(path).content


def test_the_state_is_not_kept_by_anybody(client: TestClient) -> None:
    answer = client.get("/live")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.json()["model"] == "large.flashpack"
