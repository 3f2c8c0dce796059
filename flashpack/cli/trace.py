"""flashpack trace"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from flashpack.cli import loading
from flashpack.cli.calibrate import TEXT
from flashpack.cli.console import answer_json, gb, note, progress_bar, quiet_libraries, say
from flashpack.errors import UsageError

if TYPE_CHECKING:
    from flashpack.formats.routing import Routing
    from flashpack.performance.compare import Checked, Row

EPILOG = """\b
Examples:
  flashpack trace PACK --text own.txt
  flashpack trace PACK --prompt "Why is the sky blue?" --out sky.routing
  flashpack trace --simulate sky.routing --plot sky.svg
  flashpack trace --simulate sky.routing --memory 10%,25%,6GB"""


def trace(
    pack: Path | None = typer.Argument(None, help="Folder of the pack to run and record."),
    text: list[Path] = typer.Option(
        [], help="Text file, taken token by token as decoding does; repeatable. Default: ours."
    ),
    tokens: int = typer.Option(2048, min=1, help="Tokens of each text, from its start."),
    prompt: list[str] = typer.Option([], "--prompt", "-p", help="Prompt to read and answer; repeatable."),
    raw: bool = typer.Option(False, help="Continue prompts as they are, without the chat template."),
    max_tokens: int = typer.Option(512, min=1, help="Most tokens of each answer."),
    out: Path | None = typer.Option(None, help="File to write. Default: ./<name of PACK>.routing"),
    overwrite: bool = typer.Option(False, help="Replace the file, if there is one."),
    context: loading.Context = None,
    threads: loading.Threads = None,
    device: loading.Device = None,
    simulate: Path | None = typer.Option(None, help="Replay a recorded file through cache policies, without a pack."),
    memory: str | None = typer.Option(
        None,
        help="Recording: for the whole process, as for run. With --simulate: sizes to compare, in per cent of the "
        "experts or for the whole process, as in 10%,20%,6GB.",
    ),
    plot: Path | None = typer.Option(None, help="With --simulate: draw the hit rates to this .svg or .png file."),
    json: bool = typer.Option(False, "--json", help="Print the result as one JSON object."),
) -> None:
    """Record which experts a text uses; compare cache policies on what was recorded.

    The file holds layer, token and experts, and tells decoded tokens from prompts; docs/tracing.md describes it.
    """
    if simulate is not None:
        if pack is not None or text or prompt or out is not None:
            raise UsageError("--simulate takes a recorded file; leave out PACK, --text, --prompt and --out")
        _simulate(simulate, memory, plot, json)
        return
    if pack is None:
        raise UsageError("which PACK shall be recorded? Or give a recorded file: --simulate FILE")
    if plot is not None:
        raise UsageError("--plot draws what --simulate finds: record first, then flashpack trace --simulate FILE")
    quiet_libraries()
    loading.opened(pack)
    from flashpack.formats.routing import check_new, write_routing
    from flashpack.runtime.routing import record

    target = out or Path(f"{pack.resolve().name.removesuffix('.flashpack')}.routing")
    check_new(target, overwrite)
    if not text and not prompt:
        note("note: recording a text of ours; --text and --prompt take your own")
        text = [TEXT]
    loading.compute_with(threads, pack)
    loading.say_first_use(device)
    bar: Any = None

    def begin(total: int) -> None:
        nonlocal bar
        bar = progress_bar(total, "recording", unit="tokens")

    try:
        routing = record(
            pack, text, prompt, tokens, max_tokens, raw, begin, lambda count: bar.update(count),
            device=device, memory=memory, context=context,
        )  # fmt: skip
    finally:
        if bar is not None:
            bar.close()
    digest = write_routing(target, routing, overwrite)
    if json:
        answer_json({"file": str(target), "bytes": target.stat().st_size, "digest": digest} | _about(routing))
        return
    say(f"{target}: {gb(target.stat().st_size)}; flashpack trace --simulate {shlex.quote(str(target))}")
    _say_about(routing)
    assert routing.run is not None
    slots, hits, asked = sum(routing.run.slots.values()), routing.run.hits, routing.run.hits + routing.run.misses
    say(f"  {hits / asked:.1%} of {asked:,} requests found their expert in memory ({slots:,} slots)")
    say(f"  digest {digest}")


def _simulate(path: Path, memory: str | None, plot: Path | None, json: bool) -> None:
    from flashpack.formats.routing import read_routing
    from flashpack.performance.compare import SIZES, chart, check, compare, sizes_of
    from flashpack.performance.plots import check_plot, draw
    from flashpack.performance.policies import POLICIES

    if plot is not None:
        check_plot(plot)
    routing = read_routing(path)
    sizes = sizes_of(routing, memory or SIZES)
    with progress_bar(len(sizes) * len(POLICIES), "simulating", unit="caches") as bar:
        rows = compare(routing, sizes, bar.update)
    checked = check(routing)
    if plot is not None:
        draw(plot, chart(routing, rows, path.name))
        note(f"drawn: {plot}")
    if json:
        found = {"sizes": [row.to_json() for row in rows], "run": checked.to_json() if checked else None}
        answer_json({"file": str(path)} | _about(routing) | found)
        return
    say(str(path))
    _say_about(routing)
    _show(routing, rows)
    if checked:
        _say_checked(checked)


def _about(routing: Routing) -> dict[str, Any]:
    from flashpack.performance.simulate import busiest_tenth, overlap

    return {
        "pack": routing.about.get("pack"),
        "architecture": routing.about.get("architecture"),
        "tokens": len(routing.tokens),
        "prompt_tokens": int(routing.prompt.sum()),
        "layers": len(routing.layers),
        "experts": sum(routing.stride_counts().values()),
        "experts_per_token": routing.top_k,
        "overlap": overlap(routing),
        "busiest_tenth": busiest_tenth(routing),
    }


def _say_about(routing: Routing) -> None:
    about = _about(routing)
    prompts = f" ({about['prompt_tokens']:,} of prompts)" if about["prompt_tokens"] else ""
    name = f"{about['architecture']}, " if about["architecture"] else ""
    say(
        f"  {about['tokens']:,} tokens{prompts}; {name}{about['layers']} layers, {about['experts']:,} experts, "
        f"{about['experts_per_token']} for a token in each layer"
    )
    say(
        f"  consecutive tokens share {about['overlap']:.1%} of their experts; "
        f"the busiest tenth of a layer's experts gets {about['busiest_tenth']:.1%} of the uses"
    )


def _show(routing: Routing, rows: list[Row]) -> None:
    from flashpack.performance.compare import compared, rate
    from flashpack.performance.policies import POLICIES

    say(f"hit rates of {compared(routing)} in %, from an empty cache; behind them, flashpack's share of Belady's")
    process = "" if rows[0].memory is None else "process"
    say(f"{'experts in memory':>24}{process:>10}{''.join(f'{name:>10}' for name in POLICIES)}")
    for row in rows:
        rates = {name: rate(routing, found) for name, found in row.found.items()}
        arena = "" if row.arena is None else gb(row.arena)
        memory = "" if row.memory is None else gb(row.memory)
        of_best = f"{rates['flashpack'] / rates['Belady']:.0%}" if rates["Belady"] else ""
        cells = "".join(f"{100 * one:10.1f}" for one in rates.values())
        say(f"{100 * row.share:5.1f} %{sum(row.slots.values()):>7}{arena:>10}{memory:>10}{cells}{of_best:>6}")


def _say_checked(checked: Checked) -> None:
    simulated = "equal" if checked.run == checked.simulated else f"{checked.simulated:,}"
    say(
        f"the recorded run ({checked.slots:,} slots) found {checked.run:,} of {checked.asked:,} in memory "
        f"({checked.run / checked.asked:.2%}); simulated: {simulated}"
    )
    if not checked.exact:
        note(
            "note: a chunk of a prompt asked for more experts than there were slots; what stayed in memory then hung "
            "on which read was done first, so the run and its simulation may differ a little"
        )
