"""flashpack bench"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from flashpack.cli import loading, speeds
from flashpack.cli.calibrate import TEXT
from flashpack.cli.console import answer_json, gb, note, quiet_libraries, say

EPILOG = """\b
Examples:
  flashpack bench PACK --plot speed.svg
  flashpack bench PACK --memory 6GB --memory 12GB --text own.txt --json"""


def bench(
    pack: Path = typer.Argument(..., help="Folder of the pack."),
    memory: list[str] = typer.Option(
        [], help="For the whole process: 6GB or 6GiB; repeatable. Default: for 10, 25, 50 and 100 % of the experts."
    ),
    text: Path | None = typer.Option(None, help="Text that is read and decoded, token by token. Default: ours."),
    prompt_tokens: int = typer.Option(256, min=1, help="Tokens of the prompt that is timed."),
    tokens: int = typer.Option(64, min=1, help="Tokens that are decoded; as many come before, untimed."),
    context: loading.Context = None,
    threads: loading.Threads = None,
    device: loading.Device = None,
    trace: Path | None = typer.Option(None, help="Recorded routing for the estimate (flashpack trace)."),
    plot: Path | None = typer.Option(None, help="Draw speed, time by part and hit rates to this .svg or .png file."),
    json: bool = typer.Option(False, "--json", help="Print everything as one JSON object."),
) -> None:
    """Measure how fast a pack decodes and reads prompts within memory budgets, beside what plan estimates.

    Prints Markdown, to paste into a report. Each budget is measured in a process of its own, without the history of
    hot experts. Close other programs: they take processor, drive and memory.
    """
    quiet_libraries()
    loading.opened(pack)
    from flashpack.performance.bench import bench as measure
    from flashpack.performance.bench import charts
    from flashpack.performance.plots import check_plot, draw
    from flashpack.runtime.predict import text_of

    if plot is not None:
        check_plot(plot)
    if text is None:
        note("note: decoding a text of ours; --text takes your own, which may use other experts")
    routing = speeds.recorded(trace, pack)
    words = text_of("--text", text or TEXT)
    report = measure(
        pack, words, speeds.sizes(memory), prompt_tokens, tokens, context, threads, device, routing, note
    )  # fmt: skip
    about = _about(pack, report.rows[0].run.kernels, report.rows[0].run.decoding, report.rows[0].run.io)
    if plot is not None:
        draw(plot, *charts(report, about["pack"]))
        note(f"drawn: {plot}")
    if json:
        answer_json(about | report.to_json())
        return
    say(f"{about['pack']} ({about['architecture']}): experts {about['experts']}, dense part {about['dense']}, "
        f"{gb(about['bytes'])}")  # fmt: skip
    say(about["machine"])
    say(f"flashpack {about['version']}: {about['kernels']}, {about['decoding']}, {about['io']} reads")
    words_of, how = "our text" if text is None else text.name, "recorded" if routing else "even"
    say(f"{tokens} tokens of {words_of}; context {report.forecast.context}; the estimate is for {how} routing")
    say("")
    speeds.say_report(report)


def _about(folder: Path, kernels: str, decoding: str, io: str) -> dict[str, Any]:
    from flashpack.doctor.machine import summary
    from flashpack.formats import Pack
    from flashpack.version import __version__

    pack = Pack(folder)
    m = pack.manifest
    return {
        "pack": folder.resolve().name,
        "identity": pack.identity,
        "architecture": m.model["architecture"],
        "experts": m.recipe.get("experts"),
        "dense": m.recipe.get("dense"),
        "bytes": pack.expert_bytes + pack.dense_bytes,
        "machine": summary(),
        "version": __version__,
        "kernels": kernels,
        "decoding": decoding,
        "io": io,
    }
