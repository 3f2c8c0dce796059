"""What the help and the shell's completion say."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from typer.main import get_command

from flashpack.cli import app
from tests.cli.test_cli import flashpack
from tests.conftest import ROOT
from tests.test_architecture import modules_after

COMMANDS: dict[str, object] = dict(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_ends_with_examples_whose_options_exist(command: str) -> None:
    text = flashpack(command, "--help").stdout
    before, _, examples = text.partition("Examples:\n")
    assert f"flashpack {command}" in examples
    for option in re.findall(r"--[a-z-]+", examples):
        assert option in before


def test_the_shell_completes_commands() -> None:
    environment = {"_FLASHPACK_COMPLETE": "complete_bash", "COMP_WORDS": "flashpack ch", "COMP_CWORD": "1"}
    code = "import sys; from flashpack.cli import main; sys.argv[0] = 'flashpack'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["chat"], done.stderr


def test_help_loads_little() -> None:
    assert not modules_after("import flashpack.cli") & {"torch", "transformers", "prompt_toolkit", "fastapi"}
