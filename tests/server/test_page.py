"""The page in a real browser: Chromium, without a screen."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from flashpack.runtime.session import Session
from flashpack.server.guard import Limits
from flashpack.server.serving import Service, bound, hosts_of
from flashpack.server.worker import Job
from tests.conftest import PackOf

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

ANSWER = """Some **bold** and `code`, [a link](https://example.org/) and [none](javascript:alert(1)).

# Title

- one
- two
  - inner

1. first

> said

| a | b |
|---|---|
| 1 | 2 |

```python
for i in range(3): print("<b>")
```

<img src=x onerror="document.title='broken'"> <script>document.title='broken'</script> ![image](https://example.org/x.png)
"""

HEBREW = "\u05e9\u05dc\u05d5\u05dd"

Open = Callable[..., Page]


HELD = 8


@dataclass
class Site:
    """A server whose answers wait after ``HELD`` tokens, unless it is ``open``, or they are ``cancelled``."""

    address: str
    open: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)


@contextmanager
def served(session: Session, key: str | None = None) -> Iterator[Site]:
    listening = bound("127.0.0.1", 0)
    site = Site(f"http://127.0.0.1:{listening.getsockname()[1]}")
    service = Service(session, listening, Limits(2**20, key, hosts_of("127.0.0.1", [])), queue=4)
    begin, token, cancel = service.live.begin, service.live.token, service.worker.cancel
    chosen = 0

    def begun(kind: str, prompt_tokens: int) -> None:
        nonlocal chosen
        chosen = 0
        site.cancelled.clear()
        begin(kind, prompt_tokens)

    def held() -> None:
        nonlocal chosen
        token()
        chosen += 1
        while chosen >= HELD and not (site.open.wait(0.01) or site.cancelled.is_set()):
            pass

    def cancels(job: Job) -> None:
        cancel(job)
        site.cancelled.set()

    vars(service.live).update(begin=begun, token=held)
    vars(service.worker).update(cancel=cancels)
    thread = threading.Thread(target=service.serve_all)
    thread.start()
    try:
        yield site
    finally:
        site.open.set()
        service.stop()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # A shell in a container is root, for whom Chromium's sandbox does not start.
    args = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def session(pack_of: PackOf) -> Session:
    return Session(pack_of("trained"), prefix_memory=2**24, context=1024)


@pytest.fixture(scope="module")
def site(session: Session) -> Iterator[Site]:
    with served(session) as site:
        yield site


@pytest.fixture
def opened(browser: Browser, site: Site) -> Iterator[Open]:
    """``opened(**context options)``: the page; at the end no error may have been told and no other host asked."""
    contexts, told, asked = [], [], []
    site.open.set()

    def open_page(address: str = site.address, **options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: told.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        if address == site.address:
            expect(page.locator("#model")).not_to_be_empty()
        return page

    expect.set_options(timeout=60_000)
    yield open_page
    site.open.set()
    for context in contexts:
        context.close()
    # A refused request is told by the browser itself, whatever the page does about it.
    assert [one for one in told if "Failed to load resource" not in one] == []
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:"))] == []


def send(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def done(page: Page) -> None:
    expect(page.locator("#status")).to_have_text("The answer is complete.")


def answer_with(page: Page, *deltas: dict[str, Any]) -> None:
    """The page gets these pieces in place of the model's."""
    chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=text))


def drawn(page: Page) -> str:
    """The map's pixels."""
    return page.evaluate("document.querySelector('#map').toDataURL()")


def test_an_answer_streams_and_the_map_changes(opened: Open, site: Site) -> None:
    page = opened()
    page.wait_for_timeout(300)
    assert page.evaluate("document.querySelector('#map').width") > 100
    before = drawn(page)
    site.open.clear()
    send(page, "What is 922 plus 291?")
    expect(page.locator("#phase")).to_contain_text("Writing, 8 tokens")
    expect(page.locator("#stop")).to_be_visible()
    part = page.locator(".assistant .body").inner_text()
    assert "291" not in part
    during = drawn(page)
    assert during != before
    site.open.set()
    done(page)
    call = page.locator(".assistant .call")
    expect(call).to_contain_text("calculator")
    expect(call).to_contain_text("922 + 291")
    expect(page.locator("#time-table tr")).to_have_count(4)
    expect(page.locator("#time-text")).to_contain_text("tokens of this answer")
    expect(page.locator("#n-hits")).to_contain_text("%")
    expect(page.locator("#spoken")).to_contain_text("calculator")
    page.locator("#layers summary").click()
    expect(page.locator("#layers tbody tr")).to_have_count(6)


def test_stop_ends_the_answer_also_on_the_server(opened: Open, site: Site) -> None:
    page = opened()
    site.open.clear()
    for how in ("button", "key"):
        send(page, "Tell me a story.")
        expect(page.locator("#phase")).to_contain_text("Writing, 8 tokens")
        page.locator("#stop").click() if how == "button" else page.keyboard.press("Escape")
        expect(page.locator("#status")).to_have_text("Stopped.")
        expect(page.locator(".assistant .tools").last).to_contain_text("Stopped.")
        assert site.cancelled.wait(60)
        expect(page.locator("#phase")).to_contain_text("At rest.")
        expect(page.locator("#send")).to_be_visible()


def test_a_conversation_survives_a_reload_and_goes_on(opened: Open, site: Site) -> None:
    page = opened()
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.locator("#settings summary").click()
    page.fill("#system", "You are a helpful assistant.")
    page.fill("#max-tokens", "20")
    page.fill("#temperature", "0.5")
    send(page, "Sort these words: salt, pens, lamp, oil.")
    done(page)
    said = page.locator("#messages").inner_text()
    page.reload()
    expect(page.locator(".message")).to_have_count(2)
    assert page.locator("#messages").inner_text() == said
    send(page, "And again?")
    done(page)
    roles = [message["role"] for message in sent[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert (sent[-1]["max_tokens"], sent[-1]["temperature"]) == (20, 0.5)
    page.locator("#new").click()
    expect(page.locator(".message")).to_have_count(0)
    page.reload()
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#system")).to_have_value("You are a helpful assistant.")


def test_markdown_is_shown_and_markup_is_text(opened: Open) -> None:
    page = opened()
    answer_with(page, {"reasoning_content": "Let me think."}, {"content": ANSWER[:40]}, {"content": ANSWER[40:]})
    send(page, "Show me all.")
    done(page)
    body = page.locator(".assistant .body")
    expect(body.locator("strong")).to_have_text("bold")
    expect(body.locator("pre code")).to_have_text('for i in range(3): print("<b>")')
    expect(body.locator("ul ul li")).to_have_text("inner")
    expect(body.locator("blockquote")).to_have_text("said")
    expect(body.locator("td")).to_have_text(["1", "2"])
    assert body.locator("a").evaluate_all("all => all.map(one => one.href)") == [
        "https://example.org/",
        "https://example.org/x.png",
    ]
    assert body.locator("img, script").count() == 0
    expect(body).to_contain_text("onerror")
    assert page.title() == "flashpack"
    expect(page.locator(".thinking div")).to_be_hidden()
    page.locator(".thinking summary").click()
    expect(page.locator(".thinking div")).to_have_text("Let me think.")


def test_calls_of_tools_that_the_server_reports(opened: Open) -> None:
    page = opened()
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": '}}
    more = {"index": 0, "function": {"arguments": '"Rome"}'}}
    answer_with(page, {"tool_calls": [call]}, {"tool_calls": [more]})
    send(page, "Weather?")
    done(page)
    expect(page.locator(".call td")).to_have_text("Rome")


def test_a_key_is_asked_for_and_used(opened: Open, session: Session) -> None:
    with served(session, key="secret") as guarded:
        guarded.open.set()
        page = opened(guarded.address)
        expect(page.locator("#key-form")).to_be_visible()
        send(page, "Hello")
        expect(page.locator("#key")).to_be_focused()
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        expect(page.locator("#notice")).to_contain_text("does not accept")
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        done(page)
        expect(page.locator("#key-form")).to_be_hidden()
        expect(page.locator(".user")).to_have_count(1)
        expect(page.locator("#model")).not_to_be_empty()
        page.reload()
        expect(page.locator("#model")).not_to_be_empty()
        page.close()


def test_errors_have_a_next_step(opened: Open) -> None:
    page = opened()
    busy = {"status": 429, "headers": {"Retry-After": "1"}, "json": {"error": {"message": "busy"}}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**busy))
    send(page, "Hello")
    expect(page.locator("#notice")).to_contain_text("busy")
    expect(page.locator("#notice button")).to_have_text("Try again")
    expect(page.locator("#notice button")).to_be_enabled()
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.locator("#notice button").click()
    expect(page.locator("#notice")).to_contain_text("does not answer")
    page.unroute("**/v1/chat/completions")
    page.locator("#notice button").click()
    done(page)
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator(".message")).to_have_count(2)


CHECKS = """() => {
  const channels = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = channels(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  let checked = 0;
  for (const one of document.querySelectorAll("body *")) {
    const text = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const own = text || one.matches("input, textarea");
    if (!own || !one.checkVisibility({ visibilityProperty: true })) continue;
    for (const pseudo of one.placeholder ? [null, "::placeholder"] : [null]) {
      const [a, b] = [light(channels(getComputedStyle(one, pseudo).color)), light(behind(one))].sort((x, y) => y - x);
      checked++;
      if ((a + 0.05) / (b + 0.05) < 4.5) found.push(`contrast of ${one.outerHTML.slice(0, 80)}`);
    }
  }
  for (const one of document.querySelectorAll("input, textarea, button")) {
    const name = one.labels?.length || one.textContent.trim() || one.getAttribute("aria-label");
    if (!name) found.push(`no name: ${one.outerHTML}`);
    const box = one.getBoundingClientRect();
    if (one.checkVisibility() && box.height < 24) found.push(`too small: ${one.outerHTML}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map((one) => one.id);
  if (new Set(ids).size < ids.length) found.push("an id twice");
  for (const name of ["for", "aria-labelledby", "aria-describedby"])
    for (const one of document.querySelectorAll(`[${name}]`))
      if (!document.getElementById(one.getAttribute(name))) found.push(`${name} of ${one.outerHTML}`);
  if (document.querySelector(":is(canvas, [role=img]):not([aria-labelledby])")) found.push("an image without name");
  if (document.querySelector("[style]:not(canvas, .bar i)")) found.push("a style in the markup");
  if (!document.documentElement.lang) found.push("no language");
  if (document.querySelectorAll("h1").length !== 1) found.push("not one first heading");
  return { found, checked };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_contrast_and_sizes(opened: Open, scheme: str) -> None:
    page = opened(color_scheme=scheme)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json={}))
    send(page, "Hello")
    expect(page.locator("#notice")).to_be_visible()
    page.unroute("**/v1/chat/completions")
    answer_with(
        page,
        {"reasoning_content": "Thoughts"},
        {"content": ANSWER},
        {"content": '<tool_call>{"name": "a", "arguments": {"b": 1}}'},
    )
    send(page, "All")
    done(page)
    page.locator(".thinking summary").click()
    page.locator("#settings summary").click()
    page.evaluate("document.querySelectorAll('[hidden]').forEach((one) => { one.hidden = false; })")
    seen = page.evaluate(CHECKS)
    assert seen["found"] == []
    assert seen["checked"] > 50


@pytest.mark.parametrize("width", [320, 400, 640, 1280])
def test_nothing_is_wider_than_the_window(opened: Open, width: int) -> None:
    """640 is 1280 at 200 %."""
    page = opened(viewport={"width": width, "height": 700})
    answer_with(page, {"content": f"{ANSWER}\n{HEBREW} {'long' * 100}"})
    send(page, "x" * 300)
    done(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    map_width = page.evaluate("document.querySelector('#map').getBoundingClientRect().width")
    assert 200 < map_width <= width
    hebrew = page.locator(".assistant .body p", has_text=HEBREW)
    assert hebrew.evaluate("one => getComputedStyle(one).direction") == "rtl"


def test_all_can_be_reached_with_the_keyboard(opened: Open) -> None:
    page = opened()
    reached = set()
    page.evaluate("document.querySelector('#settings').open = true")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break  # after the last one
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        outlined = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outlined != "none"
    assert reached >= {"new", "system", "temperature", "max-tokens", "text", "send", "Skip to the message field"}
    assert {"Settings", "By layer, as a table"} <= reached


def test_with_reduced_motion_nothing_fades(opened: Open, site: Site) -> None:
    page = opened(reduced_motion="reduce")
    site.open.clear()
    send(page, "Tell me a story.")
    expect(page.locator("#phase")).to_contain_text("Writing, 8 tokens")
    page.wait_for_timeout(600)  # until a picture of the state that stays has come
    first = drawn(page)
    page.wait_for_timeout(200)
    assert drawn(page) == first
