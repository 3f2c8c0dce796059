"""A page's commands, one after the other in one shell, and what became of each."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.docs.pages import Block, Command
from tests.docs.place import Shelf

LIMIT = 300
"""Seconds for all commands of a page."""

_SERVES = re.compile(r"(\w+=\S+ +)*flashpack serve\b")


@dataclass(frozen=True)
class Outcome:
    """What a command wrote, and how it ended; ``code`` is None if it was not reached."""

    command: Command
    code: int | None
    stdout: str
    stderr: str

    def complaint(self) -> str:
        """What the page says otherwise; empty if nothing."""
        about = f"{self.command.where}: {self.command.text}\n  "
        written = f"\n{self.stdout[-1000:]}{self.stderr[-1000:]}"
        if self.code is None:
            return f"{about}was not reached"
        if self.code != self.command.exit_code:
            return f"{about}ends with {self.code}, not {self.command.exit_code}{written}"
        lines = iter([*self.stdout.splitlines(), *self.stderr.splitlines()])
        for shown in filter(None, self.command.shown):
            pattern = ".*".join(re.escape(part) for part in shown.rstrip().split("..."))
            if not any(re.fullmatch(pattern, line.rstrip()) for line in lines):
                return f"{about}writes no such line, or not in this order: {shown}{written}"
        return ""


def run(blocks: list[Block], shelf: Shelf, place: Path) -> list[Outcome]:
    """Run ``blocks`` of a page in the empty folder ``place``."""
    text = "\n".join(block.text for block in blocks)
    shelf.furnish(place, text)
    done = place / "done"
    done.mkdir()
    port = _free_port()
    replaced = {"8080": port} | ({"IDENTITY": shelf.identity} if "IDENTITY" in text else {})
    commands: list[Command] = []
    script = ["set -uo pipefail", f"exec 9>{done}/codes", "serving="]
    for number, block in enumerate(blocks):
        if block.language == "python":
            program = place / f"block-{number}.py"
            program.write_text(_with(replaced, block.text))
            found = [Command(f"python {program.name}", block.where(), 0)]
        else:
            found = block.commands()
        for command in found:
            files = f">{done}/out{len(commands)} 2>{done}/err{len(commands)} </dev/null"
            script += _script(_with(replaced, command.text), len(commands), files, port)
            commands.append(command)
    script.append(_END)
    with subprocess.Popen(
        ["bash", "-c", "\n".join(script)], cwd=place, env=shelf.environment(place / "home"), start_new_session=True
    ) as shell:
        try:
            shell.wait(LIMIT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    codes = {int(n): int(code) for n, code in map(str.split, (done / "codes").read_text().splitlines())}
    outputs = [[_read(done / f"{stream}{n}") for stream in ("out", "err")] for n in range(len(commands))]
    return [Outcome(c, codes.get(n), *outputs[n]) for n, c in enumerate(commands)]


_END = 'if [ -n "$serving" ]; then kill "$serving"; wait "$serving"; echo "$served $?" >&9; serving=; fi'
"""A server's exit code is that of its end."""


def _script(text: str, number: int, files: str, port: str) -> list[str]:
    """Lines of the shell that run a command and note its exit code. A server stays, and what follows talks to it."""
    if not _SERVES.match(text):
        return ["{", text, f"}} {files}", f'echo "{number} $?" >&9']
    own = "" if "--port" in text else f" --port {port}"
    alive = f"until (: < /dev/tcp/127.0.0.1/{port}) || ! kill -0 $serving; do sleep 0.1; done"
    return [_END, f"{text.split(' #')[0]}{own} {files} &", f"serving=$! served={number}", f"{{ {alive}; }} 2>/dev/null"]


def _with(replaced: dict[str, str], text: str) -> str:
    for word, by in replaced.items():
        text = re.sub(rf"\b{word}\b", by, text)
    return text


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""
