"""How fast values are quantized: the native routine on one core and on all, and a CUDA device where there is one.

    python bench/quantizer_speed.py [--values 67108864]

Normal random values as BF16, in matrices of 4096 values a row. Every result must have the same bytes and sums as the
first, and those of a part of the values as numpy's. Prints a Markdown table: seconds per 10^9 weights, best of three.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from flashpack.formats.dtypes import from_float32
from flashpack.formats.records import Encoding
from flashpack.kernels.cpu import native
from flashpack.kernels.cpu import quantize as cpu
from flashpack.kernels.cuda import quantize as cuda

WIDTH = 4096
BLOCK_ROWS = 512
"""Rows that a core takes at a time: what the converter gives it."""

Result = tuple[dict[str, NDArray[np.generic]], float, float]

CASES = [
    *((Encoding("affine", "BF16", bits, 64), method) for method in native.METHODS for bits in (2, 3, 4, 8)),
    *((Encoding("affine_dq", "BF16", bits, 32), method) for method in native.METHODS for bits in (2, 3, 4)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=2**26, help="how many values (default 67108864)")
    rows = max(BLOCK_ROWS, parser.parse_args().values // WIDTH)
    rng = np.random.default_rng(0)
    stored = np.concatenate(
        [
            from_float32(rng.standard_normal((BLOCK_ROWS, WIDTH), np.float32) * np.float32(0.02), "BF16")
            for _ in range(rows // BLOCK_ROWS)
        ]
    )
    cores = len(os.sched_getaffinity(0))
    print(f"{native.status()}; {cuda.status()}; {stored.size / 1e6:.0f}M values\n")
    print(f"| encoding | method | one core | {cores} cores | CUDA, {BLOCK_ROWS} rows a call | CUDA, all in one |")
    print("|---|---|---|---|---|---|")
    for encoding, method in CASES:
        check_against_numpy(stored[:8], encoding, method)
        first = stored[:BLOCK_ROWS]
        one = native.quantize(first, "BF16", encoding, method)
        cells = [seconds(lambda: native.quantize(first, "BF16", encoding, method), first.size)]  # noqa: B023
        with ThreadPoolExecutor(cores) as pool:
            cells.append(seconds(lambda: in_blocks(native.quantize, pool, stored, encoding, method), stored.size))  # noqa: B023
        if not cuda.missing():
            same(cuda.quantize(first, "BF16", encoding, method), one)
            with ThreadPoolExecutor(2) as pool:
                cells.append(seconds(lambda: in_blocks(cuda.quantize, pool, stored, encoding, method), stored.size))  # noqa: B023
            same(cuda.quantize(stored, "BF16", encoding, method), native.quantize(stored, "BF16", encoding, method))
            cells.append(seconds(lambda: cuda.quantize(stored, "BF16", encoding, method), stored.size))  # noqa: B023
        print(f"| {encoding} | {method} | " + " | ".join([*(f"{cell:.2f}" for cell in cells), "-", "-"][:4]) + " |")


def in_blocks(
    quantize: Callable[..., Result],
    pool: ThreadPoolExecutor,
    stored: NDArray[np.generic],
    encoding: Encoding,
    method: str,
) -> None:
    blocks = [stored[start : start + BLOCK_ROWS] for start in range(0, len(stored), BLOCK_ROWS)]
    list(pool.map(lambda block: quantize(block, "BF16", encoding, method), blocks))


def seconds(work: Callable[[], object], values: int) -> float:
    """The best of three, per 10^9 values."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best / values * 1e9


def check_against_numpy(stored: NDArray[np.generic], encoding: Encoding, method: str) -> None:
    expected = native.quantize(stored, "BF16", encoding, method)
    same(cpu.numpy_quantize(stored, "BF16", encoding, method), expected)


def same(found: Result, expected: Result) -> None:
    assert all(found[0][part].tobytes() == expected[0][part].tobytes() for part in expected[0]), "other bytes"
    assert found[1:] == expected[1:], f"other sums: {found[1:]}, not {expected[1:]}"


if __name__ == "__main__":
    main()
