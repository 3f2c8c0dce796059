"""``flashpack calibrate``: what it prints, and that an error or Ctrl-C leaves nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashpack.cli import app
from flashpack.formats.calibration import Calibration
from tests import commands
from tests.conftest import ROOT, PackOf

DOCS = ROOT / "tests" / "data" / "docs.txt"


@pytest.fixture
def exact(pack_of: PackOf) -> Path:
    return pack_of("trained", "source", "source")


def test_our_text_and_json(exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["calibrate", str(exact), "--tokens", "512", "--json"])
    assert done.exit_code == 0, done.output
    assert done.stderr.count("\n") == 1
    assert "a small text of ours" in done.stderr
    data = json.loads(done.stdout)
    path = tmp_path / f"{exact.name}.calib"
    assert (data["file"], data["bytes"]) == (path.name, path.stat().st_size)
    opened = Calibration(path)
    assert (opened.digest, opened.tokens) == (data["digest"], 512)
    opened.close()


def test_a_rounded_pack_is_told(pack_of: PackOf, tmp_path: Path) -> None:
    pack, out = pack_of("trained", "q4", "q8"), tmp_path / "a.calib"
    done = CliRunner().invoke(app, ["calibrate", str(pack), "--text", str(DOCS), "--tokens", "512", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "note: this pack was rounded" in done.stderr
    assert f"--calib {out}" in done.stdout
    assert f"digest {Calibration(out).digest}" in done.stdout


def test_an_error_is_one_line_and_leaves_nothing(exact: Path, tmp_path: Path) -> None:
    options = ["--text", str(DOCS), "--out", str(tmp_path / "a.calib"), "--memory", "1MB"]
    done = CliRunner().invoke(app, ["calibrate", str(exact), *options])
    assert done.exit_code == 7
    assert done.stderr.startswith("flashpack: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(exact: Path, tmp_path: Path) -> None:
    command = [commands.flashpack(), "calibrate", exact, "--text", DOCS, "--out", tmp_path / "a.calib"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < until:
        time.sleep(0.02)
    assert [path.name for path in tmp_path.iterdir()] == ["a.calib.part"]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert list(tmp_path.iterdir()) == []
