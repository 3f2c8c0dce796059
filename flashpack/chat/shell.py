"""A tool that runs commands of a model, each of them only after a person has said yes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

from flashpack.chat.tools import Declined

SECONDS = 60.0
"""A command that takes longer is ended."""

OUTPUT = 16 * 1024
"""Bytes of its output that the model gets to see: the first ones."""


def shell_tool(allowed: Callable[[str], bool], seconds: float = SECONDS) -> Callable[..., Any]:
    """The tool ``run_shell``. ``allowed`` shows a person the command and says whether to run it."""

    def run_shell(command: str) -> dict[str, Any]:
        """Run a command of the shell and return its output.

        Args:
            command: The command.
        """
        if not isinstance(command, str) or "\0" in command:
            return {"error": "the command is no text"}
        command = command.encode("utf-8", "replace").decode()
        if not allowed(command):
            raise Declined("the user did not allow this command")
        return run_command(command, seconds)

    return run_shell


def run_command(command: str, seconds: float = SECONDS) -> dict[str, Any]:
    """Run it without input and without a terminal; nothing it has started in its group lives on.

    Returns exit_code, output (both streams, at most ``OUTPUT`` bytes), and truncated or error where these apply.
    """
    child = subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert child.stdout is not None
    kept, total, late = b"", 0, False
    pipe = child.stdout.fileno()
    end = time.monotonic() + seconds
    try:
        while True:
            ended = child.poll() is not None  # asked before: what it wrote last is read then
            ready = select.select([pipe], [], [], 0 if ended else 0.05)[0]
            piece = os.read(pipe, 65536) if ready else b""
            total += len(piece)
            kept += piece[: OUTPUT - len(kept)]
            if ended and not piece:
                break
            if ready and not piece:  # closed its output
                time.sleep(0.02)
            if time.monotonic() > end:
                late = not ended
                break
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it has ended
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    result: dict[str, Any] = {"exit_code": child.returncode, "output": kept.decode(errors="replace")}
    if total > len(kept):
        result["truncated"] = f"{total - len(kept)} more bytes"
    if late:
        result["error"] = f"ended after {seconds:g} s"
    return result
