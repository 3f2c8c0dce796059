"""What the drive alone needs for the reads of decoding: the same bursts, layer by layer, and no computing."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable, Sequence

from flashpack.formats import Pack
from flashpack.formats.files import pread_into
from flashpack.kernels.cpu.arena import HostArena
from flashpack.runtime.cache import Key
from flashpack.runtime.drive import open_file
from flashpack.runtime.reads import READ_THREADS, Read, ReadPool

Burst = Sequence[Key]
"""Layer and expert of the records that are read at once: a layer waits for all of them."""


class Replay:
    """Reads records of a pack as the expert store does, with as many reads in flight, into memory nobody looks at.

    ``direct``: past the page cache.
    """

    def __init__(self, pack: Pack, direct: bool, readers: int = READ_THREADS) -> None:
        self._shards = {layer.index: pack.open_shard(layer) for layer in pack.manifest.layers}
        self._fds: dict[int, int] = {}
        for layer in pack.manifest.layers:
            self._fds[layer.index] = open_file(pack.folder, layer.path, direct)
        self._readers = readers
        self._pool = ReadPool(readers)
        stride = largest_record(pack)
        # The store's own kind of memory: where a buffer's pages are scattered, direct reads are half as fast, and a
        # limit taken with them is none.
        self._arena = HostArena(readers * stride)
        self._buffers = [self._arena.room(i * stride, stride) for i in range(readers)]

    def size(self, bursts: Iterable[Burst]) -> int:
        """Stored bytes of all records of ``bursts``."""
        return sum(self._shards[layer].extent(expert)[1] for burst in bursts for layer, expert in burst)

    def run(self, bursts: Iterable[Burst]) -> list[float]:
        """Seconds to read each of ``bursts``, after all of the one before has arrived. Raises ``OSError``."""
        seconds = []
        for burst in bursts:
            begun = time.perf_counter()
            for i, key in enumerate(burst):
                self._pool.start(Read(key, i % self._readers, 0, True, False), self._read)
            errors = [self._pool.landed.get().error for _ in burst]
            seconds.append(time.perf_counter() - begun)
            for error in filter(None, errors):
                raise error
        return seconds

    def close(self) -> None:
        """Stop reading and close the files; harmless if repeated."""
        self._pool.close()
        for shard in self._shards.values():
            shard.close()
        for fd in self._fds.values():
            os.close(fd)
        self._fds, self._shards = {}, {}

    def _read(self, read: Read) -> None:
        layer, expert = read.key
        offset, size = self._shards[layer].extent(expert)
        pread_into(self._fds[layer], self._buffers[read.slot][:size], offset, str(self._shards[layer].path))


def largest_record(pack: Pack) -> int:
    """Bytes of the largest record, as it is in memory."""
    return max(kind.stride for kind in pack.manifest.record_kinds)


def replay_bytes(pack: Pack, readers: int = READ_THREADS) -> int:
    """Memory that a ``Replay`` takes."""
    return readers * largest_record(pack)


def bursts_like(pack: Pack, reads: Iterable[dict[int, int]]) -> list[list[Key]]:
    """Bursts of as many records per layer as ``reads`` says, one dictionary {layer: records} a token. Of which experts
    is drawn anew each time: what was read lately may be in some cache of the drive."""
    counts = {layer.index: layer.experts for layer in pack.manifest.layers}
    return [
        [(layer, e) for e in random.sample(range(counts[layer]), min(count, counts[layer]))]
        for token in reads
        for layer, count in sorted(token.items())
        if count
    ]
