"""Memory of records."""

from __future__ import annotations

import gc
import mmap
import sys

import pytest

from flashpack.kernels.cpu.arena import HostArena
from flashpack.runtime.memory import usage

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is in memory now")
def test_memory_is_taken_where_it_is_written_to_and_given_back() -> None:
    before = usage().anonymous
    arena = HostArena(64 * MIB + 5)
    assert arena.tensor.shape == (64 * MIB + 5,)
    assert arena.tensor.data_ptr() % mmap.PAGESIZE == 0
    assert usage().anonymous - before < 8 * MIB
    room = arena.room(16 * MIB, 32 * MIB)
    room[:] = b"a" * len(room)
    assert arena.tensor[16 * MIB - 1 : 16 * MIB + 1].tolist() == [0, 97]
    assert 32 * MIB <= usage().anonymous - before < 40 * MIB
    del room, arena
    gc.collect()
    assert usage().anonymous - before < 8 * MIB
