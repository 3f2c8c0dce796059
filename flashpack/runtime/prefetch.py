"""Reading ahead: what was guessed, whether it was asked for, and whether guessing pays. No I/O, no clock.

Guesses that are right still lose where the drive is busy anyway, and what decides is the time of a token. So the gate
tries: some steps with guesses, some without, in turns, and stays with what was faster until it tries again.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection

from flashpack.runtime.cache import Key

TRIAL_STEPS = 8
"""Steps with, and as many without, per turn of a trial."""

TRIAL_TURNS = 3

FIRST_PAUSE = 256
"""Steps between a trial and the next; twice as many after every trial with the same outcome, up to ``LAST_PAUSE``."""

LAST_PAUSE = 4096

_PAYS = 0.98  # of the time without guesses, at the most
_MIN_JUDGED = 32
_MIN_USEFUL = 1 / 3


class Gate:
    """Whether to guess at this step. ``step`` is told of every step's time; the first trial begins at once."""

    def __init__(self) -> None:
        self._trial: list[list[float]] | None = [[], []]
        self._count = 0
        self._pause = FIRST_PAUSE
        self._paid: bool | None = None
        self.on = False

    def step(self, seconds: float) -> None:
        """A step, with guesses if ``on``, took so long; sets ``on`` for the next."""
        self._count += 1
        if self._trial is None:
            if self._count >= self._pause:
                self._trial, self._count, self.on = [[], []], 0, False
            return
        self._trial[self.on].append(seconds)
        if self._count == 2 * TRIAL_STEPS * TRIAL_TURNS:
            without, with_guesses = map(statistics.median, self._trial)
            self._decide(with_guesses < _PAYS * without)
        else:
            self.on = self._count // TRIAL_STEPS % 2 == 1

    def wasteful(self) -> None:
        """Most guesses are wrong: none until the next trial."""
        self._decide(False)

    def _decide(self, pays: bool) -> None:
        self._pause = min(LAST_PAUSE, 2 * self._pause) if pays == self._paid else FIRST_PAUSE
        self._paid = self.on = pays
        self._trial, self._count = None, 0


class Guesses:
    """Records read ahead that their layer has not judged yet. A guess is right if the layer's next request has it."""

    def __init__(self) -> None:
        self.gate = Gate()
        self._open: dict[int, set[Key]] = {}
        self._useful = 0
        self._judged = 0

    def add(self, key: Key) -> None:
        """``key`` is being read ahead."""
        self._open.setdefault(key[0], set()).add(key)

    def __contains__(self, key: Key) -> bool:
        return key in self._open.get(key[0], ())

    def discard(self, key: Key) -> None:
        """``key`` was not read after all."""
        self._open.get(key[0], set()).discard(key)

    def judge(self, layer: int, asked: Collection[int]) -> tuple[set[Key], set[Key]]:
        """The layer asks: its guesses that were right, and those that were wrong. They are no guesses any more."""
        open_ = self._open.pop(layer, set())
        right = {key for key in open_ if key[1] in asked}
        self._useful += len(right)
        self._judged += len(open_)
        if self._judged >= _MIN_JUDGED:
            if self.gate.on and self._useful < _MIN_USEFUL * self._judged:
                self.gate.wasteful()
            self._useful = self._judged = 0
        return right, open_ - right

    def clear(self) -> list[Key]:
        """Every guess that was not judged; none is a guess any more."""
        keys = [key for keys in self._open.values() for key in keys]
        self._open.clear()
        return keys
