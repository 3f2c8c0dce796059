"""flashpack chat"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flashpack.cli import loading
from flashpack.cli.chat_screen import Screen, allowed
from flashpack.cli.console import note, quiet_libraries
from flashpack.errors import FlashpackError, UsageError

if TYPE_CHECKING:
    from flashpack.chat.tools import Tools
    from flashpack.chat.turns import Chat
    from flashpack.runtime.session import Session

EPILOG = """\b
Examples:
  flashpack chat PACK --memory 6GB
  flashpack chat PACK --tools my_tools.py --shell
  echo "Why is the sky blue?" | flashpack chat PACK
"""


def chat(
    pack: Path = typer.Argument(..., help="Folder of the pack."),
    system: str | None = typer.Option(None, help="System prompt."),
    tools: Path | None = typer.Option(None, help="Python file with functions that the model may call, unasked."),
    shell: bool = typer.Option(False, "--shell", help="Let the model run commands; each is shown, and asked for."),
    thinking: loading.Thinking = None,
    max_tokens: int | None = typer.Option(None, min=1, help="Most tokens of an answer. Default: all the context has."),
    context: loading.Context = None,
    memory: loading.Memory = None,
    temperature: float | None = typer.Option(None, min=0.0, help="0 is greedy. Default: what the pack recommends."),
    top_p: float | None = typer.Option(None, min=0.0, max=1.0, help="Nucleus sampling. Default: the pack's."),
    top_k: int | None = typer.Option(None, min=0, help="Sample from the k likeliest; 0 is all. Default: the pack's."),
    seed: int | None = typer.Option(None, help="Seed of each answer's sampling. Default: another one each time."),
    threads: loading.Threads = None,
    device: loading.Device = None,
    check: loading.Check = "first",
    experts_per_token: loading.ExpertsPerToken = None,
    prefer_cached: loading.PreferCached = None,
    expect: loading.Expect = None,
) -> None:
    """Talk with a model. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.

    Without a terminal, each line of standard input is a turn; answers go to stdout as plain text, and an error ends it.
    """
    thinks = loading.switch(thinking)
    if shell and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("--shell asks before it runs anything, and there is no terminal to ask on")
    quiet_libraries()
    from flashpack.runtime import template

    loading.compute_with(threads, pack)
    template.start()  # is ready by the time the model is
    offered = _tools(tools, shell)
    loading.say_first_use(device)
    from flashpack.runtime.session import Session

    session = Session(
        pack, device=device, memory=memory, context=context, check=check, expect=expect,
        experts_per_token=experts_per_token, prefer_cached=prefer_cached,
    )  # fmt: skip
    said = _remarks(session, bool(offered.names))
    from flashpack.chat.conversation import Conversation
    from flashpack.chat.turns import Chat

    asked: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    interrupt = _Interrupt()
    screen = Screen()
    sampling = replace(session.sampling, **{k: v for k, v in asked.items() if v is not None})
    talk = Chat(
        session, Conversation(system), offered, screen, sampling, seed, thinks, max_tokens, interrupt.came,
        interrupt.during,
    )  # fmt: skip
    try:
        _talk(talk, screen, said)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads; nothing more to say at the end
        raise typer.Exit(1) from None


def _tools(path: Path | None, shell: bool) -> Tools:
    from flashpack.chat.shell import shell_tool
    from flashpack.chat.tools import Tools, functions_of

    return Tools([*(functions_of(path) if path else ()), *((shell_tool(allowed),) if shell else ())])


def _remarks(session: Session, tools: bool) -> int:
    """What is to be known before the first turn, and how many notices it has; refuses a pack that cannot chat."""
    from flashpack.runtime.messages import shows_tools

    if not session.tokenizer.chat_template:
        raise UsageError("the pack has no chat template: 'flashpack run PACK --raw --prompt TEXT' continues plain text")
    loading.say_loaded(session.runtime)
    said = loading.say_notices(session.runtime)
    if tools and not shows_tools(session.tokenizer):
        note("the pack's chat template does not tell the model of tools: it calls those that it was trained with")
    return said


class _Interrupt:
    """Ctrl-C while an answer comes: noticed, and the answer stops."""

    def __init__(self) -> None:
        self._came = False
        self._before: Any = None

    def came(self) -> bool:
        return self._came

    def during(self, answer: bool) -> None:
        if answer:
            self._came = False
            self._before = signal.signal(signal.SIGINT, self._notice)
        else:
            signal.signal(signal.SIGINT, self._before)

    def _notice(self, *signal: object) -> None:
        self._came = True


def _talk(chat: Chat, screen: Screen, said: int) -> None:
    from flashpack.chat.commands import command

    typed = sys.stdin.isatty()
    if typed:
        screen.remark("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    for text in _lines(screen):
        if not text.strip():
            continue
        try:
            if text.lstrip().startswith("/"):
                if not command(chat, text, screen.remark):
                    return
            else:
                chat.turn(text)
        except FlashpackError as e:
            screen.failed()
            if not typed:
                raise
            note(f"flashpack: {e}")
            if e.code == "context":
                note("the conversation is as it was before; /reset begins anew")
        except KeyboardInterrupt:  # between an answer and the next prompt, or in a command
            screen.failed()
            if not typed:
                raise
            screen.remark("stopped")
        said = loading.say_notices(chat.session.runtime, said)


def _lines(screen: Screen) -> Iterator[str]:
    """What the user says, turn by turn."""
    if not (sys.stdin.isatty() and screen.terminal and os.environ.get("TERM", "dumb") != "dumb"):
        return _plain_lines()
    from flashpack.chat.editor import editor

    return _typed_lines(editor().prompt, screen)


def _typed_lines(ask: Callable[[], str], screen: Screen) -> Iterator[str]:
    stopped = False
    while True:
        try:
            text = ask()
        except KeyboardInterrupt:
            if stopped:
                return
            stopped = True
            screen.remark("Ctrl-C once more, or Ctrl-D, leaves")
            continue
        except EOFError:
            return
        stopped = False
        yield text.encode("utf-8", "replace").decode()  # bytes that were no UTF-8


def _plain_lines() -> Iterator[str]:
    """Lines of standard input; one that ends with a backslash goes on in the next."""
    stdin: Any = sys.stdin
    stdin.reconfigure(errors="replace")
    prompt = sys.stdin.isatty()
    text = ""
    while True:
        if prompt:
            print("  " if text else "> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        text += line.removesuffix("\n")
        if line.endswith("\\\n"):
            text = text[:-1] + "\n"
            continue
        if text:
            yield text
        if not line:
            return
        text = ""
