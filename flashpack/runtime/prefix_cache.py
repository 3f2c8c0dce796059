"""Texts that were read before, with the state after them: a text that begins like one of them goes on from there.

Attention's keys and values can be cut to any shorter length. A recurrent state, or a sliding window that has moved on,
cannot: of these a copy is kept at marked places, where another text may go on in another way (a chat template writes
the next turn without the thoughts of the last answer).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from flashpack.runtime.kv import tensors
from flashpack.runtime.lean.cache import RoomyLayer


@dataclass(eq=False)
class Prefix:
    """``cache`` holds the state after ``ids``; ``marks``: by place, copies of the layers that cannot be cut."""

    ids: list[int] = field(default_factory=list)
    cache: Any = None
    marks: dict[int, dict[int, Any]] = field(default_factory=dict)

    def usable(self, ids: list[int]) -> int:
        """How many of ``ids`` need not be read again; at least the last one does, for its logits."""
        common = 0
        for mine, other in zip(self.ids, ids[:-1], strict=False):
            if mine != other:
                break
            common += 1
        if common == len(self.ids) or (self._whole and not self._uncut()):
            return common
        return max((place for place in self.marks if place <= common), default=0)

    def rewind(self, place: int) -> None:
        """Back to the state after ``place`` tokens, which ``usable`` found."""
        if place == len(self.ids):
            return
        if place:
            uncut = self._uncut()
            for i, layer in enumerate(self.cache.layers):
                if i in uncut:
                    self.cache.layers[i] = copy.deepcopy(self.marks[place][i])
                else:
                    _cut(layer, place)
        else:
            self.cache = None
        self.ids = self.ids[:place]
        self.marks = {p: kept for p, kept in self.marks.items() if p <= place}

    def recover(self) -> None:
        """After an error in the middle of a pass, when some layers have gone further than others."""
        if self.cache is None:
            return
        place = max(self.marks, default=0) if not self._whole or self._uncut() else len(self.ids)
        self.ids = [*self.ids, -1]  # not what the cache holds
        self.rewind(place)

    def mark(self, room: int) -> None:
        """Be able to ``rewind`` to here, if that takes at most ``room`` bytes; older marks give way."""
        uncut = self._uncut() if self._whole else {}
        size = _size(list(uncut.values()))
        if not uncut or size > room:
            return
        while self.marks and self.marked_bytes() + size > room:
            del self.marks[min(self.marks)]
        self.marks[len(self.ids)] = copy.deepcopy(uncut)

    def copied(self, place: int) -> Prefix:
        """Another one, after the first ``place`` tokens, fewer than these."""
        made = Prefix(self.ids[:place], copy.copy(self.cache))
        made.marks = copy.deepcopy({p: kept for p, kept in self.marks.items() if p <= place})
        uncut = self._uncut()
        made.cache.layers = [
            copy.deepcopy(self.marks[place][i]) if i in uncut else _small(layer, place)
            for i, layer in enumerate(self.cache.layers)
        ]
        return made

    def compact(self) -> None:
        """Give back the room for more tokens."""
        for i, layer in enumerate(self.cache.layers if self._whole else []):
            if type(layer) is RoomyLayer:
                self.cache.layers[i] = _small(layer, len(self.ids))

    def marked_bytes(self) -> int:
        return _size(list(self.marks.values()))

    def nbytes(self) -> int:
        """Memory it takes."""
        return _size(self.cache) + self.marked_bytes()

    @property
    def _whole(self) -> bool:
        """Whether the cache is of the library's general kind, all of whose state is in its layers."""
        return type(self.cache) is DynamicCache

    def _uncut(self) -> dict[int, Any]:
        """The layers that cannot be cut, by their place in the cache."""
        return {i: one for i, one in enumerate(self.cache.layers) if type(one) not in (DynamicLayer, RoomyLayer)}


class PrefixCache:
    """What was read before; those not in use take at most ``limit`` bytes, and so do the marks of the one in use.

    That one is taken out with ``take`` and given back with ``give``. Not for several threads at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: list[Prefix] = []  # the least recently used first

    def take(self, ids: list[int]) -> Prefix:
        """The one that has most of the beginning of ``ids``, after exactly this; an empty one if there is none."""
        best, place = Prefix(), 0
        for one in reversed(self._kept):
            if (found := one.usable(ids)) > place:
                best, place = one, found
        if place < len(best.ids) and self._bytes() <= self.limit:
            best = best.copied(place)  # the longer text may go on, too
        elif place:
            self._kept.remove(best)
            best.rewind(place)
        self._trim(self.limit - best.marked_bytes())
        return best

    def give(self, prefix: Prefix) -> None:
        """Back again, with what it holds by now."""
        if prefix.cache is not None and prefix.ids:
            self._kept.append(prefix)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()

    def _bytes(self) -> int:
        return sum(one.nbytes() for one in self._kept)

    def _trim(self, room: int) -> None:
        for one in self._kept:
            one.compact()
        while self._kept and self._bytes() > room:
            del self._kept[0]


def _cut(layer: Any, place: int) -> None:
    if type(layer) is RoomyLayer:
        layer.cut(place)
    elif layer.is_initialized and layer.keys.shape[-2] > place:
        layer.crop(place - layer.keys.shape[-2])


def _small(layer: Any, place: int) -> Any:
    """A layer of its own with the first ``place`` tokens of another that can be cut, and no room for more."""
    small: Any = DynamicLayer()  # type: ignore[no-untyped-call]
    if layer.is_initialized:
        small.lazy_initialization(layer.keys, layer.values)
        small.keys, small.values = layer.keys[..., :place, :].clone(), layer.values[..., :place, :].clone()
    return small


def _size(value: Any) -> int:
    return sum(t.nbytes for t in tensors(value))
