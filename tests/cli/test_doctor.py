"""doctor as a user runs it: exit codes, JSON, widths, colors."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashpack.cli.doctor import lines
from flashpack.doctor.remark import Remark
from tests.cli.test_cli import in_process as flashpack
from tests.conftest import PackOf

SOME = [
    Remark("ok", "pack", "format", "fine"),
    Remark("note", "machine", "load", "other programs are at work " * 4, "look again when the machine is at rest"),
    Remark("problem", "machine", "memory", "not enough \x1b[2J of it", "close other programs"),
]


def test_a_whole_pack_ends_with_0_and_a_damaged_one_with_1(
    pack_of: PackOf, pack_copy: Callable[..., Path], tmp_path: Path
) -> None:
    done = flashpack("doctor", pack_of("trained"))
    assert done.returncode == 0, done.stdout
    assert done.stderr == ""
    for title in ("This machine", "Kernels", "Disk", "Pack"):
        assert f"{title}\n" in done.stdout
    assert "a bound" in done.stdout
    assert "\x1b" not in done.stdout
    damaged = pack_copy("trained")
    (damaged / "config.json").unlink()
    done = flashpack("doctor", damaged)
    assert done.returncode == 1
    assert "problem structure" in done.stdout
    assert "-> flashpack repair" in done.stdout
    assert "1 problem" in done.stdout.splitlines()[-1]
    for odd in (tmp_path, tmp_path / "missing", damaged / "tokenizer.json"):
        assert flashpack("doctor", odd).returncode == 1


def test_json_has_every_finding_with_its_next_step(pack_of: PackOf) -> None:
    done = flashpack("doctor", pack_of("trained"), "--json")
    data = json.loads(done.stdout)
    assert set(data) == {"flashpack", "counts", "findings"}
    assert done.stderr == ""
    keys = {"level", "area", "name", "text", "todo", "data"}
    assert all(set(f) == keys and (f["level"] == "ok") == (not f["todo"]) for f in data["findings"])
    assert data["counts"]["problem"] == 0
    assert sum(data["counts"].values()) == len(data["findings"])
    by_name = {f["name"]: f["data"] for f in data["findings"]}
    assert by_name["memory"]["smallest"]["total"] > 0
    assert by_name["space"]["free"] > 0
    assert by_name["reading"]["seconds_per_token"] > 0
    assert {f["area"] for f in data["findings"]} == {"machine", "kernels", "disk", "pack"}


def test_without_a_pack_nothing_is_read_and_it_says_how_to_go_on(tmp_path: Path) -> None:
    done = flashpack("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "--disk FOLDER" in done.stderr
    assert "MiB" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [36, 50, 80, 110])
def test_lines_fit_the_terminal_and_nothing_is_lost(width: int) -> None:
    shown = lines(SOME, width, False)
    assert max(map(len, shown)) <= width
    text = " ".join(" ".join(shown).split())
    assert "other programs are at work " * 4 + "-> look again when the machine is at rest" in text
    assert r"not enough \x1b[2J of it" in text
    assert shown[0] == "This machine"
    assert shown[-1] == "1 problem, 1 note"
    assert lines(SOME[:1], width, False)[-1] == "nothing to do"


def on_a_terminal(**environment: str) -> str:
    """What doctor writes on a terminal, stdout and stderr."""
    parent, child = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | environment
    command = [sys.executable, "-m", "flashpack", "doctor"]
    with subprocess.Popen(command, stdout=child, stderr=child, env=env) as process:
        os.close(child)
        pieces = []
        while True:
            try:
                piece = os.read(parent, 65536)
            except OSError:  # Linux's way to say that there is nobody left
                break
            if not piece:
                break
            pieces.append(piece)
        assert process.wait() == 0
    os.close(parent)
    return b"".join(pieces).decode()


def test_colors_are_for_terminals_that_want_them() -> None:
    text = on_a_terminal()
    assert "\x1b[32mok" in text
    assert "looking at the memory ..." in text
    assert "\x1b[32m" not in on_a_terminal(NO_COLOR="1")
