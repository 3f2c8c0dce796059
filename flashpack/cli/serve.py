"""flashpack serve"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import typer

from flashpack.cli.console import harmless, note, quiet_libraries
from flashpack.errors import UsageError

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
    context: int | None = typer.Option(None, min=1, help="Tokens of context. Default: the model's, at most 8192."),
    memory: str | None = typer.Option(None, help="For the whole process: 6GB, 6GiB or smallest. Default: free memory."),
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
    """Serve the OpenAI and Anthropic APIs, a web page and metrics. Ctrl-C ends it.

    One request is answered at a time, the others wait.
    """
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
        raise UsageError("--api-key: an empty key, or one with characters that no header can carry")
    quiet_libraries()
    from flashpack.kernels import first_use
    from flashpack.runtime import template
    from flashpack.runtime.memory import parse_size

    sizes = parse_size(max_body), parse_size(prefix_memory)
    template.start()  # is ready by the time the model is
    from flashpack.server.guard import Limits, is_local
    from flashpack.server.serving import Service, bound, hosts_of

    listening = bound(host, port)  # before the model is loaded, which takes longer
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if line := first_use(device):
        note(line)
    from flashpack.runtime.session import Session

    session = Session(
        pack, saved=sizes[1], device=device, memory=memory, context=context, check=check, expect=expect,
        experts_per_token=experts_per_token, prefer_cached=prefer_cached,
    )  # fmt: skip
    used, own = session.runtime.experts_per_token
    if used != own:
        note(f"{used} of the model's {own} experts per token: the output is not the model's own")
    if prefer_cached is not None:
        note(f"experts in memory preferred, from {prefer_cached:g} of the weight: the output is not the model's own")
    for line in session.runtime.notices:
        note(line)
    if api_key is None and not is_local(host):
        note("warning: others can reach this server, and it has no key; --api-key sets one")
    _log()
    service = Service(session, listening, Limits(sizes[0], api_key, hosts_of(host, allow_host), allow_origin), queue)
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
