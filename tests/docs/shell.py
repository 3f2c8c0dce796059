"""A shell in which ``flashpack`` and ``python`` start at once: forks of a process that has imported everything.

Pages have dozens of commands, and each would spend seconds on importing torch and transformers. Where processes do not
survive a fork (macOS), and for all other Python programs, they are started as usual.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

FORKS = sys.platform == "linux"

_IMPORTED = (
    "flashpack.chat",
    "flashpack.cli",
    "flashpack.converter",
    "flashpack.doctor",
    "flashpack.runtime.lean",
    "flashpack.runtime.session",
    "flashpack.server.app",
    "transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
)

_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
if {name!r} == "python" and not (len(sys.argv) > 1 and sys.argv[1].startswith("block-")):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
channel = socket.socket(socket.AF_UNIX)
channel.connect({address!r})
request = json.dumps([[{name!r}, *sys.argv[1:]], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(channel, [len(request).to_bytes(4, "big")], [0, 1, 2])
channel.sendall(request)
signal.signal(signal.SIGTERM, lambda *_: channel.sendall(b"t"))
sys.exit(channel.recv(1)[0])
"""
_PLAIN = """#!/bin/sh
exec {python} {module} "$@"
"""


@contextlib.contextmanager
def prepared(folder: Path, environment: dict[str, str]) -> Iterator[Path]:
    """A folder for PATH with the two programs, as long as the process behind them lives. Libraries read ``environment``
    when they are imported: it must be that of the commands."""
    programs = folder / "bin"
    programs.mkdir()
    address = str(folder / "s")
    for name, module in (("flashpack", "-m flashpack"), ("python", "")):
        text = (_CLIENT if FORKS else _PLAIN).format(python=sys.executable, name=name, address=address, module=module)
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    if not FORKS:
        yield programs
        return
    command = [sys.executable, "-m", "tests.docs.shell", address]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield programs
        finally:
            process.stdin.close()


def _serve(address: str) -> None:
    """Until standard input ends, run what is asked for."""
    for name in _IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        os.write(1, b"ready\n")
        while 0 not in select.select([listening.fileno(), 0], [], [])[0]:
            channel, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listening.close()
                _attend(channel)
            channel.close()


def _attend(channel: socket.socket) -> None:
    """Run one command, pass signals on to it, and answer with its exit code."""
    size, files, *_ = socket.recv_fds(channel, 4, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += channel.recv(1 << 16)
    child = os.fork()
    if child == 0:
        channel.close()
        _become(files, *json.loads(request))
    ended = os.pidfd_open(child)
    while ended not in select.select([ended, channel.fileno()], [], [])[0]:
        if not channel.recv(1):  # whoever asked has gone
            os.kill(child, signal.SIGKILL)
            break
        os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(OSError):
        channel.sendall(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)


def _become(files: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """The program ``arguments`` in this process."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments if arguments[0] == "flashpack" else arguments[1:]
    code: Any = 0
    try:
        if arguments[0] == "flashpack":
            from flashpack.cli import app

            app(prog_name="flashpack")
        else:
            import runpy

            sys.path[0] = folder
            runpy.run_path(arguments[1], run_name="__main__")
    except SystemExit as e:
        code = e.code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    _serve(sys.argv[1])
