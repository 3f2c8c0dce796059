"""Which records a run read, layer by layer, and reading the same ones again without computing: the drive's limit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from common import drop_cache

from flashpack.formats import Pack
from flashpack.kernels import RecordView
from flashpack.kernels.cpu.arena import HostArena
from flashpack.runtime.reads import READ_THREADS, Read, ReadPool
from flashpack.runtime.records import Records
from flashpack.runtime.store import ExpertStore

Key = tuple[int, int]
"""Layer and expert."""

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


class Replay:
    """Reads records of a pack in bursts as the store does, with as many reads in flight, into memory nobody looks at.

    ``direct``: past the page cache. If not, the pack is dropped from it before every run.
    """

    BUFFER_COUNT = READ_THREADS

    def __init__(self, folder: Path, direct: bool) -> None:
        pack = Pack(folder)
        self._folder = folder
        self._direct = direct
        shards = {layer.index: pack.open_shard(layer) for layer in pack.manifest.layers}
        flags = os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if direct else 0)
        self._fds = {layer: os.open(shard.path, flags) for layer, shard in shards.items()}
        self._shards = shards
        # The store's own kind of memory: where a buffer's pages are scattered, direct reads are half as fast, and a
        # limit taken with them is none.
        stride = largest_record(pack)
        self._arena = HostArena(self.BUFFER_COUNT * stride)
        self._buffers = [self._arena.room(i * stride, stride) for i in range(self.BUFFER_COUNT)]

    def size(self, bursts: Bursts) -> int:
        """Bytes of all records of ``bursts``."""
        return sum(self._shards[layer].extent(expert)[1] for burst in bursts for layer, expert in burst)

    def run(self, bursts: Bursts) -> float:
        """Seconds to read ``bursts``, each after all of the one before has arrived."""
        if not self._direct:
            drop_cache(self._folder)
        pool = ReadPool()
        begun = time.perf_counter()
        for burst in bursts:
            for i, key in enumerate(burst):
                pool.start(Read(key, i % self.BUFFER_COUNT, 0, True, False), self._read)
            for _ in burst:
                error = pool.landed.get().error
                if error is not None:
                    raise error
        seconds = time.perf_counter() - begun
        pool.close()
        return seconds

    def _read(self, read: Read) -> None:
        layer, expert = read.key
        offset, size = self._shards[layer].extent(expert)
        got = os.preadv(self._fds[layer], [self._buffers[read.slot][:size]], offset)
        if got != size:
            raise OSError(f"layer {layer}, expert {expert}: {got} bytes of {size}")


def largest_record(pack: Pack) -> int:
    return max(kind.stride for kind in pack.manifest.record_kinds)


def replay_bytes(folder: Path) -> int:
    """Memory that a ``Replay`` takes."""
    return Replay.BUFFER_COUNT * largest_record(Pack(folder))
