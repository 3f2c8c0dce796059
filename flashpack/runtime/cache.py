"""Which experts stay in the arena: those whose next use is expected soonest, over all layers. No I/O, no clock.

The policy. For every expert the cache keeps the share of steps (tokens, or chunks of a prompt) that used it, as
averages with several half-lives, and mixes them into p, the chance that the next step uses it: short half-lives
follow the text, long ones keep what is always hot. The mixture is fitted as the text goes (least squares: what would
have forecast the uses of the last steps best), for texts differ in what is worth remembering. With chance p an expert
waits 1/p steps on average; to this comes the part of a step until its layer is next. The expert with the longest
expected wait is evicted. Among equally hot ones it is of the layer just done, so that an arena smaller than one step's
demand keeps some experts until they are asked for again; least recently used keeps none of them.

Decisions depend on the sequence of calls alone. Measurements: docs/experiments/cache.md.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Key = tuple[int, int]
"""(layer, expert)"""

Floats: TypeAlias = npt.NDArray[np.float64]

HALF_LIVES = (2, 8, 32, 128, 512)
"""In steps."""
MIXTURE = (0.05, 0.1, 0.2, 0.25, 0.4)
"""Weights of the averages in p until they are fitted, chosen on half of the traces. Their sum is 1: p is a chance."""
FIT_EVERY, FIT_AFTER, FIT_HALF_LIFE, RIDGE = 4, 64, 512, 1e-3
"""Steps between fits, before the first one, and in which what a fit is made of loses half its weight; the ridge keeps
averages that say the same from getting huge weights of opposite sign."""
LEAST_CHANCE = 1e-4
"""No expert waits longer than 1 / this, used or not."""
USUAL_STEP = 1.01
"""How fast the usual number of experts of a layer's request follows what is asked for: 1 % a request, up or down."""
LISTED = 16
"""Of each layer the longest waits are listed, so many; a layer of which all these are evicted is listed whole."""
_REST: Key = (-1, -1)
"""Stands in a list for the experts of the layer that are not listed: none of them waits longer."""


class ExpertCache:
    """Slots of one size and the experts in them. Pinned experts are in use and never evicted.

    ``get`` counts as a use, hit or miss. The experts of one request of a layer are asked for one after the other,
    each once; a step ends when the next layer asked for is not a later one. Not for several threads at once.
    """

    def __init__(self, slots: list[int]) -> None:
        self._free = slots[::-1]
        self._slots: dict[Key, int] = {}
        self._pins: dict[Key, int] = {}
        # What is known up to this step. Rows are layers in the order in which they were met, columns experts; the
        # arrays are flat and grow as keys appear.
        self._rows: dict[int, int] = {}
        self._width = 0
        self._decay = 0.5 ** (1 / np.array(HALF_LIVES, np.float64))[:, None]
        self._mixture = np.array(MIXTURE, np.float64)
        self._gain = float(self._mixture @ (1 - self._decay[:, 0]))  # what one use adds to p
        self._products: Floats = np.zeros((len(HALF_LIVES), len(HALF_LIVES)))  # of rates, over experts and steps
        self._targets: Floats = np.zeros(len(HALF_LIVES))  # of rates and uses
        self._steps = 0
        self._chunk = False  # this step is one of a prompt
        self._rates: Floats = np.zeros((len(HALF_LIVES), 0))
        self._chance: Floats = np.zeros(0)  # p, at least LEAST_CHANCE
        self._absent: Floats = np.zeros(0)  # 0 for experts that have a slot, -inf for others
        # This step.
        self._layer = -1
        self._request: dict[Key, None] = {}
        self._usual = 0.0
        self._bump = 0.0  # what a use in this request adds to p, 0 until all of it is known
        self._uses: list[Key] = []  # uses in requests before this one that the rates do not have yet
        self._used: dict[Key, float] = {}  # all of this step, with the wait from then on, 0 while pinned
        self._first_turns: list[float] = []  # by row: when in a step it is the layer's turn
        self._turns: list[float] = []  # by row: when, in steps from the first layer of this one, it is next
        # Who is evicted: by row (wait, key), the longest wait last. Entries may be out of date; made when needed.
        self._lists: list[list[tuple[float, Key]]] = []
        self._heads: list[float] = []  # by row: its longest wait + turn
        self._listed = False

    def get(self, key: Key) -> int | None:
        """The slot of ``key``, now pinned; None if it is not here. Either way the key counts as used."""
        self._count(key)
        slot = self._slots.get(key)
        if slot is not None:
            self._pins[key] = self._pins.get(key, 0) + 1
        elif key[0] not in self._rows or key[1] >= self._width:
            self._grow(*key)
        return slot

    def use(self, layer: int, experts: Iterable[int]) -> None:
        """``get`` and ``release`` of all experts of a request, all of which have a slot."""
        keys = [(layer, e) for e in experts]
        for key in keys:
            self._count(key)
        for key in keys:
            if key not in self._pins:
                self._expect(key)

    def contains(self, key: Key) -> bool:
        """Whether ``key`` has a slot; nothing counts as used."""
        return key in self._slots

    def resident(self) -> list[Key]:
        """All that have a slot; any thread may ask."""
        return list(self._slots)  # in one step of the interpreter

    def used(self) -> list[Key]:
        """All that this step has asked for so far; any thread may ask."""
        return list(self._used)

    def claim(self, key: Key, urgent: bool = True) -> int | None:
        """A slot for ``key``, which must have none, pinned: a free one, or that of the expert with the longest wait.

        None if all are pinned. Not ``urgent`` (a guess): None also if no expert here has a longer wait than ``key``.
        """
        if key[0] not in self._rows or key[1] >= self._width:
            self._grow(*key)
        if self._free:
            slot = self._free.pop()
        else:
            victim = self._victim()
            if victim is None or (not urgent and self._expected(victim) <= self._expected(key)):
                return None
            row = self._rows[victim[0]]
            self._unlist(row)
            slot = self._slots.pop(victim)
            self._absent[row * self._width + victim[1]] = -np.inf
        self._slots[key] = slot
        self._pins[key] = 1
        self._absent[self._rows[key[0]] * self._width + key[1]] = 0.0
        return slot

    def release(self, key: Key) -> None:
        """One user of ``key`` is done."""
        pins = self._pins.pop(key) - 1
        if pins:
            self._pins[key] = pins
        else:
            self._expect(key)

    def _count(self, key: Key) -> None:
        """A use."""
        if key[0] != self._layer or key in self._request:
            self._begin_request(key[0])
        self._request[key] = None
        self._used[key] = 0.0

    def _expect(self, key: Key) -> None:
        """Nobody uses ``key`` any more: its next use is expected, and it may be evicted."""
        row = self._rows[key[0]]
        chance = self._chance.item(row * self._width + key[1])
        if key in self._used:
            wait = self._used[key] = 1 / (chance + (self._bump or self._set_bump()))
        else:
            wait = 1 / chance
        if self._listed:
            entries = self._lists[row]
            insort(entries, (wait, key))
            self._heads[row] = entries[-1][0] + self._turns[row]

    def forget(self, key: Key) -> None:
        """Drop ``key`` (its read failed); it must be pinned by the caller alone."""
        del self._pins[key]
        self._free.append(self._slots.pop(key))
        self._absent[self._index(key)] = -np.inf

    def ranking(self) -> list[tuple[Key, float]]:
        """Every expert used so far, here or not, with the chance that the next step uses it: hottest first."""
        before = self._rates
        self._rates = before.copy()
        self._add([*self._uses, *self._request], 1.0)
        chances, known = self._chances().tolist(), (self._rates[-1] > 0).tolist()
        self._rates, width = before, self._width
        found = [
            ((layer, e), chances[row * width + e])
            for layer, row in self._rows.items()
            for e in range(width)
            if known[row * width + e]
        ]
        return sorted(found, key=lambda x: (-x[1], x[0]))

    def seed(self, scores: Mapping[Key, float]) -> None:
        """Begin with these chances (as ``ranking`` gives them), in place of what is known about their keys."""
        for key, score in scores.items():
            if not 0 <= score <= 1:
                raise ValueError(f"layer {key[0]}, expert {key[1]}: the score {score} is not a chance between 0 and 1")
        for key, score in scores.items():
            index = self._index(key)
            self._rates[:, index] = score
            self._chance[index] = max(score, LEAST_CHANCE)
        self._listed = False

    def _begin_request(self, layer: int) -> None:
        if self._request:
            count, weight = len(self._request), self._weight()
            if weight < 1:
                self._chunk = True
                self._add(self._request, weight)
            else:
                self._uses.extend(self._request)
            if count > self._usual:
                self._usual = min(count, self._usual * USUAL_STEP) if self._usual else count
            else:
                self._usual = max(count, self._usual / USUAL_STEP)
        if layer <= self._layer:
            self._begin_step()
        self._layer, self._request, self._bump = layer, {}, 0.0
        row = self._rows.get(layer)
        if row is not None and self._turns[row] < 1:
            self._turns[row] += 1
            self._heads[row] += 1

    def _begin_step(self) -> None:
        if not self._chunk:
            self._fit()
        self._chunk = False
        self._add(self._uses, 1.0)
        self._rates *= self._decay
        self._chance = self._chances()
        self._uses, self._used = [], {}
        self._turns = self._first_turns.copy()
        self._listed = False

    def _fit(self) -> None:
        self._steps += 1
        if self._steps % FIT_EVERY:
            return
        rates, keep = self._rates, 0.5 ** (FIT_EVERY / FIT_HALF_LIFE)
        self._products = self._products * keep + np.einsum("ik,jk->ij", rates, rates)
        self._targets = self._targets * keep + rates[:, self._indices(self._uses)].sum(1)
        if self._steps >= FIT_AFTER:
            ridge = RIDGE * np.diag(np.diag(self._products))
            self._mixture = np.linalg.solve(self._products + ridge, self._targets).astype(np.float64)
            self._gain = max(0.0, float(self._mixture @ (1 - self._decay[:, 0])))

    def _weight(self) -> float:
        """What a use in this request counts.

        A chunk of a prompt uses most experts, each once. Counted in full, its cold experts would seem as hot as those
        that decoding keeps using; so a much larger request than usual adds no more in all than the usual one does.
        """
        count = len(self._request)
        return self._usual / count if count > 2 * self._usual > 0 else 1.0

    def _set_bump(self) -> float:
        self._bump = self._gain * self._weight()
        return self._bump

    def _add(self, keys: Iterable[Key], weight: float) -> None:
        self._rates[:, self._indices(keys)] += (1 - self._decay) * weight

    def _indices(self, keys: Iterable[Key]) -> npt.NDArray[np.intp]:
        rows, width = self._rows, self._width
        return np.array([rows[layer] * width + expert for layer, expert in keys], np.intp)

    def _chances(self) -> Floats:
        # Not a BLAS product: its threads would wake up for this, and its sums differ between machines.
        chances: Floats = np.einsum("j,jk->k", self._mixture, self._rates)
        return np.clip(chances, LEAST_CHANCE, 1.0)

    def _victim(self) -> Key | None:
        """The expert to evict next, the last of its list; None if all are pinned."""
        if not self._listed:
            self._list(0, len(self._rows), min(LISTED, self._width))
            self._listed = True
        heads = self._heads
        while heads and (head := max(heads)) > -np.inf:
            row = heads.index(head)
            wait, key = self._lists[row][-1]
            if key == _REST:
                self._list(row, row + 1, self._width)
            elif key in self._slots and key not in self._pins and self._used.get(key, wait) == wait:
                return key
            else:
                self._unlist(row)
        return None

    def _list(self, first: int, last: int, take: int) -> None:
        """List the ``take`` longest waits of each of these rows."""
        width = self._width
        waits = 1 / self._chance[first * width : last * width]
        waits += self._absent[first * width : last * width]
        for key, wait in self._used.items():
            if wait and key in self._slots and first <= (row := self._rows[key[0]]) < last:
                waits[(row - first) * width + key[1]] = wait
        grid = waits.reshape(-1, width)
        where = np.argpartition(grid, width - take, axis=1)[:, width - take :] if take < width else None
        found = grid if where is None else np.take_along_axis(grid, where, 1)
        columns = np.broadcast_to(np.arange(width), grid.shape) if where is None else where
        for layer, row in self._rows.items():
            if first <= row < last:
                pairs = zip(found[row - first].tolist(), columns[row - first].tolist(), strict=True)
                entries = [(wait, (layer, e)) for wait, e in pairs if wait > 0]
                entries.sort()
                if len(entries) == take < width:
                    entries.insert(0, (entries[0][0], _REST))
                self._lists[row] = entries
                self._heads[row] = entries[-1][0] + self._turns[row] if entries else -np.inf

    def _unlist(self, row: int) -> None:
        """Take the last of a list away."""
        entries = self._lists[row]
        del entries[-1]
        self._heads[row] = entries[-1][0] + self._turns[row] if entries else -np.inf

    def _expected(self, key: Key) -> float:
        """When the next use of ``key`` is expected, in steps from the first layer of this one."""
        wait = self._used.get(key, 0.0)
        if not wait:
            chance = self._chance.item(self._index(key)) + (self._gain * self._weight() if key in self._used else 0.0)
            wait = 1 / chance
        return wait + self._turns[self._rows[key[0]]]

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
        self._chance = grown(self._chance, LEAST_CHANCE)
        self._absent = grown(self._absent, -np.inf)
        if len(self._rows) > rows:
            self._lists.append([])
            self._heads.append(-np.inf)
            passed = [turn >= 1 for turn in self._turns] + [layer == self._layer]
            self._first_turns = [sum(other < x for other in self._rows) / len(self._rows) for x in self._rows]
            self._turns = [turn + was for turn, was in zip(self._first_turns, passed, strict=True)]
        self._listed = False
        return row
