"""What commands that open a pack have in common: options for loading it, and what is said of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flashpack.cli.console import note
from flashpack.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from flashpack.formats import Pack
    from flashpack.runtime.load import Runtime

Context = Annotated[int | None, typer.Option(min=1, help="Tokens of context. Default: the model's, at most 8192.")]
Memory = Annotated[str | None, typer.Option(help="For the whole process: 6GB, 6GiB or smallest. Default: free memory.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Compute threads. Default: one per processor.")]
Device = Annotated[str | None, typer.Option(help="cpu, or mps (Metal). Default: mps where it is there.")]
Check = Annotated[str, typer.Option(help="Compare experts with their checksums: first (read), always or never.")]
ExpertsPerToken = Annotated[
    int | None,
    typer.Option(
        min=1, help="Fewer experts per token than the model was trained with: faster, and another model's output."
    ),
]
PreferCached = Annotated[
    float | None,
    typer.Option(
        help="Experts in memory replace absent ones from this share of their weight on (0 to 1): another output."
    ),
]
Expect = Annotated[str | None, typer.Option(help="Identity that the pack must have; any other pack is refused.")]
Thinking = Annotated[str | None, typer.Option(help="on or off, where the chat template knows it.")]


def switch(thinking: str | None) -> bool | None:
    """The value of ``--thinking``."""
    if thinking not in (None, "on", "off"):
        raise UsageError(f"--thinking {thinking}: on or off")
    return None if thinking is None else thinking == "on"


def opened(pack: Path) -> Pack:
    """``pack``, before a command imports what takes seconds: a folder that is none is said at once."""
    from flashpack.formats import Pack

    return Pack(pack)


def compute_with(threads: int | None, pack: Path) -> None:
    """Before ``pack`` is loaded: the threads that were asked for, or that ``tune`` found best."""
    from flashpack.runtime.profile import profile_of

    threads = threads or profile_of(opened(pack)).threads
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def say_first_use(device: str | None) -> None:
    """That kernels are compiled and checked now, if they are."""
    from flashpack.kernels import first_use

    if line := first_use(device):
        note(line)


def say_loaded(runtime: Runtime) -> None:
    """That the output is not the model's own, if it is not."""
    used, own = runtime.experts_per_token
    if used != own:
        note(f"{used} of the model's {own} experts per token: the output is not the model's own")
    if runtime.prefer_cached is not None:
        note(
            f"experts in memory preferred, from {runtime.prefer_cached:g} of the weight: the output is not the "
            "model's own"
        )


def say_notices(runtime: Runtime, said: int = 0) -> int:
    """The kernels' notices after the first ``said``; how many there are by now."""
    for line in runtime.notices[said:]:
        note(line)
    return len(runtime.notices)
