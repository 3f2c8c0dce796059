"""How well tests of Metal kernels notice mistakes.

``python -m tests.metal.mutate [WORDS]`` makes all changes (or those with one of the words in their names), prints those
that no check notices, and the score.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from flashpack.kernels.metal.source import PARTS, source
from tests.metal.changes import mutated
from tests.metal.emulator import FakeMps, time_limit
from tests.metal.emulator.library import Library

Check = Callable[[FakeMps], object]
SECONDS = 5  # of a launch; none of the checks' takes one

# What no check can notice, by why.
REASONS: dict[str, list[str]] = {
    "there is one matrix, and the numbers of others repeat its own": ["products_of_many: next index: 0 (2)"],
    "both ways compute the same": ["Plain::codes: >= more: UNIT", "delta: > more: 20.0f"],
    "half of an even number is half of the next, too": ["Affine::codes: < more: BITS"],
    "what is computed more is not used": [
        "multiply: < more: T (2)",
        "multiply: >= more: count",
        "products_of_many: >= more: l.ends[0]",
        "experts_up: >= more: m.rows",
        "experts_down: >= more: m.rows",
        "experts_sum: >= more: m.rows",
        "attend_merge: < more: parts",
    ],
    "all these lanes have the same number": [
        "sum_of_group: == more: 0",
        "attend: == more: 0 (3)",
        "attend: == more: 0 (4)",
        "attend_merge: == more: 0",
    ],
    "what is read beyond is another part of the matrix, and not used": [
        "Affine::codes: < more: BITS (2)",
        "experts_up: no addend: 1",
        "experts_sum: no addend: 1",
    ],
    "no multiple of the step is between": ["attend: < less: width (2)", "attend: < less: 8"],
}
EQUIVALENT = frozenset(name for names in REASONS.values() for name in names)


@dataclass
class Switch:
    """The changes of one source, none or one of which is on."""

    names: tuple[str, ...]
    number: ctypes.c_uint
    reached: ctypes.Array[ctypes.c_ubyte]

    def come_by(self) -> set[str]:
        return {name for number, name in enumerate(self.names, 1) if self.reached[number]}


class ChangedMps(FakeMps):
    """Compiles every source with its changes; ``switches`` are those of the sources so far."""

    switches: ClassVar[dict[str, Switch]] = {}

    def compile(self, source: str) -> Library:
        changed = mutated(source)
        library = Library(changed.text, self._submit, strict=False)
        if source not in self.switches:
            number = ctypes.c_uint.in_dll(library.binary, "mutant")
            reached = (ctypes.c_ubyte * 10000).in_dll(library.binary, "reached")
            self.switches[source] = Switch(changed.names, number, reached)
        return library


@dataclass
class Score:
    """Names of changes. ``unreached``: no check comes by them."""

    noticed: list[str] = field(default_factory=list)
    survived: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lost = len(self.survived) + len(self.unreached)
        return f"{len(self.noticed)} of {len(self.noticed) + lost} changes noticed; not: {lost}"


@dataclass
class Reach:
    """Which checks come by a change of a source, the quickest first."""

    text: str
    number: int
    checks: list[Check]


def checks() -> dict[str, Check]:
    """``CHECKS`` of all test modules here: each raises if kernels are wrong."""
    found: dict[str, Check] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if "\nCHECKS" in path.read_text():
            found |= importlib.import_module(f"tests.metal.{path.stem}").CHECKS
    return found


def reaches(checks: dict[str, Check]) -> dict[str, list[Reach]]:
    """For each change the sources that have it, with the checks that come by it there. All checks pass."""
    for part in PARTS:
        ChangedMps().compile(source(part))  # so that no check is slow for it
    taken: list[tuple[float, Check, dict[str, set[str]]]] = []
    for check in checks.values():
        for switch in ChangedMps.switches.values():
            ctypes.memset(switch.reached, 0, len(switch.reached))
        start = time.perf_counter()
        check(ChangedMps())
        come_by = {text: switch.come_by() for text, switch in ChangedMps.switches.items()}
        taken.append((time.perf_counter() - start, check, come_by))
    taken.sort(key=lambda t: t[0])
    found: dict[str, list[Reach]] = {}
    for text, switch in ChangedMps.switches.items():
        for number, name in enumerate(switch.names, 1):
            come = [check for _, check, come_by in taken if name in come_by.get(text, ())]
            found.setdefault(name, []).append(Reach(text, number, come))
    return found


def is_noticed(reach: Reach) -> bool:
    switch = ChangedMps.switches[reach.text]
    switch.number.value = reach.number
    try:
        for check in reach.checks:
            try:
                check(ChangedMps())
            except Exception:  # whatever a wrong number leads to
                return True
        return False
    finally:
        switch.number.value = 0


def score(found: dict[str, list[Reach]], chosen: Callable[[str], bool] = lambda name: True) -> Score:
    result = Score()
    with time_limit(SECONDS):
        for name, where in found.items():
            if not chosen(name) or name in EQUIVALENT:
                continue
            if not any(reach.checks for reach in where):
                result.unreached.append(name)
            elif any(map(is_noticed, where)):
                result.noticed.append(name)
            else:
                result.survived.append(name)
    return result


def main(words: list[str]) -> int:
    start = time.perf_counter()
    result = score(reaches(checks()), lambda name: not words or any(word in name for word in words))
    for title, names in (("survived", result.survived), ("no check comes by", result.unreached)):
        for name in names:
            sys.stdout.write(f"{title}: {name}\n")
    sys.stdout.write(f"{result}; {time.perf_counter() - start:.0f} s\n")
    return 1 if result.survived or result.unreached else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
