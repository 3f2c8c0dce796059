"""Which experts stay in the arena: those whose next use is expected soonest, over all layers. No I/O, no clock.

The policy. For every expert the cache keeps the share of steps (tokens, or chunks of a prompt) that used it, as
averages with several half-lives, and mixes them into p, the chance that the next step uses it: short half-lives
follow the text, long ones keep what is always hot, and the mixture did as well on every text tried as the best single
half-life, or better. With chance p an expert waits 1/p steps on average; to this comes the part of a step until its
layer is next. The expert with the longest expected wait is evicted. Among equally hot ones it is of the layer just
done, so that an arena smaller than one step's demand keeps some experts until they are asked for again; least recently
used keeps none of them.

Decisions depend on the sequence of calls alone. Measurements: docs/experiments/cache.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Key = tuple[int, int]
"""(layer, expert)"""

Floats: TypeAlias = npt.NDArray[np.float64]

HALF_LIVES = (2, 8, 32, 128, 512)
"""In steps."""
MIXTURE = (0.05, 0.1, 0.2, 0.25, 0.4)
"""Weights of the averages in p, chosen on half of the traces. They sum to 1, so that p stays a chance."""
LEAST_CHANCE = 1e-6
"""An expert that was never used waits 1 / this, not for ever."""
USUAL_STEP = 1.01
"""How fast the usual number of experts of a layer's request follows what is asked for: 1 % a request, up or down."""
BATCH_LEAST, BATCH_SHARE = 8, 64
"""Victims are looked up so many at a time, or one in so many slots if that is more."""


class ExpertCache:
    """Slots of one size and the experts in them. Pinned experts are in use and never evicted.

    ``get`` counts as a use, hit or miss. The experts of one request of a layer are asked for one after the other,
    each once; a step ends when the next layer asked for is not a later one. Not for several threads at once.
    """

    def __init__(self, slots: list[int]) -> None:
        self._free = slots[::-1]
        self._slots: dict[Key, int] = {}
        self._pins: dict[Key, int] = {}
        self._layer = -1
        self._request: dict[Key, None] = {}  # what was asked for in this layer at this step,
        self._noted = 0  # the first so many of which are in _uses or in the rates
        self._uses: list[Key] = []  # uses that the rates do not have yet
        self._usual = 0.0
        self._victims: dict[Key, None] = {}  # evicted next, the first first
        self._batch = max(BATCH_LEAST, len(slots) // BATCH_SHARE)
        self._decay = 0.5 ** (1 / np.array(HALF_LIVES, np.float64))[:, None]
        self._mixture = np.array(MIXTURE, np.float64)
        # Rows are layers in the order in which they were met, columns experts; both grow as keys appear.
        self._rows: dict[int, int] = {}
        self._width = 0
        self._rates: Floats = np.zeros((len(HALF_LIVES), 0))
        self._wait: Floats = np.zeros(0)  # 1 / p, in steps
        self._absent: Floats = np.zeros(0)  # 0 for experts that have a slot, -inf for others
        self._turns: Floats = np.zeros((0, 0))  # [row now, row]: the part of a step until that layer is next, 1 for now

    def get(self, key: Key) -> int | None:
        """The slot of ``key``, now pinned; None if it is not here. Either way the key counts as used."""
        if key[0] != self._layer or key in self._request:
            self._begin_request(key[0])
        self._request[key] = None
        slot = self._slots.get(key)
        if slot is None:
            self._index(key)
        else:
            self._pins[key] = self._pins.get(key, 0) + 1
            if key in self._victims:
                del self._victims[key]
        return slot

    def contains(self, key: Key) -> bool:
        """Whether ``key`` has a slot; nothing counts as used."""
        return key in self._slots

    def claim(self, key: Key, urgent: bool = True) -> int | None:
        """A slot for ``key``, which must have none, pinned: a free one, or that of the expert with the longest wait.

        None if all are pinned. Not ``urgent`` (a guess): None also if no expert here has a longer wait than ``key``.
        """
        index = self._index(key)
        if self._free:
            slot = self._free.pop()
        else:
            victim = self._victim()
            if victim is None or (not urgent and self._expected(victim) <= self._expected(key)):
                return None
            del self._victims[victim]
            slot = self._slots.pop(victim)
            self._absent[self._index(victim)] = -np.inf
        self._slots[key] = slot
        self._pins[key] = 1
        self._absent[index] = 0.0
        return slot

    def release(self, key: Key) -> None:
        """One user of ``key`` is done."""
        pins = self._pins.pop(key) - 1
        if pins:
            self._pins[key] = pins

    def forget(self, key: Key) -> None:
        """Drop ``key`` (its read failed); it must be pinned by the caller alone."""
        del self._pins[key]
        self._free.append(self._slots.pop(key))
        self._absent[self._index(key)] = -np.inf

    def ranking(self) -> list[tuple[Key, float]]:
        """Every expert used so far, here or not, with the chance that the next step uses it: hottest first."""
        self._note_uses()
        chances = self._chances(self._rates)
        found = [
            ((layer, e), float(chances[row * self._width + e]))
            for layer, row in self._rows.items()
            for e in range(self._width)
            if chances[row * self._width + e] > 0
        ]
        return sorted(found, key=lambda x: (-x[1], x[0]))

    def seed(self, scores: Mapping[Key, float]) -> None:
        """Begin with these chances (as ``ranking`` gives them), in place of what is known about their keys."""
        for key, score in scores.items():
            if not 0 <= score <= 1:
                raise ValueError(f"layer {key[0]}, expert {key[1]}: the score {score} is not a chance between 0 and 1")
        self._note_uses()
        for key, score in scores.items():
            index = self._index(key)
            self._rates[:, index] = score
            self._wait[index] = 1 / max(score, LEAST_CHANCE)
        self._victims.clear()

    def _begin_request(self, layer: int) -> None:
        count = len(self._request)
        if count > self._usual:
            self._usual = min(count, self._usual * USUAL_STEP) if self._usual else count
        else:
            self._usual = max(count, self._usual / USUAL_STEP)
        if count > self._noted:
            self._note_request()
        if layer <= self._layer:
            self._note_uses()
            self._rates *= self._decay
            self._wait = 1 / np.maximum(self._chances(self._rates), LEAST_CHANCE)
        self._layer = layer
        self._request = {}
        self._noted = 0

    def _note_request(self) -> None:
        """Count what was asked for since the last call as used."""
        count = len(self._request)
        fresh = list(self._request)[self._noted :] if self._noted else self._request
        self._noted = count
        # A chunk of a prompt uses most experts, each once. Counted in full, its cold experts would seem as hot as those
        # that decoding keeps using; so a request adds no more than the usual one does.
        if count > 2 * self._usual > 0:
            self._add(list(fresh), self._usual / count)
        else:
            self._uses.extend(fresh)

    def _note_uses(self) -> None:
        if len(self._request) > self._noted:
            self._note_request()
        if self._uses:
            self._add(self._uses, 1.0)
            self._uses = []

    def _add(self, keys: list[Key], weight: float) -> None:
        rows, width = self._rows, self._width
        index = np.array([rows[layer] * width + expert for layer, expert in keys])
        rates = self._rates[:, index] + (1 - self._decay) * weight
        self._rates[:, index] = rates
        self._wait[index] = 1 / np.maximum(self._chances(rates), LEAST_CHANCE)

    def _chances(self, rates: Floats) -> Floats:
        # Not a BLAS product: its threads would wake up for this, and its sums differ between machines.
        chances: Floats = np.einsum("j,jk->k", self._mixture, rates)
        return chances

    def _victim(self) -> Key | None:
        """The expert to evict next; None if all are pinned."""
        for key in self._victims:
            if key not in self._pins:
                return key
        count = min(self._batch, len(self._slots) - len(self._pins))
        if count <= 0:
            return None
        self._note_uses()
        width = self._width
        waits = (self._wait.reshape(-1, width) + self._turn()[:, None]).reshape(-1)
        waits += self._absent
        for key in self._pins:
            waits[self._index(key)] = -np.inf
        worst = np.argpartition(waits, len(waits) - count)[len(waits) - count :]
        worst = worst[np.lexsort((worst, -waits[worst]))]
        layers = list(self._rows)
        self._victims = {(layers[i // width], i % width): None for i in worst.tolist()}
        return next(iter(self._victims))

    def _turn(self) -> Floats:
        """For each row the part of a step until its layer is next."""
        if self._layer not in self._rows:
            return np.zeros(len(self._rows))
        turn: Floats = self._turns[self._rows[self._layer]]
        return turn

    def _expected(self, key: Key) -> float:
        """Expected wait for the next use of ``key``, in steps."""
        return float(self._wait[self._index(key)] + self._turn()[self._rows[key[0]]])

    def _index(self, key: Key) -> int:
        """Where ``key`` is in the arrays, which grow to hold it."""
        layer, expert = key
        row = self._rows.get(layer)
        if row is None or expert >= self._width:
            row = self._grow(layer, expert)
        return row * self._width + expert

    def _grow(self, layer: int, expert: int) -> int:
        rows, width = len(self._rows), self._width
        row = self._rows.setdefault(layer, rows)
        self._width = max(width, expert + 1)
        added = ((0, len(self._rows) - rows), (0, self._width - width))

        def grown(old: Floats, fill: float) -> Floats:
            return np.pad(old.reshape(rows, width), added, constant_values=fill).reshape(-1)

        self._rates = np.stack([grown(rates, 0.0) for rates in self._rates])
        self._wait = grown(self._wait, 1 / LEAST_CHANCE)
        self._absent = grown(self._absent, -np.inf)
        layers = np.array(list(self._rows))
        rank = np.argsort(np.argsort(layers))
        self._turns = ((rank[None, :] - rank[:, None] - 1) % len(layers) + 1) / len(layers)
        return row
