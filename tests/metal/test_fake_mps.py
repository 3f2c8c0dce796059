"""The stand-in for torch.mps: what it refuses, and when launches run."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.metal.emulator import FakeMps

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
SOURCE = (
    HEAD
    + """
struct Pair { uint n; float scale; };
kernel void scaled(device const half* x [[buffer(0)]], device float* y [[buffer(1)]], constant uint& n [[buffer(2)]],
                   uint i [[thread_position_in_grid]]) { y[i] = float(x[i]) * float(n); }
kernel void paired(device const uchar* x [[buffer(0)]], device float* y [[buffer(1)]], constant Pair& p [[buffer(2)]],
                   uint i [[thread_position_in_grid]]) { y[i] = float(x[i]) * p.scale + float(p.n); }
kernel void twice(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) { y[i] = 2.0f * x[i]; }
kernel void through(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
                    uint i [[thread_position_in_grid]]) { y[i] = 7.0f; y[i] = x[i] + 1.0f; }
kernel void large(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
    threadgroup float a[4096], b[4096], c[1];
    if (i == 0) { a[0] = x[0]; b[0] = a[0]; c[0] = b[0]; x[0] = c[0]; }
}
"""
)


def halves(n: int = 8) -> Tensor:
    return torch.ones(n, dtype=torch.float16)


ONE = torch.tensor([3], dtype=torch.int32)
REFUSED: dict[str, tuple[Callable[[FakeMps], object], type[Exception], str]] = {
    "float for half": (lambda g: scaled(g, torch.ones(8)), TypeError, "argument 0 'x': torch.float32 bound to 'device"),
    "int64 for uint": (lambda g: scaled(g, halves(), n=3), TypeError, "'n': torch.int64 bound to 'constant uint&'"),
    "not contiguous": (lambda g: scaled(g, halves(16)[::2]), ValueError, "'x': not contiguous"),
    "float64": (lambda g: scaled(g, torch.ones(8).double()), TypeError, "no float64"),
    "meta": (lambda g: scaled(g, halves().to("meta")), TypeError, "a tensor of meta"),
    "None": (lambda g: scaled(g, halves(), n=None), TypeError, "'n': Unsupported argument type NoneType"),
    "an argument less": (
        lambda g: g.compile(SOURCE).scaled(halves(), threads=8),
        TypeError,
        "1 arguments for the buffers x, y, n",
    ),
    "many numbers": (lambda g: scaled(g, [1.0] * 2000), ValueError, "8000 bytes of numbers, 4096 at most"),
    "large groups": (lambda g: scaled(g, halves(), group_size=2048), ValueError, "exceeds 1024 limit"),
    "dimensions": (lambda g: scaled(g, halves(), group_size=(8, 1)), RuntimeError, "group_size=.* for threads=8"),
    "no threads": (lambda g: scaled(g, halves(), threads=0), RuntimeError, "positive"),
    "no such kernel": (lambda g: g.compile(SOURCE).missing, RuntimeError, "Failed to create function .* missing"),
    "threadgroup memory": (lambda g: g.compile(SOURCE).large, RuntimeError, "32784 bytes of threadgroup memory"),
    "not ASCII": (lambda g: g.compile(SOURCE + "// \u2192"), SyntaxError, "ASCII"),
    "schedule": (lambda g: FakeMps(schedule="sideways"), ValueError, "schedule='sideways'"),
}


def scaled(
    gpu: FakeMps, x: object, n: object = ONE, threads: int = 8, group_size: object = 8, **options: object
) -> Tensor:
    y = torch.zeros(8)
    gpu.compile(SOURCE).scaled(x, y, n, threads=threads, group_size=group_size, **options)
    return y


@pytest.mark.parametrize("name", REFUSED)
def test_refused(quick_gpu: FakeMps, name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call(quick_gpu)
    assert quick_gpu.launches == 0


def test_what_is_bound(quick_gpu: FakeMps) -> None:
    """A view is its part of a storage; numbers are sent as torch sends them; a struct is any tensor of its bytes."""
    assert torch.equal(scaled(quick_gpu, torch.arange(16.0).half()[4:12]), torch.arange(4.0, 12) * 3)
    assert scaled(quick_gpu, halves(), n=5, arg_casts={2: "int32"}).eq(5).all()
    y = torch.zeros(8)
    pair = torch.tensor([7, 0x3F000000], dtype=torch.int32)
    quick_gpu.compile(SOURCE).paired(torch.arange(8, dtype=torch.uint8), y, pair, threads=8, group_size=8)
    assert torch.equal(y, torch.arange(8) * 0.5 + 7)
    quick_gpu.compile(SOURCE).twice(torch.ones(8), y)
    assert y.eq(2).all(), "as many threads as the first argument has numbers"


def test_arguments_that_share_memory(gpu: FakeMps) -> None:
    """Both are the same memory for the kernel, not copies."""
    both = torch.arange(12.0)
    gpu.compile(SOURCE).twice(both[:8], both[:8], threads=8, group_size=8)
    assert both.tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 8, 9, 10, 11]
    gpu.compile(SOURCE).twice(both[8:], both[:4], threads=4, group_size=4)
    assert both[:4].tolist() == [16, 18, 20, 22]
    gpu.compile(SOURCE).through(both[2:8], both[2:], threads=6, group_size=6)
    assert both[:9].tolist() == [16, 18, 8, 8, 8, 8, 8, 8, 8]


def test_the_host_sees_the_same_memory(quick_gpu: FakeMps) -> None:
    x, y = torch.ones(8), torch.zeros(8)
    host = quick_gpu.host(x)
    assert host is not None
    host.numpy()[:] = 5
    quick_gpu.compile(SOURCE).twice(x, y, threads=8, group_size=8)
    assert y.eq(10).all()


def test_kernels_describe_themselves(quick_gpu: FakeMps) -> None:
    library = quick_gpu.compile(SOURCE)
    assert dir(library) == ["large", "paired", "scaled", "through", "twice"]
    assert library.twice.static_thread_group_memory_length == 0
    assert (library.twice.max_threads_per_threadgroup, library.twice.thread_execution_width) == (1024, 32)


LAZY_RUNS = {
    "wait": lambda gpu, x, y: gpu.wait(),
    "an operation that reads": lambda gpu, x, y: y.sum(),
    "an operation that writes": lambda gpu, x, y: x.zero_(),
    "a view, then an operation": lambda gpu, x, y: y[3:].view(5, 1) + 1,
    "a copy that says it is a view": lambda gpu, x, y: y.view(2, 4).t().reshape(8),
    "cpu": lambda gpu, x, y: y.cpu(),
    "item": lambda gpu, x, y: y[0].item(),
    "without gradients": lambda gpu, x, y: torch.inference_mode()(y.clone)(),
}
LAZY_WAITS = {
    "nothing": lambda gpu, x, y: None,
    "commit": lambda gpu, x, y: gpu.commit(),
    "a view": lambda gpu, x, y: y[2:],
    "another tensor": lambda gpu, x, y: torch.ones(3) + 1,
    "the host's memory": lambda gpu, x, y: gpu.host(y).numpy().sum(),
}


@pytest.mark.parametrize("name", [*LAZY_RUNS, *LAZY_WAITS])
def test_a_lazy_launch_runs_when_it_must(name: str) -> None:
    gpu = FakeMps(lazy=True)
    x, y = torch.ones(8), torch.zeros(8)
    seen = y.numpy()
    gpu.compile(SOURCE).twice(x, y, threads=8, group_size=8)
    assert seen.sum() == 0
    (LAZY_RUNS | LAZY_WAITS)[name](gpu, x, y)
    assert seen.sum() == (16 if name in LAZY_RUNS else 0)
    gpu.wait()
    assert seen.sum() == 16


def test_memory_written_too_early_is_seen_by_a_lazy_launch() -> None:
    """The bug of a slot that is filled again before the GPU has read it: invisible to launches that run at once."""
    results = []
    for lazy in (False, True):
        gpu = FakeMps(lazy=lazy)
        x, y = torch.ones(8), torch.zeros(8)
        gpu.compile(SOURCE).twice(x, y, threads=8, group_size=8)
        x.numpy()[:] = 100
        gpu.wait()
        results.append(y[0].item())
    assert results == [2, 200]


def test_order_outlives_a_context_of_torch() -> None:
    gpu = FakeMps(lazy=True)
    x, y = torch.ones(8), torch.zeros(8)
    with gpu.watched():
        with torch.inference_mode():
            gpu.compile(SOURCE).twice(x, y, threads=8, group_size=8)
        assert y.numpy()[0] == 0
        assert y.sum() == 16
        gpu.wait()


def test_counters() -> None:
    gpu = FakeMps(lazy=True)
    x, y = torch.ones(8), torch.zeros(8)
    for _ in range(3):
        gpu.compile(SOURCE).twice(x, y, threads=8, group_size=8)
    gpu.commit()
    y.cpu()
    y[0].item()
    gpu.wait()
    assert (gpu.launches, gpu.commits, gpu.waits) == (3, 1, 3)


def test_a_fault_of_a_lazy_launch_is_raised_where_it_runs() -> None:
    gpu = FakeMps(lazy=True)
    gpu.compile(SOURCE).twice(torch.ones(4), torch.zeros(8), threads=8, group_size=8)
    with pytest.raises(RuntimeError, match="kernel twice: argument 'x' of 16 bytes"):
        gpu.wait()
    gpu.wait()


def test_launches_from_several_threads() -> None:
    gpu = FakeMps(lazy=True)
    library = gpu.compile(SOURCE)
    results = [torch.zeros(8) for _ in range(4)]

    def work(y: Tensor) -> None:
        for _ in range(5):
            library.twice(torch.ones(8), y, threads=8, group_size=8)
        gpu.wait()

    threads = [threading.Thread(target=work, args=(y,)) for y in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(y.eq(2).all() for y in results)
    assert gpu.launches == 20
