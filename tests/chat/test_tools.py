"""Functions as tools, and the shell that asks."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from flashpack.chat.shell import OUTPUT, run_command, shell_tool
from flashpack.chat.tools import Declined, Tools, functions_of
from flashpack.errors import UsageError

FILE = '''
from os.path import join

LIMIT = 3

def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b

def fail(why: str) -> None:
    """Fail.

    Args:
        why: What to say.
    """
    raise LookupError(why)

def _hidden() -> None:
    pass
'''


def tools_of(folder: Path, text: str) -> Tools:
    path = folder / "mine.py"
    path.write_text(text)
    return Tools(functions_of(path))


def test_public_functions_are_tools(tmp_path: Path) -> None:
    tools = tools_of(tmp_path, FILE)
    assert tools.names == ["add", "fail"]
    function = tools.schemas[0]["function"]
    assert function["name"] == "add"
    assert function["parameters"]["properties"]["a"] == {"type": "integer", "description": "The first."}
    assert function["parameters"]["required"] == ["a"]


def test_all_says_which(tmp_path: Path) -> None:
    assert tools_of(tmp_path, FILE + "__all__ = ['add']").names == ["add"]
    with pytest.raises(UsageError, match="LIMIT of its __all__ is no function"):
        tools_of(tmp_path, FILE + "__all__ = ['LIMIT']")


def test_results_and_errors_are_json(tmp_path: Path) -> None:
    tools = tools_of(tmp_path, FILE)
    assert json.loads(tools.call("add", '{"a": 2}')) == 3
    assert json.loads(tools.call("fail", '{"why": "no é \\ud800"}')) == {"error": "LookupError: no é ?"}
    assert "there is no tool rm" in json.loads(tools.call("rm", "{}"))["error"]
    assert "no object" in json.loads(tools.call("add", "[1]"))["error"]
    assert "missing a required argument: 'a'" in json.loads(tools.call("add", '{"b": 2}'))["error"]
    assert "unexpected" in json.loads(tools.call("add", '{"a": 1, "c": 2}'))["error"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x = 1", "no public function"),
        ("1 / 0", "fails: ZeroDivisionError"),
        ("def", "fails: SyntaxError"),
        ("raise SystemExit", "fails: SystemExit"),
        ("def f(a: int):\n    pass", "the tool f needs type hints, and a docstring"),
        ('def f(a):\n    """Do.\n\n    Args:\n        a: This.\n    """', "the tool f needs type hints"),
    ],
)
def test_files_without_tools_are_refused(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(UsageError, match=fault) as e:
        tools_of(tmp_path, text)
    assert "\n" not in str(e.value)


def test_no_file_and_no_python(tmp_path: Path) -> None:
    for name in ("absent.py", "notes.txt"):
        with pytest.raises(UsageError, match="no Python file"):
            functions_of(tmp_path / name)


def test_names_are_used_once() -> None:
    shell = shell_tool(lambda command: True)
    with pytest.raises(UsageError, match="two tools called run_shell"):
        Tools([shell, shell])


def test_the_shell_runs_what_was_allowed_only(tmp_path: Path) -> None:
    asked: list[str] = []

    def never(command: str) -> bool:
        asked.append(command)
        return False

    mark = tmp_path / "mark"
    with pytest.raises(Declined, match="did not allow"):
        Tools([shell_tool(never)]).call("run_shell", json.dumps({"command": f"touch {mark}"}))
    assert asked == [f"touch {mark}"]
    assert not mark.exists()
    done = json.loads(
        Tools([shell_tool(lambda c: True)]).call("run_shell", '{"command": "echo a; echo b >&2; exit 3"}')
    )
    assert done == {"exit_code": 3, "output": "a\nb\n"}


@pytest.mark.parametrize("command", [3, ["ls"], "a\0b"])
def test_what_is_no_command_is_not_asked_for(command: Any) -> None:
    tool = Tools([shell_tool(lambda c: pytest.fail("asked"))])
    assert "no text" in json.loads(tool.call("run_shell", json.dumps({"command": command})))["error"]


def test_output_and_time_are_bounded() -> None:
    much = run_command("head -c 100000 /dev/zero | tr '\\0' x")
    assert much["output"] == "x" * OUTPUT
    assert much["truncated"] == f"{100_000 - OUTPUT} more bytes"
    late = run_command("echo begun; exec sleep 600", seconds=1)
    assert late["error"] == "ended after 1 s"
    assert late["output"] == "begun\n"
    assert late["exit_code"] < 0


def test_nothing_is_left_running(tmp_path: Path) -> None:
    done = run_command(f"sleep 600 & echo $! > {tmp_path}/pid; echo done")
    assert done == {"exit_code": 0, "output": "done\n"}
    pid = int((tmp_path / "pid").read_text())
    for _ in range(600):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").exists() and ") Z " in Path(f"/proc/{pid}/stat").read_text():
            return  # dead; nobody has asked for it yet
        time.sleep(0.1)
    pytest.fail("the command's child lives on")
