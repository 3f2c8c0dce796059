"""``flashpack`` and ``python`` that start at once: forks of a process that has imported everything.

Tests have dozens of commands in processes of their own, and each would spend seconds on importing torch and
transformers. Where processes do not survive a fork (macOS), and for all other Python programs, they are started as
usual.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
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
if {name!r} == "python" and not (len(sys.argv) > 1 and sys.argv[1].startswith(("block-", "-c"))):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
channel = socket.socket(socket.AF_UNIX)
channel.connect({address!r})
request = json.dumps([[{name!r}, *sys.argv[1:]], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(channel, [len(request).to_bytes(4, "big")], [0, 1, 2])
channel.sendall(request)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: channel.sendall(bytes([number])))
code = int.from_bytes(channel.recv(2), "big", signed=True)
if code < 0:  # it was ended by a signal
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
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
    command = [sys.executable, "-m", "tests.commands", address]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield programs
        finally:
            process.stdin.close()


@functools.cache
def _programs() -> Path:
    """Those for the tests of this process."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    return stack.enter_context(prepared(Path(folder), dict(os.environ)))


def flashpack() -> str:
    """The command."""
    return str(_programs() / "flashpack")


def python() -> str:
    """Python, in which flashpack, torch and transformers are imported if it is called with ``-c``."""
    return str(_programs() / "python")


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
        number = channel.recv(1)
        if not number:  # whoever asked has gone
            os.kill(child, signal.SIGKILL)
            break
        os.kill(child, number[0])
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(OSError):
        channel.sendall(code.to_bytes(2, "big", signed=True))
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
            sys.path[0] = folder
            if sys.argv[0] == "-c":
                code = sys.argv.pop(1)
                main = sys.modules["__main__"] = types.ModuleType("__main__")
                exec(compile(code, "<string>", "exec"), main.__dict__)
                code = 0
            else:
                import runpy

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
