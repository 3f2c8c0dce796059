"""flashpack eval"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from flashpack.cli import loading
from flashpack.cli.bars import Bars
from flashpack.cli.console import answer_json, gb, note, quiet_libraries, say
from flashpack.errors import UsageError

if TYPE_CHECKING:
    from flashpack.converter import Plan
    from flashpack.runtime.score import Divergence, Perplexity
    from flashpack.runtime.toolcalls import Counts


def eval(
    pack: Path = typer.Argument(..., help="Folder of the pack to judge."),
    against: str | None = typer.Option(
        None, help="The reference: a pack, or a checkpoint, which is converted without loss. Default: none."
    ),
    text: Path = typer.Option(..., help="Text file to predict."),
    windows: int = typer.Option(24, min=1, help="Pieces of the text, from its start; fewer if it is shorter."),
    length: int = typer.Option(512, min=2, help="Tokens of a piece."),
    part: str = typer.Option("all", help="Only every second of the pieces: even (the first, the third ...) or odd."),
    tools: Path | None = typer.Option(None, help="Tool calls: a JSON object with user, name and arguments per line."),
    system: str | None = typer.Option(None, help="System prompt of the tool calls. Default: a general one."),
    ignore: list[str] = typer.Option([], help="TOOL.ARGUMENT that may have any value, for example python.timeout."),
    memory: str | None = typer.Option(None, help="For the whole process: 6GB, 6GiB or smallest. Default: free memory."),
    experts_per_token: int | None = typer.Option(None, min=1, help="Of PACK, as for run; one token per step then."),
    prefer_cached: float | None = typer.Option(None, help="Of PACK, as for run; one token per step then."),
    plain: bool = typer.Option(False, help="Compute with torch and transformers alone: slow; only the weights differ."),
    scratch: Path | None = typer.Option(None, help="Folder for temporary files. Default: the system's."),
    max_kld: float | None = typer.Option(None, min=0.0, help="End with exit code 1 if the mean divergence is larger."),
    json: bool = typer.Option(False, "--json", help="Print the result as one JSON object."),
) -> None:
    """Judge a pack against its original. KL divergence, equal best tokens, perplexity, and tool calls.

    Without --against, perplexity and tool calls only. Both models stream, one after the other: neither has to fit in
    memory. Neither memory nor threads change the result, but with --prefer-cached.
    """
    quiet_libraries(against or "")
    if against is None and max_kld is not None:
        raise UsageError("--max-kld is a divergence from a reference; name one with --against")
    if scratch is not None and not scratch.is_dir():
        raise UsageError(f"--scratch {scratch}: not a folder")
    ignored = [_argument(name) for name in ignore]
    loading.opened(pack)
    from flashpack.runtime import load
    from flashpack.runtime.score import Divergence, divergence, perplexity, read_windows
    from flashpack.runtime.toolcalls import SYSTEM, read_cases, tool_calls

    pieces = read_windows(pack, text, windows, length, part)
    cases = read_cases(tools) if tools else []
    found: Divergence | Perplexity
    counts = None
    with Bars() as bars:

        def begin(name: str, total: int) -> None:
            bars.begin(name, total, "tokens")

        options = (memory, experts_per_token, prefer_cached, plain, begin, bars.advance)
        if against is None:
            found = perplexity(pack, pieces, *options)
        else:
            with _as_pack(against, scratch, bars) as reference:
                found = divergence(pack, reference, pieces, scratch, *options)
        if cases:
            from flashpack.runtime.tokenizer import load_tokenizer

            bars.begin("tool calls", len(cases), "calls")
            model = load(
                pack, memory=memory, reference=plain, warm=False, experts_per_token=experts_per_token,
                prefer_cached=prefer_cached,
            )  # fmt: skip
            prompt = SYSTEM if system is None else system
            counts = tool_calls(model, load_tokenizer(pack), cases, prompt, ignored, bars.advance)
    if json:
        name = "perplexity" if against is None else "divergence"
        answer_json({name: found.to_json(), "tools": counts.to_json() if counts else None})
    else:
        _show(found, counts)
    if isinstance(found, Divergence) and max_kld is not None and found.kld > max_kld:
        note(f"flashpack: KL divergence {found.kld:.4g} is more than --max-kld {max_kld:g}")
        raise typer.Exit(1)


@contextmanager
def _as_pack(source: str, scratch: Path | None, bars: Bars) -> Iterator[Path]:
    """The folder of a pack; one that is made of a checkpoint is there only meanwhile."""
    from flashpack.formats import constants as C

    if (Path(source) / C.MANIFEST).is_file():
        yield Path(source)
        return
    from flashpack.converter import convert

    def begin(plan: Plan, done: int) -> None:
        note(f"reference: {gb(sum(plan.file_sizes().values()))} to write for the time of this comparison")
        for text in plan.notices:
            note(f"note: {text}")
        bars.begin("converting", sum(plan.source_bytes().values()))

    with tempfile.TemporaryDirectory(prefix="flashpack-eval-", dir=scratch) as folder:
        out = Path(folder) / "reference"
        convert(source, out, experts="source", dense="source", on_plan=begin, progress=bars.advance)
        yield out


def _argument(name: str) -> tuple[str, str]:
    """(tool, argument) of "tool.argument"."""
    tool, dot, argument = name.rpartition(".")
    if not (tool and dot and argument):
        raise UsageError(f"--ignore {name}: write TOOL.ARGUMENT, for example python.timeout")
    return tool, argument


def _show(found: Divergence | Perplexity, counts: Counts | None) -> None:
    from flashpack.runtime.score import Perplexity

    say(f"{found.windows} window{'s' if found.windows > 1 else ''} of {found.length} tokens")
    if isinstance(found, Perplexity):
        say(f"  perplexity       {found.perplexity:.4f}")
    else:
        error = "" if found.error is None else f" +- {found.error:.2g} (standard error)"
        say(f"  KL divergence    {found.kld:.4g}{error} nats per token; 99 % of the tokens below {found.p99:.3g}")
        say(f"  same best token  {found.top1:.2%}")
        say(f"  perplexity       {found.perplexity:.4f}, of the reference {found.reference_perplexity:.4f}")
    if counts:
        say(f"  tool calls       {counts.calls}: {counts.valid} valid JSON, {counts.exact} exact")
