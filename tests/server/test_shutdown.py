"""``flashpack serve`` as a process: it says where it is, and ends cleanly at a signal."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import threading

import pytest

from tests import commands
from tests.cli.test_cli import in_process
from tests.conftest import PackOf


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_its_streams(pack_of: PackOf, number: signal.Signals) -> None:
    command = [commands.flashpack(), "serve", str(pack_of("trained"))]
    command += ["--port", "0", "--memory", "smallest"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        killer = threading.Timer(300, process.kill)  # a server that hangs fails the test, and does not hold it
        killer.start()
        assert process.stderr is not None
        said = ""
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        body = b'{"prompt": "The", "max_tokens": 4000, "temperature": 1, "min_p": 0, "stream": true}'
        with socket.create_connection(("127.0.0.1", int(found[1])), timeout=60) as link:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            link.sendall(head.encode() + body)
            first = link.recv(100)
            process.send_signal(number)
            rest = b"".join(iter(lambda: link.recv(65536), b""))
        _, errors = process.communicate()
        killer.cancel()
    assert first.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" in rest
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_a_port_in_use_is_said_before_the_model_is_loaded(pack_of: PackOf) -> None:
    pack = str(pack_of("trained"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        # With so little memory no model can be loaded.
        options = ["serve", pack, "--memory", "1MB", "--port", str(taken.getsockname()[1])]
        command = [commands.flashpack(), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--port 0" in done.stderr
    assert done.stderr.count("\n") == 1


def test_memory_for_read_texts_that_is_not_there_is_named(pack_of: PackOf) -> None:
    done = in_process("serve", pack_of("trained"), "--port", "0", "--prefix-memory", "900TB")
    assert done.returncode == 7
    assert done.stderr.endswith("; or lower --prefix-memory\n")
    assert done.stderr.count("\n") == 1
    assert "prefix" not in in_process("serve", pack_of("trained"), "--port", "0", "--memory", "1MB").stderr
