"""The chat in a real terminal: what is typed, Ctrl-C, questions."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PackOf

PROMPT = "\x1b[?2004h"
"""The editor asks terminals to mark what is pasted, each time it begins."""
ASKED = "[y/N] "
PATIENCE = 240.0

# The chat needs the terminal as its own, or Ctrl-C does not reach it.
_OWN = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"


def readable(fd: int, milliseconds: int) -> bool:
    """Whether something came in time; ``select`` knows no descriptors above 1,023."""
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(milliseconds))


class Terminal:
    def __init__(self, pack: Path, folder: Path, *options: str, **environment: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        root = str(Path(__file__).resolve().parents[2])
        env = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_CACHE_HOME": str(folder / "cache")}
        env |= {"PYTHONPATH": root, **environment}
        chat = [sys.executable, "-m", "flashpack", "chat", str(pack), "--memory", "smallest", *options]
        self.child = subprocess.Popen(
            [sys.executable, "-c", _OWN, *chat], stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=env,
            start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.text = ""
        self._read = 0

    def until(self, *marks: str) -> str:
        """Wait for one of ``marks``, after the last one that was waited for; which it was."""
        end = time.monotonic() + PATIENCE
        while True:
            found = [(self.text.index(m, self._read), m) for m in marks if m in self.text[self._read :]]
            if found:
                place, mark = min(found)
                self._read = place + len(mark)
                return mark
            assert time.monotonic() < end, self.text[-2000:]
            if readable(self.master, 1000):
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    pytest.fail(f"it has ended: {self.text[-2000:]}")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def to_prompt(self) -> None:
        """On to the next prompt; all questions on the way are answered with no."""
        while self.until(PROMPT, ASKED) == ASKED:
            self.type("n\r")

    def end(self) -> int:
        while self.child.poll() is None:
            if readable(self.master, 100):
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace")
                except OSError:
                    break
        return self.child.wait(timeout=PATIENCE)


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    started: list[Terminal] = []
    yield started
    for one in started:
        one.child.kill()
        one.child.wait()
        os.close(one.master)


def test_a_command_is_run_after_a_yes_only(pack_of: PackOf, tmp_path: Path, terminals: list[Terminal]) -> None:
    (tmp_path / "train.log").write_text("step 1\nthe driver is old\n")
    t = Terminal(pack_of("trained"), tmp_path, "--shell", "--temperature", "0")
    terminals.append(t)
    t.until(PROMPT)
    t.type('Find "driver" in train.log.\r')
    t.until('run this command? grep -n "driver" train.log')
    t.until(ASKED)
    t.type("y\r")
    t.until("run_shell returns")
    t.to_prompt()
    t.type("/save yes.json\r")
    t.until("saved in")
    t.until(PROMPT)
    t.type("/reset\r")
    t.until(PROMPT)
    t.type('Find "driver" in train.log.\r')
    t.until(ASKED)
    t.type("\r")
    t.until("did not allow")
    t.to_prompt()
    t.type("/save no.json\r")
    t.until("saved in")
    t.until(PROMPT)
    t.type("/load yes.json\r")
    t.until("loaded 1 turn")
    t.until(PROMPT)
    t.type("\x04")
    assert t.end() == 0
    yes, no = (json.loads((tmp_path / f"{name}.json").read_text())["messages"][2] for name in ("yes", "no"))
    assert json.loads(yes["content"]) == {"exit_code": 0, "output": "2:the driver is old\n"}
    assert json.loads(no["content"]) == {"error": "the user did not allow this command"}


def test_ctrl_c_stops_the_answer_and_not_the_program(
    pack_of: PackOf, tmp_path: Path, terminals: list[Terminal]
) -> None:
    # So hot that it does not end by itself; of most seeds, one answer in a hundred would.
    hot = ("--temperature", "20", "--top-k", "0", "--top-p", "1", "--seed", "1")
    t = Terminal(pack_of("trained"), tmp_path, *hot, NO_COLOR="1")
    terminals.append(t)
    t.until(PROMPT)
    t.type("Tell me a story.\r")
    t.until("A\r\x1b[J")  # a block is drawn once more, for it has grown
    t.type("\x03")
    t.until("stopped; what was said stays")
    t.until(PROMPT)
    t.type("/save cut.json\r")
    t.until("saved in")
    t.until(PROMPT)
    t.type("half a line\x03")
    t.until("Ctrl-C once more")
    t.until(PROMPT)
    t.type("\x03")
    assert t.end() == 0
    assert "Traceback" not in t.text
    user, answer = json.loads((tmp_path / "cut.json").read_text())["messages"]
    assert user["content"] == "Tell me a story."
    assert answer["interrupted"] is True
    assert answer["content"]
    assert not re.search(r"\x1b\[[\d;]*3[0-7]m", t.text)


def test_a_dumb_terminal_gets_plain_text(pack_of: PackOf, tmp_path: Path, terminals: list[Terminal]) -> None:
    t = Terminal(pack_of("trained"), tmp_path, "--temperature", "0", TERM="dumb")
    terminals.append(t)
    t.until("> ")
    t.type("What is 922 plus 291?\r")
    t.until("</tool_call>")
    t.until("hits")
    t.until("> ")
    t.type("/exit\r")
    assert t.end() == 0
    assert "\x1b" not in t.text


def test_what_is_typed_before_a_question_does_not_answer_it() -> None:
    code = "from flashpack.cli.chat_screen import allowed; print(allowed('rm x'), allowed('ls'))"
    master, slave = pty.openpty()
    os.write(master, b"y\n")
    with subprocess.Popen([sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave) as child:
        os.close(slave)
        text = ""
        for answer in (b"n\n", b"yes\n"):
            while not text.endswith(ASKED):
                text += os.read(master, 1000).decode()
            os.write(master, answer)
            text = ""
        while not (said := re.search(r"(True|False) (True|False)", text)):
            text += os.read(master, 1000).decode()
        child.wait(timeout=PATIENCE)
    os.close(master)
    assert said.groups() == ("False", "True")
