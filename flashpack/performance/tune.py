"""Finding what reads a pack fastest on this machine: reads in flight, the way to read, reading ahead, threads.

One knob after the other is tried against the best so far, in turns, each time in a process of its own. A change is
kept only if it wins every turn and by ``GAIN`` on the whole (of medians): a drive and a machine that others use give
other numbers each time. None of them changes a result. The pack is out of the page cache before each: what one trial
read must not help the next.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flashpack.formats import Pack
from flashpack.performance.measure import Setting, apart, check_context, length, measure, tokens_for
from flashpack.runtime.drive import open_file
from flashpack.runtime.profile import Profile, usable_cores

TURNS = 3
GAIN = 1.03
"""What a change must win: less is not worth another profile."""

READERS = (4, 16, 2, 32)


@dataclass(frozen=True)
class Trial:
    """A change to the best so far, ``knob`` = ``value``: tokens per second of both, turn by turn."""

    knob: str
    value: Any
    before: list[float]
    after: list[float]
    kept: bool

    @property
    def gain(self) -> float:
        """Speed with the change over that without, of medians."""
        return statistics.median(self.after) / statistics.median(self.before)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"gain": self.gain}


@dataclass(frozen=True)
class Tuned:
    """``before``, ``after``: tokens per second without ``profile`` and with it, in turns at the end. ``left``: changes
    for which there was no time."""

    profile: Profile
    trials: list[Trial]
    before: list[float]
    after: list[float]
    left: list[tuple[str, Any]]

    @property
    def gain(self) -> float:
        """Decoding with the profile over that without; 1 if nothing was changed."""
        return statistics.median(self.after) / statistics.median(self.before) if self.after else 1.0

    def to_json(self) -> dict[str, Any]:
        return {
            "profile": asdict(self.profile),
            "gain": self.gain,
            "tokens_per_second": {"before": self.before, "after": self.after},
            "trials": [t.to_json() for t in self.trials],
            "not_tried": [list(one) for one in self.left],
        }


def tune(
    folder: Path,
    text: str,
    memory: int,
    seconds: float,
    tokens: int,
    prompt: int,
    context: int | None = None,
    device: str | None = None,
    begin: Callable[[str], object] = lambda what: None,
) -> Tuned:
    """Try for about ``seconds``; no trial is begun that would not end by then. ``begin`` is told what is done next.

    Raises ``UsageError`` if the text is empty, and the errors of ``flashpack.load``.
    """
    pack, needed = Pack(folder), length(prompt, tokens, tokens, split=False)
    check_context(pack, needed, context)
    ids = tokens_for(pack, text, needed, begin)
    end = time.monotonic() + seconds
    best, trials, left, took = Profile(), [], [], 0.0
    setting = Setting(folder, memory, ids, prompt, tokens, tokens, context, None, device, best, split=False)

    def speed(profile: Profile) -> float:
        forget(pack)
        return 1 / apart(measure, replace(setting, profile=profile)).seconds

    def compare(one: Profile, other: Profile) -> tuple[list[float], list[float]]:
        """In turns; none is left out, but there is one turn only where the other does not win it."""
        before: list[float] = []
        after: list[float] = []
        while len(before) < TURNS:
            before.append(speed(one))
            after.append(speed(other))
            if after[-1] <= before[-1]:
                break
        return before, after

    # Until a whole comparison and the last one fit in no more.
    for knob, value in _changes():
        changed = replace(best, **{knob: value})
        if time.monotonic() + 2 * took > end:
            left.append((knob, value))
            continue
        begin(f"{knob} {value}, with {best.words()}")
        begun = time.monotonic()
        before, after = compare(best, changed)
        took = max(took, (time.monotonic() - begun) * TURNS / len(before))
        won = all(b > a for a, b in zip(before, after, strict=True))
        kept = won and len(before) == TURNS and statistics.median(after) > GAIN * statistics.median(before)
        trials.append(Trial(knob, value, before, after, kept))
        if kept:
            best = changed
    if best == Profile():
        return Tuned(best, trials, [], [], left)
    begin(f"the whole: {best.words()}")
    pairs = [(speed(Profile()), speed(best)) for _ in range(TURNS)]
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    if statistics.median(after) <= GAIN * statistics.median(before):
        return Tuned(Profile(), trials, [], [], left)  # parts that won alone do not win together
    return Tuned(best, trials, before, after, left)


def forget(pack: Pack) -> None:
    """Drop the shards from the page cache, where the system can."""
    if hasattr(os, "posix_fadvise"):
        for layer in pack.manifest.layers:
            fd = open_file(pack.folder, layer.path, direct=False)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _changes() -> Iterator[tuple[str, Any]]:
    """What is tried, in this order."""
    yield "io", "direct"
    yield "io", "buffered"
    for readers in READERS:
        yield "readers", readers
    yield "prefetch", False
    if (count := usable_cores()) > 1:
        yield "threads", max(1, count // 2)
