"""``flashpack pull``: the same bytes, proven; nothing under the pack's name before; on from where it stopped."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfFileSystem, constants

import flashpack
from flashpack.formats import Pack
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.manifest import canonical
from flashpack.hub import pull as module
from tests.conftest import ROOT, PackOf, contents
from tests.http_server import Handler, Request
from tests.hub.conftest import Command
from tests.hub.stand_in import Hub

LAYER = "experts/layer-0001.safetensors"


@pytest.fixture
def pack(pack_of: PackOf) -> Path:
    return pack_of("qwen3_moe")


@pytest.fixture
def there(hub: Hub, pack: Path) -> Hub:
    """The hub with the pack in ``org/model``, beside a card and a file that is nobody's."""
    hub.put("org/model", pack, **{"README.md": b"# a card", "evil.py": b"raise SystemExit"})
    return hub


def left(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.name.endswith(C.PARTIAL_SUFFIX)]


def test_what_comes_is_the_pack_and_nothing_else(
    there: Hub, command: Command, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    identity = Pack(pack).identity
    done = command("pull", "org/model", "--expect", identity)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert contents(tmp_path / "model.flashpack") == contents(pack)
    assert os.listdir(tmp_path) == ["model.flashpack"]
    assert re.fullmatch(
        rf"model\.flashpack: whole, \S+ [kM]B, commit [0-9a-f]{{40}}\n  identity {identity}\n", done.stdout
    )
    assert not [path for _, path in there.log if "README" in path or "evil" in path]
    again = command("pull", "hf://org/model@main")
    assert again.returncode == 6
    assert again.stderr == "flashpack: model.flashpack: is there already; remove it, or name another folder\n"
    other = command("pull", "org/model", tmp_path / "sub" / "other", "--json")
    assert json.loads(other.stdout)["identity"] == identity
    assert contents(tmp_path / "sub" / "other") == contents(pack)


def test_it_goes_on_in_the_middle_of_a_file(
    there: Hub, command: Command, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE", 10_000)
    layer = there.tree("org/model")[LAYER]

    def fault(handler: Handler, request: Request, content: bytes) -> bool:
        return content == layer and request.first >= 50_000 and not handler.answer(503)

    there.fault = fault
    out = tmp_path / "out"
    done = command("pull", "org/model", out)
    assert done.returncode == 3
    assert re.fullmatch(
        rf"flashpack: hf://org/model/{LAYER}: reading at byte 50000: the server answers 503 .*; run the same command "
        r"again to continue\n",
        done.stderr,
    )
    assert not out.exists()
    (staging,) = left(tmp_path)
    assert not (staging / C.MANIFEST).exists()  # not yet a pack
    came = {p.relative_to(staging).as_posix() for p in staging.rglob("*") if p.is_file()}
    assert f"{LAYER}.part" in came
    there.fault = None
    there.sent.clear()
    done = command("pull", "org/model", out)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(pack)
    assert left(tmp_path) == []
    name = hashlib.sha256(layer).hexdigest()
    assert sum(count for sent, _, count in there.sent if sent == name) == len(layer) - 50_000
    whole = {p for p in came if not p.endswith(".part")}
    assert not whole & {p for p, content in there.tree("org/model").items() for sent, _, count in there.sent
                        if sent == hashlib.sha256(content).hexdigest()}  # fmt: skip


def damage(hub: Hub, name: str, stored: bool) -> None:
    """A bit of a file is another: in the repository (``stored``), or on the way."""
    tree = dict(hub.tree("org/model"))
    content = bytearray(tree[name])
    content[-1] ^= 4
    if stored:
        tree[name] = bytes(content)
        hub.record("org/model", "main", tree)
        return

    def fault(handler: Handler, request: Request, found: bytes) -> bool:
        if found != tree[name]:
            return False
        handler.part(request, bytes(content), headers={})
        return True

    hub.fault = fault


@pytest.mark.parametrize("name", [LAYER, "config.json"])
def test_what_was_damaged_on_the_way_comes_anew(
    there: Hub, command: Command, pack: Path, tmp_path: Path, name: str
) -> None:
    damage(there, name, stored=False)
    done = command("pull", "org/model", tmp_path / "out")
    assert done.returncode == 5
    assert done.stderr == (
        f"flashpack: hf://org/model: {name}: damaged on the way; run the same command again, which fetches it anew\n"
    )
    assert not (tmp_path / "out").exists()
    there.fault = None
    there.log.clear()
    done = command("pull", "org/model", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(pack)
    asked = {path.split("/", 5)[5] for _, path in there.log if "/resolve/" in path}
    assert asked == {name, C.MANIFEST, C.MANIFEST_DIGEST}


@pytest.mark.parametrize("name", [LAYER, "config.json"])
def test_damage_in_the_repository_is_called_so(there: Hub, command: Command, tmp_path: Path, name: str) -> None:
    damage(there, name, stored=True)
    done = command("pull", "org/model", tmp_path / "out")
    assert done.returncode == 5
    assert f"hf://org/model: {name}: damaged in the repository itself" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def without(path: str) -> Callable[[Hub], None]:
    def change(hub: Hub) -> None:
        hub.record("org/model", "main", {p: c for p, c in hub.tree("org/model").items() if p != path})

    return change


def longer(hub: Hub) -> None:
    hub.record("org/model", "main", hub.tree("org/model") | {LAYER: hub.tree("org/model")[LAYER] + b"x"})


def hostile(hub: Hub) -> None:
    """A manifest that lists a file outside of the pack."""
    tree = dict(hub.tree("org/model"))
    data = json.loads(tree[C.MANIFEST])
    next(f for f in data["files"] if f["path"] == "config.json")["path"] = "../config.json"
    tree[C.MANIFEST] = canonical(data)
    tree[C.MANIFEST_DIGEST] = f"{hexdigest(tree[C.MANIFEST])}\n".encode()
    hub.record("org/model", "main", tree)


def other_digest(hub: Hub) -> None:
    hub.record("org/model", "main", hub.tree("org/model") | {C.MANIFEST_DIGEST: b"0" * 64 + b"\n"})


def private(hub: Hub) -> None:
    hub.token = "another"


def forbidden(hub: Hub) -> None:
    hub.failing = ("GET", "/config.json", 403)


def offline(hub: Hub) -> None:
    constants.HF_HUB_OFFLINE = True


def nothing(hub: Hub) -> None:
    pass


@pytest.mark.parametrize(
    ("source", "change", "code", "message"),
    [
        ("org/absent", nothing, 3, "hf://org/absent: the hub has no such model, or it is private"),
        ("org/model@lost", nothing, 3, "hf://org/model: the model has no revision lost"),
        ("org/model", private, 3, "hf://org/model: the hub has no such model, or it is private; .*hf auth login"),
        ("org/model", offline, 3, r"offline mode is on \(HF_HUB_OFFLINE\)"),
        ("org/model", forbidden, 3, r"config\.json: access denied \(403\); accept the model's terms"),
        ("org/../x", nothing, 3, "not hf://organisation/model"),
        ("org/model", without(C.MANIFEST), 3, r"not a pack: no flashpack\.json; .*flashpack convert hf://org/model"),
        ("org/model", without(LAYER), 3, f"hf://org/model/{LAYER}: not found"),
        ("org/model", longer, 5, rf"{LAYER}: has \d+ bytes there, not \d+"),
        ("org/model", other_digest, 5, r"flashpack\.json: its digest is not the one in flashpack\.json\.b3"),
        ("org/model", hostile, 4, "path"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(
    there: Hub, command: Command, tmp_path: Path, source: str, change: Callable[[Hub], None], code: int, message: str
) -> None:
    change(there)
    done = command("pull", source, tmp_path / "out")
    assert done.returncode == code, done.stderr
    assert re.search(message, done.stderr)
    assert done.stderr.startswith("flashpack: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()
    if change is not forbidden:
        assert left(tmp_path) == []


def test_another_pack_than_expected_is_refused_before_its_data_comes(
    there: Hub, command: Command, tmp_path: Path
) -> None:
    done = command("pull", "org/model", tmp_path / "out", "--expect", "0" * 64)
    assert done.returncode == 5
    assert re.search("its identity is [0-9a-f]{64}, not the expected 0000", done.stderr)
    assert not [path for _, path in there.log if "config.json" in path]


def test_a_disk_that_is_too_small_is_said_before(
    there: Hub, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        importlib.import_module("flashpack.converter.convert"), "disk_space", lambda *a, **k: (10**9, 10**6)
    )
    done = command("pull", "org/model", tmp_path / "out")
    assert done.returncode == 6
    assert "1.00 GB needed, 0.00 GB free" in done.stderr
    assert not [path for _, path in there.log if "config.json" in path]


def test_an_interruption_leaves_what_came_and_is_quick(
    there: Hub, command: Command, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a token, which goes to the hub, not to where it leads, and is not said."""
    release = threading.Event()

    def fault(handler: Handler, request: Request, content: bytes) -> bool:
        if len(content) > 100_000:
            release.wait(60)
        return False

    there.token, there.fault = "hf_secret", fault
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": there.url, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
    code = "from flashpack.cli import app, _guarded; from flashpack.cli.pull import pull\n"
    code += "app.command()(_guarded(pull)); app()"
    line = [sys.executable, "-c", code, "pull", "org/model", str(tmp_path / "out")]
    process = subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not [p for p in there.log if p[1].startswith("/store/")][3:] and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=25)  # the connections would wait for a minute
    release.set()
    assert process.returncode == 130, err
    assert out == ""
    assert "interrupted" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert len(left(tmp_path)) == 1
    assert "hf_secret" not in err
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert command("pull", "org/model", tmp_path / "out").returncode == 0
    assert contents(tmp_path / "out") == contents(pack)


@pytest.mark.parametrize("source", ["hf://org/model", "{url}/org/model/resolve/main"])
def test_a_pack_is_mended_from_the_hub(there: Hub, pack_copy: Callable[..., Path], pack: Path, source: str) -> None:
    """Only what is damaged comes."""
    HfFileSystem.clear_instance_cache()  # it remembers another test's hub
    damaged = pack_copy("qwen3_moe")
    data = bytearray((damaged / LAYER).read_bytes())
    data[16384 * 3] ^= 4
    (damaged / LAYER).write_bytes(data)
    done = flashpack.repair(damaged, source.format(url=there.url))
    assert (done.files, done.pieces, done.findings) == ([LAYER], 1, [])
    assert contents(damaged) == contents(pack)
    layer = hashlib.sha256(there.tree("org/model")[LAYER]).hexdigest()
    assert sum(count for name, _, count in there.sent if name == layer) < len(data) / 4
