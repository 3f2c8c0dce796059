"""Sources behind http: the same pack as from the folder, or one clear line and a conversion that continues."""

from __future__ import annotations

import re
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import flashpack
from flashpack.cli import app
from flashpack.converter import folder, transfer
from flashpack.converter.convert import default_out
from flashpack.converter.plan import Plan
from flashpack.errors import SourceError
from flashpack.formats.constants import JOURNAL, MANIFEST
from tests.conftest import CHECKPOINTS, ROOT, TRAINED, PackOf, contents
from tests.converter.faults import CASES, table
from tests.http_server import Handler, Request, Site, serve

QUICK = transfer.Policy(
    attempts=4, first_wait=0.01, longest_wait=0.02, connect=20, read=20, progress=2**20, slowest=2**14
)
SMALL = CHECKPOINTS / "qwen3_moe"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "POLICY", QUICK)


@pytest.fixture
def site_of() -> Iterator[Callable[..., Site]]:
    """``site_of(folder, hub=)``: the folder behind a server of its own."""
    running = []

    def make(source: Path, hub: bool = False) -> Site:
        site, server = serve(source, hub)
        running.append(server)
        return site

    yield make
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", CASES)
def test_a_misbehaving_server_gives_the_same_pack_or_one_line_and_a_conversion_that_continues(
    site_of: Callable[..., Site], tmp_path: Path, pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case, site, out = CASES[name], site_of(SMALL), tmp_path / "out"
    if name == "whole":
        monkeypatch.setattr(transfer, "WHOLE_BYTES", 10_000)
    if name in ("stall", "trickle"):
        monkeypatch.setattr(transfer, "POLICY", replace(QUICK, read=0.5, attempts=9))
    source = f"{site.url}/models/small?token=secret"
    site.fault = case.fault
    begun = time.monotonic()
    if case.refused:
        with pytest.raises(SourceError, match=case.refused) as caught:
            flashpack.convert(source, out, workers=1)
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)
        assert not (out / MANIFEST).exists()
        site.fault = None
    report = flashpack.convert(source, out, workers=1)
    assert contents(out) == contents(pack_of("qwen3_moe"))
    assert report.notices == []
    if name == "429":
        assert time.monotonic() - begun > 1
    if name in ("400", "401", "403", "404"):  # never asked twice
        asked = [(r.name, r.first) for r in site.requests if r.number]
        assert asked.count(asked[0]) <= 2  # once more when the conversion continued


def test_the_list_of_faults_is_the_one_in_the_documentation() -> None:
    assert table() in (ROOT / "docs" / "streaming.md").read_text()


def spans_of(plan: Plan) -> dict[str, set[int]]:
    """The bytes of each file that a plan reads."""
    found: dict[str, set[int]] = {}
    tensors = [
        layer.sources[s].matrix(e) for layer in plan.layers for s in layer.sources for e in range(layer.layer.experts)
    ]
    for tensor in [*tensors, *(t.source for t in plan.dense())]:
        for part in tensor.parts.values():
            found.setdefault(part.path, set()).update(range(part.offset, part.offset + part.nbytes))
    return found


def sent_of(site: Site) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, first, count in site.sent:
        if name.endswith(".safetensors"):
            found.setdefault(name, []).extend(range(first, first + count))
    return found


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_moe-mlx4", "gpt_oss", "deepseek_v3"])
def test_what_the_plan_needs_is_fetched_once_and_nothing_else(
    site_of: Callable[..., Site], tmp_path: Path, name: str
) -> None:
    """Vision towers, multi-token prediction, layers past the last are not; rows that gate and up share are once."""
    site = site_of(CHECKPOINTS / name)
    out = tmp_path / "out"
    flashpack.convert(site.url, out)
    plan = flashpack.converter.plan(CHECKPOINTS / name)
    needed, sent = spans_of(plan), sent_of(site)
    total = sum(map(len, needed.values()))
    shards = [file for file in plan.checkpoint.fingerprint if file.endswith(".safetensors")]
    headers = {file: int.from_bytes((site.content(file) or b"")[:8], "little") + 8 for file in shards}
    assert sum(map(len, sent.values())) - sum(headers.values()) - len(headers) <= 1.05 * total
    for file, positions in sent.items():
        data = [p for p in positions if p >= headers[file]]
        assert len(set(data) - needed.get(file, set())) <= 0.02 * total, f"{file}: bytes that nobody needs"
    dropped = {plan.checkpoint.stored[n] for n in plan.dropped if n in plan.checkpoint.stored}
    assert not [x for x in dropped if x.nbytes > 512 and x.offset + x.nbytes // 2 in sent.get(x.path, [])]
    assert contents(out) == contents_of_local(name, tmp_path)


def contents_of_local(name: str, tmp_path: Path) -> dict[str, str]:
    flashpack.convert(CHECKPOINTS / name, tmp_path / "local")
    return contents(tmp_path / "local")


def test_neighbours_are_one_request_and_little_is_held(
    site_of: Callable[..., Site], tmp_path: Path, pack_of: PackOf
) -> None:
    """The bundled model has 24.9 MB in 128 experts of three matrices, and 100 dense tensors."""
    site, out = site_of(TRAINED), tmp_path / "out"
    flashpack.convert(site.url, out, "q4", "q8")
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))
    assert site.data < 40
    assert len(site.requests) < 80


@pytest.mark.parametrize("missing", [403, 404, 200])
def test_files_that_are_not_there_are_not_missed(
    site_of: Callable[..., Site], tmp_path: Path, pack_of: PackOf, missing: int
) -> None:
    """Web servers say 404, object stores 403; some send a page."""
    site, out = site_of(SMALL), tmp_path / "out"
    real = Site.content

    def answer(handler: Handler, request: Request) -> None:
        if real(site, request.name) is None:
            body = b"<html>welcome</html>" if missing == 200 else b""
            handler.answer(missing, {"Content-Type": "text/html", "ETag": '"x"'}, body)
        else:
            Handler.send_file(handler, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "route", lambda handler, request: answer(handler, request))
        flashpack.convert(site.url, out)
    assert contents(out) == contents(pack_of("qwen3_moe"))


def test_nothing_secret_of_an_address_is_written_or_said(
    site_of: Callable[..., Site], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site, out = site_of(SMALL), tmp_path / "out"
    source = site.url.replace("//", "//user:hunter2@") + "/a/model?token=hunter2#hunter2"

    def stop(handler: Handler, request: Request, content: bytes) -> bool:
        assert request.headers["authorization"] == "Basic dXNlcjpodW50ZXIy"
        assert request.query == {"token": ["hunter2"]}
        return request.number > 9 and not handler.answer(500)

    site.fault = stop
    for again in (True, False):
        with pytest.raises(SystemExit):
            app(["convert", source, str(out), "--workers", "1"])
        if again:
            assert b"hunter2" not in (out / JOURNAL).read_bytes()
            site.fault = None
    for command in (["verify", str(out), "--against", source], ["repair", str(out), "--from", source]):
        with pytest.raises(SystemExit, match=r"^0$"):
            app(command)
    printed = capsys.readouterr()
    assert "hunter2" not in printed.out + printed.err
    assert all(b"hunter2" not in path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_a_pack_is_proven_and_mended_from_a_source_far_away(
    site_of: Callable[..., Site], pack_copy: Callable[..., Path]
) -> None:
    from flashpack.converter.against import against
    from tests.formats.test_repair import damage_record

    site, pack = site_of(SMALL), pack_copy("qwen3_moe")
    assert against(pack, site.url) == []
    damage_record(pack)
    before = site.bytes_of()
    assert flashpack.repair(pack, site.url).findings == []
    assert flashpack.verify(pack) == []
    assert site.bytes_of() - before < 200_000  # headers, and one expert


def test_the_name_of_the_pack_is_the_last_part_of_the_source(tmp_path: Path) -> None:
    names = {
        "hf://org/model@refs/pr/1": "model",
        "HF://model": "model",
        "https://host/a/b%20c/?t=x/y": "b c",
        "https://host:8080": "host",
        str(tmp_path / "some" / ".." / "folder"): "folder",
    }
    assert {source: str(default_out(source)) for source in names} == {s: f"{n}.flashpack" for s, n in names.items()}
    for bad in ("s3://bucket/x", "ftp://host/x", "https:///x"):
        with pytest.raises(SourceError):
            folder.open_folder(bad)


def test_a_conversion_that_is_stopped_leaves_nobody_waiting(
    site_of: Callable[..., Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a server keeps everyone waiting and others are between attempts."""
    monkeypatch.setattr(transfer, "POLICY", replace(QUICK, read=60, first_wait=60, longest_wait=60))
    site = site_of(SMALL)
    released = threading.Event()

    def fault(handler: Handler, request: Request, content: bytes) -> bool:
        if request.number % 2:
            released.wait(20)
        elif request.number:
            handler.answer(503)
        return request.number > 0

    def interrupt(plan: object, done: int) -> None:
        nonlocal begun
        site.fault = fault
        begun = time.monotonic()
        main = threading.main_thread().ident
        assert main is not None
        threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT)).start()

    begun = 0.0
    with pytest.raises(KeyboardInterrupt):
        flashpack.convert(site.url, tmp_path / "out", on_plan=interrupt)
    assert time.monotonic() - begun < 15
    released.set()


def test_certificates_are_checked(tmp_path: Path) -> None:
    """A server with a certificate that nobody trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(Path(__file__).with_name("untrusted.pem"))
    site, server = serve(SMALL)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    try:
        with pytest.raises(SourceError, match=r"config\.json: .*no connection: .*CERTIFICATE_VERIFY_FAILED"):
            flashpack.convert(site.url.replace("http:", "https:"), tmp_path / "out")
    finally:
        server.shutdown()
        server.server_close()
    assert site.requests == []


@pytest.mark.parametrize(("value", "seconds"), [("7", 7), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("soon", None)])
def test_retry_after_is_a_number_or_a_date(value: str | None, seconds: float | None) -> None:
    assert transfer.retry_after(value) == seconds


def test_a_long_wait_grows_and_is_never_twice_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(transfer, "pause", lambda seconds, stop: waits.append(seconds))
    answered = threading.Event()
    answered.set()
    attempts = transfer.Attempts("x", transfer.Policy(), [threading.Event()], answered)
    with pytest.raises(SourceError, match=re.escape("x: 503 (10 failures in a row); run the same command again")):
        [attempts.failed("503") for _ in range(99)]
    assert len(waits) == len(set(waits)) == 9
    assert all(min(0.5 * 2**i, 30) / 2 <= w <= min(0.5 * 2**i, 30) for i, w in enumerate(waits))
