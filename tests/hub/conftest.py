"""The hub that these tests talk to, and the commands."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from huggingface_hub import constants
from typer.testing import CliRunner

from flashpack.cli import _guarded
from flashpack.cli.card import card
from flashpack.cli.pull import pull
from flashpack.cli.push import push
from flashpack.converter import transfer
from tests.converter.test_streaming import QUICK
from tests.hub.stand_in import Hub, serve_hub

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub. No token is known, and none is asked for."""
    hub, server = serve_hub(tmp_path)
    monkeypatch.setattr(transfer, "POLICY", QUICK)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def command() -> Command:
    """``command("push", ...)``: a command with its output, in this process."""
    app = typer.Typer()
    for function in (card, push, pull):
        app.command()(_guarded(function))

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = list(map(str, arguments))
        done = CliRunner().invoke(app, words, prog_name="flashpack")
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)

    return run
