"""Tests of Metal kernels notice mistakes in them: a part of what ``python -m tests.metal.mutate`` tries."""

from __future__ import annotations

import re
import zlib

import torch

from flashpack.kernels.metal.source import PARTS, source
from tests.metal import mutate
from tests.metal.changes import mutated
from tests.metal.emulator import FakeMps

SHARE = 10
"""One in so many changes is made, and all of these kinds."""
ALWAYS = re.compile(r": (no barrier|no SIMD operation|\w+ assumed): ")


def is_chosen(name: str) -> bool:
    return ALWAYS.search(name) is not None or zlib.crc32(name.encode()) % SHARE == 0


def test_changes_of_kernels_are_noticed() -> None:
    score = mutate.score(mutate.reaches(mutate.checks()), is_chosen)
    assert score.survived + score.unreached == [], score
    assert len(score.noticed) > 100, score


def test_what_cannot_be_noticed_is_still_there() -> None:
    """A reason for a change that is no longer made explains nothing."""
    names = {name for part in PARTS for name in mutated(source(part)).names}
    assert mutate.EQUIVALENT.issubset(names)


SOURCE = """#include <metal_stdlib>
using namespace metal;
struct Numbers {
    float values[2];
    float sum(uint n) const { return n > 1 ? values[0] + values[1] : values[0]; } // a comment, not[changed]
};
constant constexpr uint N = 4 * 2;
kernel void k(device float* x [[buffer(0)]], uint i [[thread_index_in_threadgroup]],
              uint n [[threads_per_threadgroup]]) {
    threadgroup float shared[N + 1];
    for (uint j = i; j < n; j += n)
        shared[j] = x[j];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const Numbers numbers = {{1.0f, shared[2]}};
    float total = simd_sum(shared[1]) * fma(x[1], 2.0f, 3.0f);
    threadgroup_barrier(mem_flags::mem_device);
    total += numbers.sum(n);
    if (i == 0)
        x[0] = total;
}
"""


def test_what_is_changed() -> None:
    assert sorted(mutated(SOURCE).names) == sorted(
        [
            "Numbers::sum: > more: 1",
            "Numbers::sum: next index: 0",
            "Numbers::sum: next index: 0 (2)",
            "Numbers::sum: next index: 1",
            "Numbers::sum: no addend: values[1]",
            "Numbers::sum: other choice: n > 1",
            "k: < less: n",
            "k: < more: n",
            "k: == more: 0",
            "k: later start: i",
            "k: longer step: n",
            "k: n assumed: ",
            "k: next index: 0",
            "k: next index: 1",
            "k: next index: 1 (2)",
            "k: next index: 2",
            "k: next index: j",
            "k: next index: j (2)",
            "k: no SIMD operation: simd_sum(shared[1])",
            "k: no addend: 3.0f",
            "k: no addend: numbers.sum(n)",
            "k: no barrier: threadgroup_barrier(mem_flags::mem_device)",
            "k: no barrier: threadgroup_barrier(mem_flags::mem_threadgroup)",
            "k: no factor: fma(x[1], 2.0f, 3.0f)",
            "k: other branch: i == 0",
        ]
    )


def test_each_is_off_until_it_is_switched_on() -> None:
    def result(gpu: FakeMps) -> list[float]:
        x = torch.arange(1.0, 5)
        gpu.compile(SOURCE).k(x, threads=4, group_size=4)
        return x.tolist()

    plain = result(FakeMps())
    assert result(mutate.ChangedMps()) == plain
    switch = mutate.ChangedMps.switches[SOURCE]
    for number, name in enumerate(switch.names, 1):
        if re.search("addend|factor|simd_sum|n > 1", name):
            switch.number.value = number
            assert result(mutate.ChangedMps()) != plain, name
    switch.number.value = 0
    assert result(mutate.ChangedMps()) == plain
