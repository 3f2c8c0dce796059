"""flashpack calibrate"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from flashpack.cli import loading
from flashpack.cli.console import answer_json, gb, note, progress_bar, quiet_libraries, say

TEXT = Path(__file__).parent / "calibration.txt"
"""Our own text, for whoever has none: prose, code, and tool calls."""


def calibrate(
    pack: Path = typer.Argument(..., help="Folder of the pack; best one without loss (--experts source)."),
    text: list[Path] = typer.Option([], help="Text file, or .jsonl of texts or messages; repeatable. Default: ours."),
    out: Path | None = typer.Option(None, help="File to write. Default: ./<name of PACK>.calib"),
    tokens: int = typer.Option(131_072, min=512, help="Tokens to take, the same share of each text."),
    memory: str | None = typer.Option(None, help="For the whole process: 6GB, 6GiB or smallest. Default: free memory."),
    json: bool = typer.Option(False, "--json", help="Print the result as one JSON object."),
) -> None:
    """Record what experts are given, for convert --calib.

    Take text like that which the model will see, all kinds of it: what is missing gets worse.
    """
    quiet_libraries()
    recipe = loading.opened(pack).manifest.recipe
    from flashpack.runtime.calibrate import calibrate as record

    if not text:
        note(f"note: calibrating on a small text of ours, {gb(TEXT.stat().st_size)}; --text takes your own")
    if recipe.get("experts") != "source" or recipe.get("dense") != "source":
        note("note: this pack was rounded, so what it computes is not quite the model's; better a pack made with")
        note("note: flashpack convert SRC --experts source --dense source")
    target = out or Path(f"{pack.resolve().name.removesuffix('.flashpack')}.calib")
    bar: Any = None

    def begin(total: int) -> None:
        nonlocal bar
        bar = progress_bar(total, "calibrating", unit="tokens")

    try:
        digest = record(pack, text or [TEXT], target, tokens, memory, begin, lambda count: bar.update(count))
    finally:
        if bar is not None:
            bar.close()
    size = target.stat().st_size
    if json:
        answer_json({"file": str(target), "bytes": size, "digest": digest})
    else:
        say(f"{target}: {gb(size)}; flashpack convert SRC --quality max --calib {target}")
        say(f"  digest {digest}")
