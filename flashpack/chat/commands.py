"""The commands of a chat: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flashpack.chat.conversation import load
from flashpack.chat.turns import Chat
from flashpack.errors import UsageError
from flashpack.sizes import gb

HELP = {
    "/reset": "forget the conversation; the system prompt stays",
    "/save FILE": "save the conversation as JSON",
    "/load FILE": "go on with a saved conversation",
    "/system TEXT": "set the system prompt; without TEXT, show it",
    "/stats": "what the conversation took so far",
    "/help": "this list",
    "/exit": "leave (also Ctrl-D, or Ctrl-C twice)",
}
NAMES = [one.split()[0] for one in HELP]


def command(chat: Chat, line: str, tell: Callable[[str], object]) -> bool:
    """Do what ``line`` says; whether to go on. ``tell`` gets lines for the person.

    Raises ``UsageError`` for an unknown command, and what saving and loading raise.
    """
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name not in NAMES:
        raise UsageError(f"{name[:40]} is no command; /help lists them")
    if rest and name in ("/reset", "/stats", "/help", "/exit"):
        raise UsageError(f"{name} takes nothing after it")
    if name == "/exit":
        return False
    for text in _COMMANDS[name](chat, rest):
        tell(text)
    return True


def _reset(chat: Chat, rest: str) -> list[str]:
    chat.conversation.messages.clear()
    chat.totals.last_tokens = 0
    return ["the conversation is empty"]


def _save(chat: Chat, rest: str) -> list[str]:
    path = _path("/save", rest)
    chat.conversation.save(path, chat.tools.names)
    return [f"saved in {path}"]


def _load(chat: Chat, rest: str) -> list[str]:
    path = _path("/load", rest)
    loaded, tools = load(path)
    chat.conversation.system, chat.conversation.messages = loaded.system, loaded.messages
    turns = loaded.turns
    said = [f"loaded {turns} turn{'' if turns == 1 else 's'}"]
    if missing := [name for name in tools if name not in chat.tools.names]:
        said.append(f"tools it had that are not here: {', '.join(missing)}")
    return said


def _system(chat: Chat, rest: str) -> list[str]:
    if not rest:
        return [chat.conversation.system or "there is no system prompt but the chat template's own"]
    chat.conversation.system = rest
    return ["set; the next answer reads the conversation anew"]


def _stats(chat: Chat, rest: str) -> list[str]:
    t, runtime = chat.totals, chat.session.runtime
    stats = runtime.store.stats
    return [
        f"{chat.conversation.turns} turns; {t.last_tokens} of {runtime.context} tokens of context",
        f"{t.answers} answers: {t.prompt_tokens} prompt tokens, {t.reused_tokens} of them reused; "
        f"{t.generated_tokens} generated",
        f"experts {stats.hit_rate:.1%} hits, {gb(stats.total().bytes_read)} read ({stats.io}); {runtime.kernels}",
    ]


def _help(chat: Chat, rest: str) -> list[str]:
    lines = [f"{name:14}{text}" for name, text in HELP.items()]
    return [*lines, "Alt-Enter, or a backslash at the end, begins another line. Ctrl-C stops an answer."]


def _path(name: str, rest: str) -> Path:
    if not rest:
        raise UsageError(f"{name} needs a file: {name} talk.json")
    try:
        return Path(rest).expanduser()
    except RuntimeError as e:
        raise UsageError(f"{name} {rest}: {e}") from e


_COMMANDS = {"/reset": _reset, "/save": _save, "/load": _load, "/system": _system, "/stats": _stats, "/help": _help}
