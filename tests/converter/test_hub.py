"""Repositories of a hub: one commit from beginning to end, hashes, tokens, refusals in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import flashpack
from flashpack.converter import transfer
from flashpack.errors import OutputError, SourceError
from flashpack.formats import verify
from flashpack.formats.constants import JOURNAL
from tests.conftest import CHECKPOINTS, ROOT, PackOf, contents
from tests.converter.test_streaming import QUICK
from tests.http_server import COMMIT, Handler, Request, Site, serve

SMALL = CHECKPOINTS / "qwen3_moe"
MODEL = "hf://org/model"
LATER = "f" * 40


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A hub with the model ``org/model``. No token is known, and none is asked for."""
    site, server = serve(SMALL, hub=True)
    monkeypatch.setattr(transfer, "POLICY", QUICK)
    monkeypatch.setattr(constants, "ENDPOINT", site.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", site.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield site
    server.shutdown()
    server.server_close()


def test_a_model_of_a_hub_is_converted_by_the_command_with_the_hubs_own_settings(
    hub: Site, tmp_path: Path, pack_of: PackOf
) -> None:
    """HF_ENDPOINT and HF_TOKEN; the token is for the hub, and not for where it leads to."""
    hub.token = "secret-token"
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
    command = [sys.executable, "-m", "flashpack", "convert", f"{MODEL}@refs/pr/1"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "model.flashpack") == contents(pack_of("qwen3_moe"))
    shards = [r for r in hub.requests if r.path.startswith("/cdn/")]
    assert shards
    assert not [r for r in shards if "authorization" in r.headers]
    assert all("secret" not in text for text in (done.stdout, done.stderr))


def test_an_address_that_expires_is_asked_for_again(hub: Site, tmp_path: Path, pack_of: PackOf) -> None:
    hub.uses = 3
    flashpack.convert(MODEL, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(pack_of("qwen3_moe"))
    resolved = [r.name for r in hub.requests if "/resolve/" in r.path and r.name.endswith(".safetensors")]
    assert len(resolved) > len(set(resolved))


def test_the_commit_stays_when_the_branch_moves(hub: Site, tmp_path: Path, pack_of: PackOf) -> None:
    """A conversion that continues reads the commit that it began with; a new one the new commit."""
    out = tmp_path / "out"
    hub.fault = lambda handler, request, content: request.number > 10 and not handler.answer(400)
    with pytest.raises(SourceError, match="the server answers 400"):
        flashpack.convert(MODEL, out, workers=1)
    hub.fault = None
    start = json.loads((out / JOURNAL).read_bytes().split(b"\n")[0])
    assert start["origin"] == {"hub": "org/model", "revision": "main", "commit": COMMIT}
    assert {"size", "sha256", "header"} == set(start["source"]["model-00001-of-00007.safetensors"])
    hub.commit = LATER
    with pytest.raises(OutputError, match=rf"origin commit {COMMIT} -> {LATER}; origin revision main -> {LATER}"):
        flashpack.convert(f"{MODEL}@{LATER}", out)
    hub.requests.clear()
    flashpack.convert(MODEL, out)
    assert {r.path.split("/")[4] for r in hub.requests if "/resolve/" in r.path} == {COMMIT}
    assert contents(out) == contents(pack_of("qwen3_moe"))
    hub.requests.clear()
    flashpack.convert(MODEL, out, overwrite=True)
    assert {r.path.split("/")[4] for r in hub.requests if "/resolve/" in r.path} == {LATER}


def private(hub: Site) -> None:
    hub.token = "another"


def gated(hub: Site) -> None:
    hub.gated = True


def unavailable(hub: Site) -> None:
    hub.fault = lambda handler, request, content: not handler.answer(503)


def offline(hub: Site) -> None:
    constants.HF_HUB_OFFLINE = True


def nothing(hub: Site) -> None:
    pass


def other_bytes(name: str) -> Callable[[Site], None]:
    def change(hub: Site) -> None:
        def fault(handler: Handler, request: Request, content: bytes) -> bool:
            if request.name != name:
                return False
            handler.part(request, content[:-1] + bytes([content[-1] ^ 1]))
            return True

        hub.fault = fault

    return change


def other_file(hub: Site) -> None:
    """The hub leads to another file than it lists."""
    hub.linked = "0" * 64


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        (
            "hf://org/missing",
            nothing,
            "hf://org/missing: the hub has no such model, or it is private; check the name, or",
        ),
        (MODEL, private, r"hf://org/model: the hub has no such model, or it is private; .*hf auth login"),
        (MODEL, gated, r"hf://org/model: gated: accept the model's terms at http://\S+/org/model, and log in"),
        (MODEL, offline, r"hf://org/model: offline mode is on \(HF_HUB_OFFLINE\)"),
        (
            MODEL,
            unavailable,
            r"asking the hub: the hub answers 503 \(4 failures in a row\); run the same command again",
        ),
        (MODEL, other_bytes("config.json"), r"config\.json: damaged on the way: git-sha1 [0-9a-f]{40}, the hub says"),
        (MODEL, other_file, r"safetensors: changed during the conversion: hash \w+ -> 0000"),
        (f"{MODEL}@lost", nothing, "hf://org/model: the model has no revision lost"),
        ("hf://org/model/folder", nothing, "not hf://organisation/model"),
        ("hf://org/../x", nothing, "not hf://organisation/model"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(
    hub: Site,
    tmp_path: Path,
    source: str,
    change: Callable[[Site], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(hub)
    with pytest.raises(SourceError, match=message) as caught:
        flashpack.convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_pack_is_proven_against_a_hub(hub: Site, pack_of: PackOf) -> None:
    from flashpack.converter.against import against

    pack = pack_of("qwen3_moe")
    assert against(pack, MODEL) == []
    assert verify(pack) == []
