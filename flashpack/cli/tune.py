"""flashpack tune"""

from __future__ import annotations

from pathlib import Path

import typer

from flashpack.cli import loading
from flashpack.cli.calibrate import TEXT
from flashpack.cli.console import answer_json, note, quiet_libraries, say

EPILOG = """\b
Examples:
  flashpack tune PACK --memory 6GB
  flashpack tune PACK --memory 6GB --seconds 600
  flashpack tune PACK --forget"""


def tune(
    pack: Path = typer.Argument(..., help="Folder of the pack."),
    memory: str | None = typer.Option(None, help="That you run it with: 6GB or 6GiB. Default: half of the experts."),
    seconds: int = typer.Option(300, min=30, help="How long to try, about."),
    text: Path | None = typer.Option(None, help="Text that is decoded, token by token. Default: ours."),
    tokens: int = typer.Option(48, min=4, help="Tokens that are decoded each time; as many come before, untimed."),
    context: loading.Context = None,
    device: loading.Device = None,
    forget: bool = typer.Option(False, help="Forget what was found, and do nothing else."),
    json: bool = typer.Option(False, "--json", help="Print everything as one JSON object."),
) -> None:
    """Try on this machine how a pack is read fastest, and remember it: run, chat and serve use what won.

    Reads in flight, direct or buffered, reading ahead, threads: each against the best so far, in turns. None of them
    changes what the model says. Close other programs. FLASHPACK_PROFILE=0 does without what was found.
    """
    quiet_libraries()
    opened = loading.opened(pack)
    from flashpack.performance import speed
    from flashpack.performance.tune import tune as find
    from flashpack.runtime import profile
    from flashpack.runtime.forecast import smallest_of
    from flashpack.runtime.memory import parse_size, spare
    from flashpack.runtime.predict import text_of

    path = profile.path_of(opened)
    if forget:
        profile.remove(opened)
        say(f"{path}: forgotten")
        return
    if memory is None:
        least, context_tokens, _ = smallest_of(opened, context)
        fixed = least.total - least.arena
        total = speed.totals(fixed, opened.expert_bytes, least.total, least.base + spare(), [])[:3][-1]
        share = min(1.0, (total - fixed) / opened.expert_bytes)
        note(
            f"note: with {total / 1e9:.2f} GB, for {share:.0%} of the experts and a context of {context_tokens} tokens"
        )
    else:
        total = parse_size(memory)
    words = text_of("--text", text or TEXT)
    found = find(pack, words, total, seconds, tokens, 2 * tokens, context, device, note)
    evidence = {"memory": total} | found.to_json()
    if found.profile == profile.Profile():
        profile.remove(opened)
    else:
        profile.write(opened, found.profile, evidence)
    if json:
        answer_json(evidence | {"file": str(path) if path.is_file() else None})
        return
    for trial in found.trials:
        rates = ", ".join(f"{a:.3g} -> {b:.3g}" for a, b in zip(trial.before, trial.after, strict=True))
        say(f"{trial.knob} {trial.value}: {'kept' if trial.kept else 'no'} ({trial.gain:.2f}x; tok/s {rates})")
    for knob, value in found.left:
        say(f"{knob} {value}: not tried; --seconds gives more time")
    if found.profile == profile.Profile():
        say("nothing is clearly faster than what is used without a profile; none is kept")
    else:
        say(f"kept: {found.profile.words()}: {found.gain:.2f}x, measured in turns; {path}")
