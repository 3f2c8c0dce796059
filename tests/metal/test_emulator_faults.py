"""The emulator notices what goes wrong on a GPU: broken.metal has a kernel for each mistake."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from tests.metal.emulator import FakeMps, time_limit

SOURCE = Path(__file__).with_name("broken.metal").read_text()


def line(text: str) -> int:
    """The line of the kernel source that has a text, the last if there are several."""
    return SOURCE[: SOURCE.rindex(text)].count("\n") + 1


FAULTS = {
    "no_barrier": "race: thread .* no barrier orders them",
    "barrier_of_other_memory": "race: .* of a threadgroup variable",
    "no_barrier_before_next_use": "race: .* of a threadgroup variable",
    "device_memory": "race: .* of argument 'y'",
    "lanes_only": "race: .* of a threadgroup variable",
    "all_write_one": "race: .* writes byte 0 of a threadgroup variable, which thread .* wrote",
    "barrier_in_branch": "threadgroup_barrier in divergent flow: .* has returned",
    "two_barriers": "threadgroup_barrier in divergent flow: thread .* at threadgroup_barrier",
    "early_return": "threadgroup_barrier in divergent flow: .* thread 200 has returned",
    "sum_in_branch": f"line {line('v = simd_sum(v);')}: simd_sum in divergent flow: .* has returned",
    "helper_in_both_branches": "simd_sum in divergent flow: .* different calls",
    "sum_or_barrier": "in divergent flow: thread .* at (threadgroup_barrier|simd_sum)",
    "ragged_loop": "simd_max in divergent flow",
    "lane_32": "simd_shuffle: lane 31 reads lane 32, which is not active",
    "shared_beyond": "a threadgroup variable of 1020 bytes: access at byte 1020, beyond its end",
    "index_beyond": "an index outside of its array",
    "own_beyond": "an access outside of one of a thread's own arrays",
    "large_stack": "own variables do not fit its stack",
    "misaligned_vector": "is 4 more than a multiple of the 16 bytes",
    "shift": "a shift by",
    "overflow": f"line {line('0x7fffffff')}: undefined behaviour: a signed sum overflows",
    "division": "division by zero",
    "too_large": "does not fit the integer",
}


@pytest.mark.parametrize("name", FAULTS)
def test_in_every_schedule(gpu: FakeMps, name: str) -> None:
    x, y = torch.zeros(256), torch.zeros(256)
    with pytest.raises(RuntimeError, match=f"^kernel {name}: .*{FAULTS[name]}"):
        getattr(gpu.compile(SOURCE), name)(x, y, threads=256, group_size=256)


@pytest.mark.parametrize("schedule", ["forward", "reversed"])
@pytest.mark.parametrize(
    ("name", "schedules", "message"),
    [
        ("beyond_end", ["forward"], "argument 'x' of 1024 bytes: access at byte 1024, beyond its end"),
        ("before_start", ["reversed"], "argument 'x' of 1024 bytes: access at byte -4, before its start"),
        ("write_beyond", ["forward", "reversed"], "argument 'y' of 1024 bytes: access at byte 1024, beyond its end"),
        (
            "far_away",
            ["forward", "reversed"],
            "argument 'x' of 1024 bytes: access at byte 40000[01]..., beyond its end",
        ),
    ],
)
def test_outside_of_an_argument(schedule: str, name: str, schedules: list[str], message: str) -> None:
    """Forward, reads beyond the end are seen; reversed, reads before the start."""
    library = FakeMps(schedule=schedule).compile(SOURCE)
    x, y = torch.zeros(256), torch.zeros(256)
    if schedule in schedules:
        with pytest.raises(RuntimeError, match=f"^kernel {name}: {message}"):
            getattr(library, name)(x, y, threads=256, group_size=256)
    else:
        getattr(library, name)(x, y, threads=256, group_size=256)


def test_without_guards_the_same_runs() -> None:
    """What lies beside an argument is then other memory of the process, here of the same tensor."""
    x, y = torch.zeros(258), torch.zeros(256)
    FakeMps(guarded=False).compile(SOURCE).beyond_end(x[:256], y, threads=256, group_size=256)


def test_too_large_for_a_guard(quick_gpu: FakeMps) -> None:
    """Two GiB without memory: nothing is copied, and the process goes on."""
    y = torch.zeros(256)
    large = torch.frombuffer(mmap.mmap(-1, 2 << 30), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="argument 'x': too large for a guarded copy"):
        quick_gpu.compile(SOURCE).good(large, y, threads=256, group_size=256)
    FakeMps(guarded=False).compile(SOURCE).good(large, y, threads=256, group_size=256)


def test_a_byte_beyond_an_odd_size(gpu: FakeMps) -> None:
    x, y = torch.zeros(5, dtype=torch.uint8), torch.zeros(32)
    with pytest.raises(RuntimeError, match="argument 'x' of 5 bytes: access at byte 5, beyond its end"):
        gpu.compile(SOURCE).bytes_beyond(x, y, threads=32, group_size=32)


def test_a_struct_larger_than_its_argument(quick_gpu: FakeMps) -> None:
    with pytest.raises(RuntimeError, match="argument 'x' of 8 bytes is bound to a type of 16"):
        quick_gpu.compile(SOURCE).constant_beyond(torch.zeros(2), torch.zeros(32), threads=32, group_size=32)


def test_misaligned(quick_gpu: FakeMps) -> None:
    library = quick_gpu.compile(SOURCE)
    y = torch.zeros(32)
    with pytest.raises(RuntimeError, match=f"line {line('x + 2')}: an address is 2 more than a multiple of the 4"):
        library.misaligned_uint(torch.zeros(64, dtype=torch.uint8), y, threads=32, group_size=32)
    with pytest.raises(RuntimeError, match="argument 'x' is not aligned to 16 bytes"):
        library.misaligned_constant(torch.zeros(8)[1:5], y, threads=32, group_size=32)
    library.misaligned_constant(torch.zeros(8)[4:8], y, threads=32, group_size=32)


def test_groups_are_not_ordered(gpu: FakeMps) -> None:
    with pytest.raises(RuntimeError, match=r"race: .* which another threadgroup"):
        gpu.compile(SOURCE).groups(torch.zeros(64), torch.zeros(64), threads=64, group_size=32)


def test_lanes_that_are_not_there(gpu: FakeMps) -> None:
    """The last SIMD group of a threadgroup may have less than 32 lanes."""
    library = gpu.compile(SOURCE)
    library.missing_lane(torch.zeros(64), torch.zeros(64), threads=64, group_size=64)
    with pytest.raises(RuntimeError, match=r"simd_shuffle_xor: lane .* which is not active"):
        library.missing_lane(torch.zeros(48), torch.zeros(48), threads=48, group_size=48)


def test_unset_threadgroup_memory_is_nan(gpu: FakeMps) -> None:
    """Also in groups after the first, which has set all of it in a launch before."""
    library = gpu.compile(SOURCE)
    x, y = torch.ones(256), torch.zeros(256)
    library.good(x, y, threads=256, group_size=256)
    library.unset_memory(x, y, threads=256, group_size=256)
    assert y[:255].eq(1).all()
    assert y[255].isnan()


def test_unset_variables_are_nan(quick_gpu: FakeMps) -> None:
    y = torch.zeros(256)
    quick_gpu.compile(SOURCE).unset_variable(torch.ones(256), y, threads=256, group_size=256)
    assert y[0::2].eq(1).all()
    assert y[1::2].isnan().all()


def test_a_kernel_without_end(quick_gpu: FakeMps) -> None:
    library = quick_gpu.compile(SOURCE)
    with pytest.raises(RuntimeError, match="kernel endless: no end after 1 seconds"), time_limit(1):
        library.endless(torch.zeros(32), torch.zeros(32), threads=32, group_size=32)


def test_after_a_fault_the_process_goes_on(gpu: FakeMps) -> None:
    library = gpu.compile(SOURCE)
    x, y = torch.arange(256.0), torch.zeros(256)
    for name in ("write_beyond", "large_stack", "early_return", "division"):
        with pytest.raises(RuntimeError, match=name):
            getattr(library, name)(torch.zeros(256), y, threads=256, group_size=256)
    library.good(x, y, threads=256, group_size=256)
    sums = x.view(8, 32).sum(1).view(4, 2).flip(1).reshape(8)  # of the SIMD group beside it
    assert torch.equal(y.view(8, 32), sums[:, None].expand(8, 32))
