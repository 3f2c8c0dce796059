"""Products of the native kernels, by every instruction set of this processor: of experts, and of matrices.

    python bench/products.py [--threads 2] [--beside OTHER/_kernels.so ...]

Experts have the sizes of Qwen3-30B-A3B's, 4 bits in groups of 64, and come from memory: there are 64, a call has 8 (one
token) or 16. The matrix is a projection of attention, a fine matrix one of a recurrent layer, whose activations are
never rounded to 8 bits. ``--beside`` compares with other builds of the kernels, in turns
in this process; a line says so where their results are not the same to the bit.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import head, machine, median, show

from flashpack.kernels.cpu.arena import HostArena
from flashpack.kernels.cpu.native import compute
from flashpack.kernels.interface import ACTIVATIONS

WIDTH, INNER, ROWS, GROUP = 2048, 768, 4096, 64
EXPERTS = 64
SILU = ACTIVATIONS.index("silu")
TURNS, SECONDS = 12, 0.1
EXPERT_TOKENS, MATRIX_TOKENS = (1, 4, 16, 64), (1, 64, 256)


class Memory:
    """Matrices of random codes one after the other in huge pages, as records lie in the arena."""

    def __init__(self) -> None:
        self._arena = HostArena(EXPERTS * 3 * WIDTH * INNER * 5 // 8 + 2 * ROWS * WIDTH)
        self._used = 0

    def matrix(self, rows: int, width: int, coarse: bool = True) -> compute.Matrix:
        codes = self._take(torch.randint(-(2**63), 2**63 - 1, (rows * width // 16,)))
        scales = torch.rand(rows * width // GROUP) * 0.01
        numbers = [self._take(x.to(torch.bfloat16)) for x in (scales, -8 * scales)]
        return compute.Matrix(
            codes, *numbers, None, rows, width, compute.KINDS["affine"], 4, GROUP, compute.KINDS["BF16"], 0, coarse
        )

    def _take(self, values: torch.Tensor) -> int:
        own = values.view(torch.uint8)
        room = self._arena.tensor[self._used : self._used + len(own)]
        room.copy_(own)
        self._used += (len(own) + 63) // 64 * 64
        return room.data_ptr()


Call = Callable[[compute.Workers], object]


def expert_calls(experts: list[compute.Expert], tokens: int, out: torch.Tensor) -> tuple[Iterator[Call], int]:
    """Calls that go through the experts, and how many products of two numbers each makes."""
    together = 8 if tokens == 1 else 16
    given = max(1, together * tokens // 8)
    x = torch.randn(given, WIDTH)
    rows = torch.randint(0, given, (together * tokens,), dtype=torch.int32)
    counts = (ctypes.c_int32 * together)(*[tokens] * together)

    def calls() -> Iterator[Call]:
        while True:
            for first in range(0, EXPERTS, together):
                some = [compute.address(e) for e in experts[first : first + together]]
                yield lambda w, some=some: w.experts(  # type: ignore[misc]
                    x.data_ptr(),
                    given,
                    some,
                    ctypes.addressof(counts),
                    rows.data_ptr(),
                    SILU,
                    float("inf"),
                    out.data_ptr(),
                )

    return calls(), together * tokens * 3 * WIDTH * INNER


def matrix_calls(matrix: compute.Matrix, tokens: int, out: torch.Tensor) -> tuple[Iterator[Call], int]:
    x = torch.randn(tokens, WIDTH)

    def calls() -> Iterator[Call]:
        while True:
            yield lambda w: w.linear(x.data_ptr(), tokens, matrix, out.data_ptr())

    return calls(), tokens * ROWS * WIDTH


def rate(workers: compute.Workers, calls: Iterator[Call], products: int) -> float:
    """Billions of products a second, in the median call of some."""
    seconds = []
    ends = time.perf_counter() + SECONDS
    while time.perf_counter() < ends:
        call = next(calls)
        begun = time.perf_counter()
        call(workers)
        seconds.append(time.perf_counter() - begun)
    return products / median(seconds) / 1e9


def same(builds: dict[str, compute.Workers], calls: Iterator[Call], out: torch.Tensor) -> bool:
    call, results = next(calls), []
    for workers in builds.values():
        call(workers)
        results.append(out.clone())
    return all(torch.equal(results[0], r) for r in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--beside", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    best = compute.best_level()
    if best is None:
        parser.error(compute.status())
    if args.threads < 1:
        parser.error("--threads is at least 1")
    libraries: dict[str, ctypes.CDLL | str] = {"here": compute.library()}
    for path in args.beside:
        try:
            libraries[str(path)] = compute.declared(ctypes.CDLL(str(path.resolve())))
        except OSError as e:
            parser.error(f"{path} is no build of these kernels: {e}")
    torch.manual_seed(1)
    memory = Memory()
    experts = []
    for _ in range(EXPERTS):
        first, down = memory.matrix(2 * INNER, WIDTH), memory.matrix(WIDTH, INNER)
        experts.append(compute.Expert(first, compute.Matrix(), down, 1))
    matrices = {"matrix": memory.matrix(ROWS, WIDTH), "fine matrix": memory.matrix(ROWS, WIDTH, coarse=False)}
    print(f"{machine()}; {args.threads} threads")
    print(f"Billions of products a second, medians of {TURNS} turns, extremes in brackets")
    for level in range(min(1, best), best + 1):
        builds = {name: compute.Workers(args.threads, level, found) for name, found in libraries.items()}
        print(f"\n{builds['here'].name}")
        head("", *builds, *(f"here / {name}" for name in list(builds)[1:]))
        out = torch.zeros(MATRIX_TOKENS[-1] * ROWS + 16 * EXPERT_TOKENS[-1] * WIDTH)
        work = [(f"experts, {n} tokens each", *expert_calls(experts, n, out)) for n in EXPERT_TOKENS]
        for name, matrix in matrices.items():
            work += [(f"{name}, {n} tokens", *matrix_calls(matrix, n, out)) for n in MATRIX_TOKENS]
        for label, calls, products in work:
            if not same(builds, calls, out):
                print(f"results differ: {label}")
            rates: dict[str, list[float]] = {name: [] for name in builds}
            for turn in range(TURNS):
                for name in list(builds)[:: 1 if turn % 2 else -1]:
                    rates[name].append(rate(builds[name], calls, products))
            ratios = [[a / b for a, b in zip(rates["here"], found, strict=True)] for found in rates.values()]
            show(
                [label]
                + [f"{median(r):.1f} ({min(r):.1f} to {max(r):.1f})" for r in rates.values()]
                + [f"{median(r):.2f}x" for r in ratios[1:]]
            )  # fmt: skip


if __name__ == "__main__":
    main()
