"""``flashpack push``: what arrives is the pack, with a card, with one commit; nothing twice, nothing of others."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants, get_token

from flashpack.errors import OutputError
from flashpack.formats import Pack
from flashpack.hub import card as cards
from flashpack.hub.answers import hub_errors
from flashpack.runtime.forecast import smallest_of
from tests.conftest import PackOf, contents
from tests.hub.conftest import Command
from tests.hub.stand_in import TOKEN, Hub

OTHERS = {".gitattributes", "README.md"}


@pytest.fixture
def pack(pack_of: PackOf) -> Path:
    return pack_of("qwen3_moe")


@pytest.fixture(autouse=True)
def few_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries for long; what it does then is its own affair."""
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)


_smallest = functools.cache(lambda folder: smallest_of(Pack(folder)))


@pytest.fixture(autouse=True)
def known_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that a pack needs does not change from test to test."""
    monkeypatch.setattr(cards, "smallest_of", lambda pack: _smallest(pack.folder))


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def stored(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    return {path: content for path, content in hub.tree("org/model", branch).items() if path not in OTHERS}


def commits(hub: Hub) -> int:
    return len([1 for method, path in hub.log if "/commit/" in path])


def uploads(hub: Hub) -> int:
    return len([1 for method, path in hub.log if method == "PUT"])


def test_a_pack_is_there_with_one_commit_and_comes_back_the_same(
    hub: Hub, command: Command, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a token, which the store of large files does not get (it answers 400 to one)."""
    hub.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert get_token() == TOKEN
    done = command("push", pack, "hf://org/model", "--private", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert stored(hub) == files(pack)
    assert told["repo"] == "org/model"
    assert told["url"] == f"{hub.url}/org/model"
    assert told["commit"] == hub.refs["org/model", "main"]
    assert told["identity"] == Pack(pack).identity
    assert told["files"] == len(files(pack))
    assert told["bytes"] == sum(map(len, files(pack).values()))
    assert hub.private == {"org/model"}
    assert commits(hub) == 1
    card = hub.tree("org/model")["README.md"].decode()
    assert f"flashpack pull org/model --expect {told['identity']}" in card
    assert command("pull", "org/model", tmp_path / "back").returncode == 0
    assert contents(tmp_path / "back") == contents(pack)
    assert TOKEN not in done.stdout + card


def test_the_same_again_sends_nothing_and_keeps_the_card(hub: Hub, command: Command, pack: Path) -> None:
    assert command("push", pack, "org/model").returncode == 0
    edited = hub.record("org/model", "main", hub.tree("org/model") | {"README.md": b"# by hand\n", "plot.png": b"x"})
    hub.log.clear()
    done = command("push", pack, "org/model")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert hub.refs["org/model", "main"] == edited
    assert uploads(hub) == commits(hub) == 0


def test_a_card_of_ones_own(hub: Hub, command: Command, pack: Path, tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text("---\nlicense: mit\n---\n# Mine\n")
    assert command("push", pack, "org/model").returncode == 0
    assert command("push", pack, "org/model", "--card", card).returncode == 0
    assert hub.tree("org/model")["README.md"] == card.read_bytes()
    card.write_text("---\n- license\n---\n# A list\n")
    hub.log.clear()
    done = command("push", pack, "org/model", "--card", card)
    assert done.returncode == 2
    assert done.stderr.startswith("flashpack: the card: ")
    assert not hub.log


def test_an_upload_goes_on_where_it_stopped(hub: Hub, command: Command, pack: Path) -> None:
    hub.uploads = 3
    done = command("push", pack, "org/model")
    assert done.returncode == 6
    assert done.stderr.startswith("flashpack: hf://org/model: the hub does not allow it (403); log in")
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr
    assert set(hub.tree("org/model")) == {".gitattributes"}  # nothing half
    assert uploads(hub) == 4  # one by one
    hub.uploads = 100
    hub.log.clear()
    done = command("push", pack, "org/model")
    assert done.returncode == 0, done.stderr
    assert stored(hub) == files(pack)
    assert uploads(hub) == len(hub.stored) - 3


def test_another_pack_is_replaced_only_if_asked(hub: Hub, command: Command, pack: Path, pack_of: PackOf) -> None:
    other = pack_of("trained")
    assert command("push", other, "org/model").returncode == 0
    before = hub.record("org/model", "main", hub.tree("org/model") | {"plot.png": b"x"})
    hub.log.clear()
    done = command("push", pack, "org/model")
    assert done.returncode == 6
    assert f"holds another pack, {Pack(other).identity}; --overwrite replaces it" in done.stderr
    assert hub.refs["org/model", "main"] == before
    assert uploads(hub) == 0
    done = command("push", pack, "org/model", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert stored(hub) == files(pack) | {"plot.png": b"x"}
    assert Pack(pack).identity in hub.tree("org/model")["README.md"].decode()


def test_a_branch(hub: Hub, command: Command, pack: Path) -> None:
    done = command("push", pack, "org/model", "--revision", "q4")
    assert done.returncode == 0, done.stderr
    assert stored(hub, "q4") == files(pack)
    assert set(hub.tree("org/model")) == {".gitattributes"}
    assert f"{hub.url}/org/model/tree/q4: " in done.stdout


def test_a_damaged_pack_is_not_sent(hub: Hub, command: Command, pack_copy: Callable[..., Path]) -> None:
    pack = pack_copy("qwen3_moe")
    path = pack / "experts" / "layer-0001.safetensors"
    data = bytearray(path.read_bytes())
    data[16384 * 3] ^= 4
    path.write_bytes(data)
    done = command("push", pack, "org/model")
    assert done.returncode == 1
    assert "[record-digest] experts/layer-0001.safetensors, layer 1" in done.stderr
    assert "1 finding, nothing was sent" in done.stderr
    assert not hub.log


def test_what_arrives_otherwise_is_noticed(
    hub: Hub, command: Command, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = hub.record

    def damaged(repo: str, branch: str, tree: dict[str, bytes]) -> str:
        return record(repo, branch, tree | ({"config.json": b"{}"} if "config.json" in tree else {}))

    monkeypatch.setattr(hub, "record", damaged)
    done = command("push", pack, "org/model")
    assert done.returncode == 5
    assert "/config.json: the hub has other bytes than were sent" in done.stderr


def test_a_dry_run_asks_nobody(hub: Hub, command: Command, pack: Path) -> None:
    done = command("push", pack, "org/model", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert f"whole; {len(files(pack))} files, " in done.stdout
    assert " would go to org/model\n" in done.stdout
    told = json.loads(command("push", pack, "org/model", "--dry-run", "--json").stdout)
    assert set(told["files"]) == set(files(pack))
    assert told["card"].startswith("---\n")
    assert not hub.log


def private(hub: Hub) -> None:
    hub.token = "another"


def no_rights(hub: Hub) -> None:
    hub.failing = ("POST", "/api/repos/create", 403)


def overloaded(hub: Hub) -> None:
    hub.failing = ("POST", "/commit/", 504)


def refused(hub: Hub) -> None:
    hub.failing = ("POST", "/commit/", 413)


def offline(hub: Hub) -> None:
    constants.HF_HUB_OFFLINE = True


@pytest.mark.parametrize(
    ("repo", "change", "code", "message"),
    [
        ("org/model", private, 6, "hf://org/model: the hub does not allow it (401); log in ('hf auth login', or"),
        ("org/model", no_rights, 6, "hf://org/model: the hub does not allow it (403)"),
        ("org/model", overloaded, 6, "hf://org/model: the hub answers 504; run the same command again to continue"),
        ("org/model", refused, 6, "hf://org/model: the hub answers 413\n"),
        ("org/model", offline, 6, "offline mode is on (HF_HUB_OFFLINE)"),
        ("model", None, 2, "model: not the name of a repository, ORG/NAME"),
        ("org/model@main", None, 2, "--revision names a branch"),
    ],
)
def test_a_refusal_is_one_line(
    hub: Hub, command: Command, pack: Path, repo: str, change: Callable[[Hub], None] | None, code: int, message: str
) -> None:
    if change:
        change(hub)
    done = command("push", pack, repo)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("flashpack: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_errors_of_libraries_are_told_without_their_texts() -> None:
    def fail() -> None:
        raise RuntimeError("PUT https://store/x?signature=secret") from ValueError("https://y?token=secret")

    line = r"^hf://x: the transfer failed \(RuntimeError, ValueError\); run the same command again to continue$"
    with pytest.raises(OutputError, match=line), hub_errors("hf://x", OutputError):
        fail()
