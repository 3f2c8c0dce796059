"""Which records a run read, layer by layer; ``flashpack.performance.replay`` reads the same ones again."""

from __future__ import annotations

from collections.abc import Iterator

from flashpack.kernels import RecordView
from flashpack.runtime.cache import Key
from flashpack.runtime.records import Records
from flashpack.runtime.store import ExpertStore

Bursts = list[list[Key]]
"""The records that were read for each request of a layer, in the order in which reads began."""


class ReadLog:
    """Notes what all expert stores of this process read from now on. What is read ahead belongs to the layer that it is
    read for; what was never asked for, to the next request of that layer."""

    def __init__(self) -> None:
        self._bursts: Bursts = []
        self._ahead: dict[int, list[Key]] = {}
        self._asked = -1
        batches, read_into = ExpertStore.batches, Records.read_into

        def noted_batches(store: ExpertStore, layer: int, experts: list[int]) -> Iterator[list[tuple[int, RecordView]]]:
            self._asked = layer
            self._bursts.append(self._ahead.pop(layer, []))
            return batches(store, layer, experts)

        def noted_read(records: Records, key: Key, record: memoryview) -> None:
            if self._bursts and key[0] == self._asked:
                self._bursts[-1].append(key)
            else:
                self._ahead.setdefault(key[0], []).append(key)
            read_into(records, key, record)

        ExpertStore.batches = noted_batches  # type: ignore[method-assign, assignment]
        Records.read_into = noted_read  # type: ignore[method-assign, assignment]

    def take(self) -> Bursts:
        """What was noted since the last time, without requests that needed no read."""
        bursts, self._bursts = self._bursts, []
        return [burst for burst in bursts if burst]
