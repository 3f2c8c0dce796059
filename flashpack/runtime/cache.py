"""Which experts stay in the arena: least recently used, over all layers. No I/O, no clock."""

from __future__ import annotations

from collections import OrderedDict

Key = tuple[int, int]
"""(layer, expert)"""


class LruCache:
    """Slots of one size and the experts in them. Pinned experts are in use and never evicted."""

    def __init__(self, slots: list[int]) -> None:
        self._free = slots[::-1]
        self._slots: OrderedDict[Key, int] = OrderedDict()
        self._pins: dict[Key, int] = {}

    def get(self, key: Key) -> int | None:
        """The slot of ``key``, now the most recently used and pinned; None if it is not here."""
        slot = self._slots.get(key)
        if slot is not None:
            self._slots.move_to_end(key)
            self._pins[key] = self._pins.get(key, 0) + 1
        return slot

    def contains(self, key: Key) -> bool:
        """Whether ``key`` has a slot; changes nothing."""
        return key in self._slots

    def claim(self, key: Key) -> int | None:
        """A slot for ``key``, pinned: a free one, or that of the least recently used; None if all are pinned."""
        if self._free:
            slot = self._free.pop()
        else:
            victim = next((k for k in self._slots if k not in self._pins), None)
            if victim is None:
                return None
            slot = self._slots.pop(victim)
        self._slots[key] = slot
        self._pins[key] = 1
        return slot

    def release(self, key: Key) -> None:
        """One user of ``key`` is done."""
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]

    def forget(self, key: Key) -> None:
        """Drop ``key`` (its read failed); it must be pinned by the caller alone."""
        del self._pins[key]
        self._free.append(self._slots.pop(key))
