"""Functions of Metal's library compute what it says, on all lanes and in all threads, in every schedule."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.metal.emulator import FakeMps

SOURCE = Path(__file__).with_name("numbers.metal").read_text()


def lanes(gpu: FakeMps, name: str, x: Tensor) -> np.ndarray:
    """What each lane gets, as a SIMD group per row; ``x``: two full SIMD groups per threadgroup."""
    y = torch.zeros_like(x)
    getattr(gpu.compile(SOURCE), name)(x, y, threads=x.numel(), group_size=64)
    return y.numpy().reshape(-1, 32)


def test_sums_of_lanes(gpu: FakeMps) -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    v = x.numpy()
    every = np.ones((1, 32), np.float32)
    np.testing.assert_allclose(lanes(gpu, "sum_float", x), v.sum(1, keepdims=True) * every, rtol=1e-5)
    np.testing.assert_allclose(lanes(gpu, "product", x), v.prod(1, keepdims=True) * every, rtol=1e-5)
    assert (lanes(gpu, "largest", x) == v.max(1, keepdims=True)).all()
    np.testing.assert_allclose(lanes(gpu, "before", x), np.cumsum(v, 1) - v, atol=1e-5)
    np.testing.assert_allclose(lanes(gpu, "up_to", x), np.cumsum(v, 1), atol=1e-5)
    np.testing.assert_allclose(lanes(gpu, "sum_half", x.half()), v.sum(1, keepdims=True) * every, atol=0.02)


def test_integers_of_lanes(gpu: FakeMps) -> None:
    x = torch.randint(0, 100, (4, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    x[1] = 7
    v = x.numpy()
    assert (lanes(gpu, "sum_int", x) == v.sum(1, keepdims=True)).all()
    assert (lanes(gpu, "smallest", x) == v.min(1, keepdims=True)).all()
    assert (lanes(gpu, "all_bits", x) == np.bitwise_and.reduce(v, 1, keepdims=True)).all()
    assert (lanes(gpu, "any_bits", x) == np.bitwise_or.reduce(v, 1, keepdims=True)).all()
    assert (lanes(gpu, "odd_bits", x) == np.bitwise_xor.reduce(v, 1, keepdims=True)).all()
    assert (lanes(gpu, "any_set", x) == (v == 7).any(1, keepdims=True)).all()
    assert (lanes(gpu, "all_set", x) == (v < 90).all(1, keepdims=True)).all()


def test_shuffles(gpu: FakeMps) -> None:
    x = torch.arange(128.0)
    v, lane = x.numpy().reshape(4, 32), np.arange(32)
    assert (lanes(gpu, "of_lane", x) == v[:, lane // 2]).all()
    assert (lanes(gpu, "of_first", x) == v[:, :1]).all()
    assert (lanes(gpu, "of_third", x) == v[:, 3:4]).all()
    assert (lanes(gpu, "exchanged", x) == v[:, lane ^ 1]).all()
    assert (lanes(gpu, "from_above", x) == v[:, np.where(lane < 27, lane + 5, lane)]).all()
    assert (lanes(gpu, "from_below", x) == v[:, np.where(lane >= 5, lane - 5, lane)]).all()


def test_a_vector_of_each_lane(gpu: FakeMps) -> None:
    x = torch.arange(32.0 * 4)
    y = torch.zeros(128)
    gpu.compile(SOURCE).vector_sum(x, y, threads=32, group_size=32)
    assert torch.equal(y.view(32, 4), x.view(32, 4).sum(0).expand(32, 4))


@pytest.mark.parametrize("threads", [1, 31, 33, 70, 100])
def test_groups_of_fewer_lanes(gpu: FakeMps, threads: int) -> None:
    """The last SIMD group of a threadgroup, and the last threadgroup of a grid, have the threads that are left."""
    x, y = torch.arange(1.0, threads + 1), torch.zeros(threads)
    gpu.compile(SOURCE).sum_float(x, y, threads=threads, group_size=70)
    for start in range(0, threads, 70):
        for first in range(start, min(start + 70, threads), 32):
            mine = slice(first, min(first + 32, start + 70))
            assert (y[mine] == x[mine].sum()).all()


def test_atomics(gpu: FakeMps) -> None:
    total, largest = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    halves = torch.zeros(1)
    gpu.compile(SOURCE).count(total, halves, largest, total.clone(), threads=256, group_size=64)
    assert (total.item(), halves.item(), largest.item()) == (256, 128.0, 255)


def test_schedules_differ() -> None:
    def taken(schedule: str, seed: int = 0) -> list[int]:
        order = torch.zeros(96, dtype=torch.int32)
        gpu = FakeMps(schedule=schedule, seed=seed)
        gpu.compile(SOURCE).order(torch.zeros(1, dtype=torch.int32), order, threads=96, group_size=32)
        return order.tolist()

    assert taken("forward") == list(range(96))
    assert taken("reversed") == list(range(95, -1, -1))
    assert sorted(taken("random")) == list(range(96))
    assert taken("random", 1) == taken("random", 1)
    assert taken("random", 1) != taken("random", 2)
    first_of_groups = [min(taken("random", 1)[i : i + 32]) for i in (0, 32, 64)]
    assert first_of_groups != sorted(first_of_groups), "groups are shuffled too"


def test_half_and_bfloat_round_after_each_operation(gpu: FakeMps) -> None:
    a = torch.linspace(-3, 3, 64).half()
    b = torch.linspace(-3, 3, 64).bfloat16()
    total, rounded = torch.zeros(64).half(), torch.zeros(64).bfloat16()
    gpu.compile(SOURCE).halves(a, b, total, rounded, threads=64, group_size=32)
    v = a.numpy()
    np.testing.assert_array_equal(total.numpy(), v * v + v - np.float16(0.25))
    assert torch.equal(rounded, (b.float() * 3).bfloat16())


def test_products_are_rounded_before_they_are_added(gpu: FakeMps) -> None:
    x, y = torch.full((32,), 1 + 2.0**-12), torch.zeros(32)
    gpu.compile(SOURCE).not_fused(x, y, threads=32, group_size=32)
    assert y.eq(2.0**-11).all()


def test_bits_and_vectors(gpu: FakeMps) -> None:
    x = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    y = torch.zeros(32, 8)
    gpu.compile(SOURCE).bits(x, y, threads=32, group_size=32)
    words = x.numpy().view(np.uint32)
    q = words.view(np.uint8).reshape(32, 4).astype(np.float32)
    f = q[:, [1, 0, 2, 3]]
    g = np.concatenate([np.tile(np.float32([1, 2]), (32, 1)), f[:, 2:]], 1)
    np.testing.assert_array_equal(y[:, :4], f * g + 0.5)
    h = (words & 0x3FFF3FFF).view(np.float16).astype(np.float32).reshape(32, 2)
    np.testing.assert_array_equal(y[:, 4], h.sum(1))
    np.testing.assert_array_equal(y[:, 5], ((words >> 9) | 0x3F800000).view(np.float32))
    np.testing.assert_allclose(y[:, 6], (f * g).sum(1), rtol=1e-6)
    ones = [bin(w).count("1") for w in words]
    zeros = [32 - int(w >> 8).bit_length() for w in words]
    expected = [1000 * o + 10 * z + max(int(v), 300) for o, z, v in zip(ones, zeros, q[:, 1], strict=True)]
    assert y[:, 7].tolist() == expected


def test_small_numbers_are_zeros_where_a_gpu_may_flush_them() -> None:
    """In one schedule, so that a kernel that depends on either differs between schedules. Halves are never flushed."""
    for schedule, expected in (("forward", 2.0**-129), ("reversed", 0.0), ("random", 2.0**-129)):
        gpu = FakeMps(schedule=schedule)
        assert lanes(gpu, "product", torch.tensor([2.0**-130, 2.0] + [1.0] * 30)).max() == expected
        assert lanes(gpu, "sum_half", torch.tensor([2.0**-24] * 2 + [0.0] * 30).half()).max() == 2.0**-23
    assert torch.tensor(2.0**-130) * 1.0 == 2.0**-130, "the processor is as it was"


def test_functions(gpu: FakeMps) -> None:
    x = torch.linspace(0.1, 3, 40)
    y = torch.zeros(16, 40)
    gpu.compile(SOURCE).functions(x, y, threads=40, group_size=40)
    expected = [x.exp(), x.log(), x.rsqrt(), x.tanh(), x.sin(), x**1.5, x.floor(), x.round(), x.clamp(0.5, 1)]
    expected += [x.exp2(), 1 / x, torch.full((40,), 2.0), x, torch.where(x > 1, 2.0, 1.0), x.sign(), x * 8]
    torch.testing.assert_close(y, torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_places_in_three_dimensions(gpu: FakeMps) -> None:
    grid, group = (7, 5, 3), (4, 3, 2)
    y = torch.zeros(math.prod(grid), 23, dtype=torch.int32)
    gpu.compile(SOURCE).places(y, threads=grid, group_size=group)
    for row, (z, yy, x) in zip(y.tolist(), np.ndindex(3, 5, 7), strict=True):
        at = (x, yy, z)
        inside = tuple(a % g for a, g in zip(at, group, strict=True))
        of_group = tuple(a // g for a, g in zip(at, group, strict=True))
        size = tuple(min(g, n - o * g) for g, n, o in zip(group, grid, of_group, strict=True))
        index = (inside[2] * size[1] + inside[1]) * size[0] + inside[0]
        simds = -(-math.prod(size) // 32)
        assert row == [*at, *grid, *of_group, 2, 2, 2, *inside, *size, index, index % 32, 32, index // 32, simds]
