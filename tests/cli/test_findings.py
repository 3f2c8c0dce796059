"""Mistakes that were found by using the commands."""

from __future__ import annotations

from tests.cli.test_cli import in_process as flashpack
from tests.conftest import PackOf


def test_plan_names_arguments_as_its_help_does(pack_of: PackOf) -> None:
    pack = pack_of("trained")
    done = flashpack("plan", pack, "elsewhere")
    assert (done.returncode, done.stderr) == (2, f"flashpack: {pack} is a pack: OUT is for checkpoints\n")
    done = flashpack("plan", pack, "--group-size", "32")
    assert (done.returncode, done.stderr) == (2, f"flashpack: {pack} is a pack: --group-size is for checkpoints\n")
