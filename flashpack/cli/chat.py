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
    thinking: str | None = typer.Option(None, help="on or off, where the chat template knows it."),
    max_tokens: int | None = typer.Option(None, min=1, help="Most tokens of an answer. Default: all the context has."),
    context: int | None = typer.Option(None, min=1, help="Tokens of context. Default: the model's, at most 8192."),
    memory: str | None = typer.Option(None, help="For the whole process: 6GB, 6GiB or smallest. Default: free memory."),
    temperature: float | None = typer.Option(None, min=0.0, help="0 is greedy. Default: what the pack recommends."),
    top_p: float | None = typer.Option(None, min=0.0, max=1.0, help="Nucleus sampling. Default: the pack's."),
    top_k: int | None = typer.Option(None, min=0, help="Sample from the k likeliest; 0 is all. Default: the pack's."),
    seed: int | None = typer.Option(None, help="Seed of each answer's sampling. Default: another one each time."),
    threads: int | None = typer.Option(None, min=1, help="Compute threads. Default: one per processor."),
    device: str | None = typer.Option(None, help="cpu, or mps (Metal). Default: mps where it is there."),
    check: str = typer.Option("first", help="Compare experts with their checksums: first (read), always or never."),
    experts_per_token: int | None = typer.Option(
        None, min=1, help="Fewer experts per token than the model was trained with: faster, and another model's output."
    ),
    prefer_cached: float | None = typer.Option(
        None, help="Experts in memory replace absent ones from this share of their weight on (0 to 1): another output."
    ),
    expect: str | None = typer.Option(None, help="Identity that the pack must have; any other pack is refused."),
) -> None:
    """Talk with a model. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.

    Without a terminal, each line of standard input is a turn; answers go to stdout as plain text, and an error ends it.
    """
    if thinking not in (None, "on", "off"):
        raise UsageError(f"--thinking {thinking}: on or off")
    if shell and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("--shell asks before it runs anything, and there is no terminal to ask on")
    quiet_libraries()
    from flashpack.kernels import first_use
    from flashpack.runtime import template

    template.start()  # is ready by the time the model is
    offered = _tools(tools, shell)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if line := first_use(device):
        note(line)
    from flashpack.runtime.session import Session

    session = Session(
        pack, device=device, memory=memory, context=context, check=check, expect=expect,
        experts_per_token=experts_per_token, prefer_cached=prefer_cached,
    )  # fmt: skip
    _remarks(session, prefer_cached, bool(offered.names))
    from flashpack.chat.conversation import Conversation
    from flashpack.chat.turns import Chat

    asked: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    interrupt = _Interrupt()
    screen = Screen()
    sampling = replace(session.sampling, **{k: v for k, v in asked.items() if v is not None})
    talk = Chat(
        session, Conversation(system), offered, screen, sampling, seed, None if thinking is None else thinking == "on",
        max_tokens, interrupt.came, interrupt.during,
    )  # fmt: skip
    try:
        _talk(talk, screen)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads; nothing more to say at the end
        raise typer.Exit(1) from None


def _tools(path: Path | None, shell: bool) -> Tools:
    from flashpack.chat.shell import shell_tool
    from flashpack.chat.tools import Tools, functions_of

    return Tools([*(functions_of(path) if path else ()), *((shell_tool(allowed),) if shell else ())])


def _remarks(session: Session, prefer_cached: float | None, tools: bool) -> None:
    """What is to be known before the first turn; refuses a pack that cannot chat."""
    from flashpack.runtime.messages import shows_tools

    if not session.tokenizer.chat_template:
        raise UsageError("the pack has no chat template: 'flashpack run PACK --raw --prompt TEXT' continues plain text")
    used, own = session.runtime.experts_per_token
    if used != own:
        note(f"{used} of the model's {own} experts per token: the output is not the model's own")
    if prefer_cached is not None:
        note(f"experts in memory preferred, from {prefer_cached:g} of the weight: the output is not the model's own")
    for line in session.runtime.notices:
        note(line)
    if tools and not shows_tools(session.tokenizer):
        note("the pack's chat template does not tell the model of tools: it calls those that it was trained with")


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


def _talk(chat: Chat, screen: Screen) -> None:
    from flashpack.chat.commands import command

    typed = sys.stdin.isatty()
    said = len(chat.session.runtime.notices)
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
        for line in chat.session.runtime.notices[said:]:
            note(line)
        said = len(chat.session.runtime.notices)


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
