"""flashpack serve"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import typer

from flashpack.cli import loading
from flashpack.cli.console import harmless, note, quiet_libraries
from flashpack.errors import MemoryBudgetError, UsageError

EPILOG = """\b
Examples:
  flashpack serve PACK --memory 6GB
  flashpack serve PACK --port 0 --prefix-memory 500MB
  FLASHPACK_API_KEY=secret flashpack serve PACK --host 0.0.0.0
"""


def serve(
    pack: Path = typer.Argument(..., help="Folder of the pack."),
    host: str = typer.Option("127.0.0.1", help="Address to listen at; the default is for this machine only."),
    port: int = typer.Option(8080, min=0, max=65535, help="Port; 0 takes a free one."),
    api_key: str | None = typer.Option(
        None, envvar="FLASHPACK_API_KEY", show_envvar=True, help="Key that clients must send."
    ),
    queue: int = typer.Option(8, min=0, help="So many requests may wait; more get 429."),
    prefix_memory: str = typer.Option("0", help="Memory for texts that were read before: 500MB."),
    max_body: str = typer.Option("4MB", help="Largest body of a request."),
    allow_origin: list[str] = typer.Option([], help="Origin of a web page that may use the server; repeat for more."),
    allow_host: list[str] = typer.Option([], help="Another name by which the server may be called."),
    context: loading.Context = None,
    memory: loading.Memory = None,
    threads: loading.Threads = None,
    device: loading.Device = None,
    check: loading.Check = "first",
    experts_per_token: loading.ExpertsPerToken = None,
    prefer_cached: loading.PreferCached = None,
    expect: loading.Expect = None,
) -> None:
    """Serve the OpenAI and Anthropic APIs, a web page and metrics. Ctrl-C ends it.

    One request is answered at a time, the others wait.
    """
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise UsageError("--api-key: an empty key, or one with characters that no header can carry")
    quiet_libraries()
    loading.opened(pack)
    from flashpack.runtime import template
    from flashpack.runtime.memory import parse_size

    sizes = parse_size(max_body), parse_size(prefix_memory)
    template.start()  # is ready by the time the model is
    from flashpack.server.guard import Limits, is_local
    from flashpack.server.serving import Service, bound, hosts_of

    with bound(host, port) as listening:  # before the model is loaded, which takes longer
        loading.compute_with(threads, pack)
        loading.say_first_use(device)
        from flashpack.runtime.session import Session

        try:
            session = Session(
                pack, prefix_memory=sizes[1], device=device, memory=memory, context=context, check=check, expect=expect,
                experts_per_token=experts_per_token, prefer_cached=prefer_cached,
            )  # fmt: skip
        except MemoryBudgetError as e:
            if not sizes[1]:
                raise
            raise MemoryBudgetError(f"{e}; or lower --prefix-memory") from e
        loading.say_loaded(session.runtime)
        loading.say_notices(session.runtime)
        if api_key is None and not is_local(host):
            note("warning: others can reach this server, and it has no key; --api-key sets one")
        _log()
        limits = Limits(sizes[0], api_key, hosts_of(host, allow_host), allow_origin)
        service = Service(session, listening, limits, queue)
        name = listening.getsockname()
        where = f"[{host}]" if ":" in host else host
        line = f"http://{where}:{name[1]} serves the page, /v1 the APIs (pid {os.getpid()}); Ctrl-C ends it"
        service.serve_all(lambda: note(line))


class _Visible(logging.Formatter):
    """Log lines that do not command the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


def _log() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("%(levelname)s: %(message)s"))
    logging.getLogger().addHandler(handler)
