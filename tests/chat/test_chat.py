"""Turns and commands with the bundled model, in this process and through a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from flashpack.chat.commands import HELP, command
from flashpack.chat.conversation import INTERRUPTED, Conversation, load
from flashpack.chat.editor import editor, history
from flashpack.chat.shell import shell_tool
from flashpack.chat.tools import Tools
from flashpack.chat.turns import ROUNDS, Chat
from flashpack.cli.chat import _Interrupt, _talk
from flashpack.cli.chat_screen import Screen
from flashpack.errors import ContextError, UsageError
from flashpack.runtime.generate import Result
from flashpack.runtime.responses import Event
from flashpack.runtime.sampling import Sampling
from flashpack.runtime.session import Session
from tests.cli.test_cli import flashpack
from tests.conftest import PackOf
from tests.strangers import rewrite


class Heard:
    """A view that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.results: list[Result] = []
        self.returns: list[tuple[str, str]] = []
        self.remarks: list[str] = []

    def event(self, event: Event) -> None:
        self.events.append(event)

    def answered(self, result: Result) -> None:
        self.results.append(result)

    def returned(self, name: str, result: str) -> None:
        self.returns.append((name, result))

    def remark(self, text: str) -> None:
        self.remarks.append(text)


@pytest.fixture(scope="module")
def session(pack_of: PackOf) -> Session:
    return Session(pack_of("trained"), context=1024)


MakeChat = Callable[..., tuple[Chat, Heard]]


@pytest.fixture
def chat_of(session: Session) -> MakeChat:
    def make(tools: list[Any] | None = None, **changes: Any) -> tuple[Chat, Heard]:
        heard = Heard()
        options: dict[str, Any] = {
            "sampling": Sampling(), "seed": 0, "thinking": None, "max_tokens": None,
            "cancelled": lambda: False, "generating": lambda on: None,
        }  # fmt: skip
        return Chat(session, Conversation(), Tools(tools or []), heard, **(options | changes)), heard

    return make


def calculator(expression: str) -> str:
    """Calculate.

    Args:
        expression: What.
    """
    raise ZeroDivisionError(expression)


def test_a_turn_costs_its_own_tokens_only(chat_of: MakeChat, session: Session) -> None:
    chat, heard = chat_of(max_tokens=20)
    question = "What is the capital of France?"
    own = len(session.tokenizer(question)["input_ids"])
    for _ in range(15):
        chat.turn(question)
    fresh = [r.prompt_tokens - r.reused_tokens for r in heard.results]
    assert heard.results[-1].prompt_tokens > 10 * (own + 10)
    # The last answer may have to be read again, if it is written in other tokens than it came in.
    assert all(tokens <= own + 20 + 16 for tokens in fresh[1:]), fresh


def test_results_of_tools_go_back_to_the_model(chat_of: MakeChat) -> None:
    chat, heard = chat_of([calculator])
    chat.turn("What is 922 plus 291?")
    assert heard.returns[0] == ("calculator", '{"error": "ZeroDivisionError: 922 + 291"}')
    user, answer, result = chat.conversation.messages[:3]
    assert user == {"role": "user", "content": "What is 922 plus 291?"}
    call = answer["tool_calls"][0]
    assert json.loads(call["function"]["arguments"]) == {"expression": "922 + 291"}
    assert result["role"] == "tool"
    assert result["tool_call_id"] == call["id"]
    assert 1 < len(heard.results) <= ROUNDS


def test_rounds_have_an_end(chat_of: MakeChat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashpack.chat.turns.ROUNDS", 1)
    chat, heard = chat_of([calculator])
    chat.turn("What is 922 plus 291?")
    assert len(heard.results) == 1
    assert "rounds of tool calls" in heard.remarks[-1]


def test_a_tool_that_is_interrupted_ends_the_turn(chat_of: MakeChat) -> None:
    def interrupted(text: str) -> bool:
        raise KeyboardInterrupt

    chat, heard = chat_of([shell_tool(interrupted)])
    chat.turn('Find "driver" in train.log.')
    assert len(heard.results) == 1
    assert chat.conversation.messages[-1]["content"] == '{"error": "the user stopped it"}'


def test_a_no_ends_the_turn(chat_of: MakeChat) -> None:
    chat, heard = chat_of([shell_tool(lambda command: False)])
    chat.turn('Find "driver" in train.log.')
    assert len(heard.results) == 1
    assert chat.conversation.messages[-1]["content"] == '{"error": "the user did not allow this command"}'


def test_a_stopped_answer_stays_and_the_next_turn_goes_on(chat_of: MakeChat) -> None:
    heard_tokens: list[int] = []
    chat, heard = chat_of(cancelled=lambda: len(heard.events) > 3)
    chat.turn("What is 922 plus 291?")
    said = "".join(e.text for e in heard.events)
    assert heard.results[0].finish == "cancelled"
    assert chat.conversation.messages[-1] == {"role": "assistant", "content": said, "interrupted": True}
    assert "stopped" in heard.remarks[0]
    heard_tokens.append(heard.results[0].prompt_tokens)
    chat.cancelled = lambda: False
    chat.turn("What is 2 plus 2?")
    assert heard.results[1].finish == "stop"
    assert heard.results[1].reused_tokens >= heard_tokens[0] - 8


def test_a_turn_that_is_stopped_before_the_answer_is_taken_back(chat_of: MakeChat) -> None:
    chat, heard = chat_of(cancelled=lambda: True)
    chat.turn("What is 922 plus 291?")
    assert chat.conversation.messages == []
    assert heard.remarks == ["stopped before the answer began; what you said is taken back"]
    assert chat.totals.answers == 0


def test_what_a_tool_returned_stays_when_the_next_answer_is_stopped(chat_of: MakeChat) -> None:
    stop: list[bool] = []

    def calculating(expression: str) -> str:
        """Compute.

        Args:
            expression: What.
        """
        stop.append(True)
        return "1213"

    calculating.__name__ = "calculator"
    chat, heard = chat_of([calculating], cancelled=lambda: bool(stop))
    chat.turn("What is 922 plus 291?")
    assert [m["role"] for m in chat.conversation.messages] == ["user", "assistant", "tool"]
    assert heard.remarks == ["stopped before the answer began; what the tool returned stays in the conversation"]


def test_a_call_in_an_answer_that_was_cut_is_not_made(chat_of: MakeChat) -> None:
    def never(command: str) -> bool:
        raise AssertionError

    question = 'Find "driver" in train.log.'
    chat, heard = chat_of([shell_tool(lambda command: False)])
    chat.turn(question)
    (whole,) = heard.results
    cut, heard = chat_of([shell_tool(never)], max_tokens=whole.generated_tokens - 1)  # all but the end
    cut.turn(question)
    assert [e.kind for e in heard.events if e.kind != "content"] == ["tool_call"]
    last = cut.conversation.messages[-1]
    assert last[INTERRUPTED]
    assert "tool_calls" not in last


def test_a_full_context_leaves_the_conversation_as_it_was(chat_of: MakeChat) -> None:
    chat, _ = chat_of(max_tokens=5)
    chat.turn("Hello")
    before = [dict(m) for m in chat.conversation.messages]
    with pytest.raises(ContextError, match="--context"):
        chat.turn("word " * 2000)
    assert chat.conversation.messages == before
    chat.turn("Hello again")
    assert chat.conversation.turns == 2


def test_commands(chat_of: MakeChat, tmp_path: Path) -> None:
    chat, _ = chat_of([calculator], max_tokens=5)
    told: list[str] = []
    assert command(chat, "/system Be brief.", told.append)
    assert command(chat, "/system", told.append)
    assert told[-1] == "Be brief."
    chat.turn("Hello")
    path = tmp_path / "a talk.json"
    assert command(chat, f"/save {path}", told.append)
    assert load(path) == (chat.conversation, ["calculator"])
    kept = list(chat.conversation.messages)
    assert command(chat, "/reset", told.append)
    assert chat.conversation == Conversation("Be brief.", [])
    chat.tools = Tools([])
    assert command(chat, f" /load {path} ", told.append)
    assert chat.conversation.messages == kept
    assert told[-2:] == ["loaded 1 turn", "tools it had that are not here: calculator"]
    assert command(chat, "/stats", told.append)
    assert told[-3].startswith("1 turns; 0 of 1024 tokens")
    told.clear()
    assert command(chat, "/help", told.append)
    assert all(any(line.startswith(name) for line in told) for name in HELP)
    assert not command(chat, "/exit", told.append)
    for line, fault in (("/frob", "/help lists"), ("/save", "needs a file"), ("/reset all", "takes nothing")):
        with pytest.raises(UsageError, match=fault):
            command(chat, line, told.append)


def test_lines_through_a_pipe(pack_of: PackOf, tmp_path: Path) -> None:
    options = ("--memory", "smallest", "--temperature", "0")
    lines = f"What is 922 plus 291?\n\nHel\\\nlo\n/save {tmp_path / 'talk.json'}\n/exit\nnever\n"
    done = flashpack("chat", pack_of("trained"), *options, stdin=lines)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.split("<tool_call>")[1].split("</tool_call>")[0])["name"] == "calculator"
    assert "\x1b" not in done.stdout + done.stderr
    assert len(re.findall(r"\[\d+ tokens", done.stderr)) == 2
    messages = load(tmp_path / "talk.json")[0].messages
    assert [m["content"] for m in messages if m["role"] == "user"] == ["What is 922 plus 291?", "Hel\nlo"]
    assert messages[-1]["content"] + "\n" == done.stdout[-len(messages[-1]["content"]) - 1 :]


@pytest.mark.parametrize(
    ("options", "stdin", "code", "fault"),
    [
        ((), "/frob\nHello\n", 2, "/frob is no command"),
        (("--context", "64"), "word " * 100 + "\n", 7, "raise --context"),
        (("--shell",), "", 2, "no terminal to ask on"),
        (("--thinking", "on"), "Hello\n", 2, "knows no thinking switch"),
        (("--thinking", "maybe"), "", 2, "on or off"),
        (("--tools", "absent.py"), "", 2, "no Python file"),
    ],
)
def test_errors_in_a_pipe(pack_of: PackOf, options: tuple[str, ...], stdin: str, code: int, fault: str) -> None:
    done = flashpack("chat", pack_of("trained"), *options, stdin=stdin)
    assert done.returncode == code
    assert fault in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_pack_without_a_template_is_refused(pack_copy: Callable[..., Path]) -> None:
    pack = pack_copy("trained")
    rewrite(pack, "chat_template.jinja", b"")
    done = flashpack("chat", pack, stdin="Hello\n")
    assert done.returncode == 2
    assert "no chat template: 'flashpack run PACK --raw" in done.stderr


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("hello\r", "hello"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("\x1b[200~def f():\n    pass\n\x1b[201~\r", "def f():\n    pass\n"),
        ("helo\x1b[Dl\r", "hello"),
        ("\x1b[A\r", "before"),
    ],
)
def test_editing(keys: str, text: str) -> None:
    kept = InMemoryHistory(["before"])
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        typed.send_text(keys)
        assert editor(kept).prompt() == text


def test_control_keys() -> None:
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        session = editor(InMemoryHistory())
        typed.send_text("half\x03")
        with pytest.raises(KeyboardInterrupt):
            session.prompt()
        typed.send_text("\x04")
        with pytest.raises(EOFError):
            session.prompt()


def test_history_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    history().append_string("said before")
    path = tmp_path / "flashpack" / "chat_history"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(history().load_history_strings()) == ["said before"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # no folder can be made there
    assert isinstance(history(), InMemoryHistory)
    assert os.path.isfile(path)


def test_an_interruption_is_of_one_answer() -> None:
    interrupt = _Interrupt()
    interrupt.during(True)
    assert not interrupt.came()
    os.kill(os.getpid(), signal.SIGINT)
    assert interrupt.came()
    interrupt.during(False)
    interrupt.during(True)
    assert not interrupt.came()
    interrupt.during(False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """An interruption that comes through fails the test, and does not end all of them."""
    try:
        yield
    except KeyboardInterrupt:
        pytest.fail("it was interrupted")


def test_an_interruption_that_comes_after_the_last_word_loses_nothing(chat_of: MakeChat) -> None:
    interrupt = _Interrupt()
    chat, heard = chat_of(cancelled=interrupt.came, generating=interrupt.during)
    answered = heard.answered
    heard.answered = lambda result: os.kill(os.getpid(), signal.SIGINT) or answered(result)  # type: ignore[method-assign]
    with uninterrupted():
        chat.turn("What is the capital of France?")
    assert [m["role"] for m in chat.conversation.messages] == ["user", "assistant"]
    assert len(heard.results) == 1


def test_an_interruption_between_answers_leads_to_the_next_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def turn(text: str) -> None:
        said.append(text)
        if text == "one":
            raise KeyboardInterrupt

    talk: Any = SimpleNamespace(turn=turn, session=SimpleNamespace(runtime=SimpleNamespace(notices=[])))
    monkeypatch.setattr(sys.modules["flashpack.cli.chat"], "_lines", lambda screen: iter(["one", "two"]))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with uninterrupted():
        _talk(talk, Screen(), 0)
    assert said == ["one", "two"]
    said.clear()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    with pytest.raises(KeyboardInterrupt):
        _talk(talk, Screen(), 0)
    assert said == ["one"]
