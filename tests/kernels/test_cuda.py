"""The CUDA quantizer: its source run as plain C++, one thread after the other, and on a device where there is one."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from flashpack.errors import DeviceError
from flashpack.formats.constants import AFFINE_BITS, DQ_BITS, GROUP_SIZES
from flashpack.formats.dtypes import NUMPY, from_float32
from flashpack.formats.records import Encoding
from flashpack.kernels.cpu import native
from flashpack.kernels.cpu.quantize import quantize
from flashpack.kernels.cuda import quantize as cuda
from flashpack.kernels.quantize import quantize as fastest

FOLDER = Path(cuda.__file__).parent
DTYPES = ["BF16", "F16", "F32"]
TYPES = {"BF16": 0, "F16": 1, "F32": 2}
ENCODINGS = [
    *(Encoding("affine", "BF16", bits, group) for bits in AFFINE_BITS for group in GROUP_SIZES),
    *(Encoding("affine", dtype, 3, 64) for dtype in ("F16", "F32")),
    *(Encoding("affine_dq", "BF16", bits, 32) for bits in DQ_BITS),
]
HOST = """
#include <math.h>
#include <string.h>
#define __device__
#define __global__
#define __forceinline__ inline
static struct { unsigned x; } blockIdx, blockDim = {1}, threadIdx;
#include "quantize.cu"
#ifdef GROUP
extern "C" void affine(int count, const uint8_t *source, int a, int b, int c, int d, uint8_t *words, uint8_t *scales,
                       uint8_t *biases, double *sums) {
    for (blockIdx.x = 0; blockIdx.x < (unsigned)count + 3; blockIdx.x++)
        quantize_affine(source, a, count, b, c, d, words, scales, biases, sums);
}
#else
extern "C" void affine_dq(int count, const uint8_t *source, int a, int b, int c, uint8_t *words, uint8_t *scales,
                          uint8_t *blocks, double *sums) {
    for (blockIdx.x = 0; blockIdx.x < (unsigned)count + 3; blockIdx.x++)
        quantize_affine_dq(source, a, count, b, c, words, scales, blocks, sums);
}
#endif
"""


def samples() -> np.ndarray:
    """float32 [64, 512]: normal, of all magnitudes, nearly constant, zeros of both signs, subnormal."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((64, 512)).astype(np.float32)
    values[16:32] *= np.exp2(rng.integers(-40, 14, (16, 1))).astype(np.float32)
    values[32:40] = np.where(rng.random((8, 512)) < 0.1, values[32:40], np.float32(0.3))
    values[40:44] *= np.float32(0) * np.float32(-1)
    values[44:48] *= np.float32(1e-42)
    return values


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], ctypes.CDLL]:
    """Size of groups, or 0 for affine_dq -> the kernel as a library."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(HOST)
    include = [f"-I{FOLDER}", f"-I{Path(native.__file__).parent}"]
    flags = ["-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w", "-std=c++17"]

    @functools.cache
    def build(group: int) -> ctypes.CDLL:
        defined = [f"-DGROUP={group}"] if group else []
        subprocess.run([compiler, *flags, *defined, *include, "host.cpp", "-o", f"{group}.so"], cwd=folder, check=True)
        return ctypes.CDLL(str(folder / f"{group}.so"))

    return build


@pytest.mark.parametrize("method", native.METHODS)
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_source_gives_the_bytes_of_the_processor(
    host: Callable[[int], ctypes.CDLL], dtype: str, encoding: Encoding, method: str
) -> None:
    stored = from_float32(samples(), dtype)
    parts = {name: np.empty(shape, NUMPY[kind]) for name, (kind, shape) in encoding.parts(stored.shape).items()}
    sums = np.zeros((stored.size // encoding.group_size, 2))
    arrays = [ctypes.c_void_p(array.ctypes.data) for array in (*parts.values(), sums)]
    source = ctypes.c_void_p(stored.ctypes.data)
    starts = native.METHODS.index(method)
    if encoding.name == "affine_dq":
        host(0).affine_dq(stored.size // 256, source, TYPES[dtype], encoding.bits, starts, *arrays)
    else:
        library = host(encoding.group_size)
        library.affine(len(sums), source, TYPES[dtype], encoding.bits, TYPES[encoding.dtype], starts, *arrays)
    expected, *totals = quantize(stored, dtype, encoding, method)
    assert all(parts[name].tobytes() == expected[name].tobytes() for name in expected)
    assert [np.add.accumulate(column)[-1] for column in sums.T] == totals


@pytest.mark.skipif(cuda.missing() is not None, reason=cuda.status())
@pytest.mark.parametrize("method", native.METHODS)
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_device_gives_the_bytes_of_the_processor(dtype: str, encoding: Encoding, method: str) -> None:
    stored = from_float32(samples(), dtype)
    found, *sums = cuda.quantize(stored, dtype, encoding, method)
    expected, *totals = quantize(stored, dtype, encoding, method)
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
    assert sums == totals


def test_a_device_that_errs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def err(stored: np.ndarray, dtype: str, encoding: Encoding, method: str) -> object:
        parts, error, norm = quantize(stored, dtype, encoding, method)
        parts["weight"][-1, -1] ^= np.uint32(1 << 31)
        return parts, error, norm

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(cuda, "_quantize", err)
    cuda._check.cache_clear()
    with pytest.raises(DeviceError, match=r"a card: .* other bytes than the processor"):
        cuda.quantize(np.zeros((1, 64), np.float32), "F32", Encoding("affine", "BF16", 4, 64), "starts")


def test_without_a_device_it_says_so_in_one_line() -> None:
    assert cuda.status().startswith("cuda quantizer: ")
    assert "\n" not in cuda.status()


def test_a_device_takes_only_searches_that_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    def take(stored: np.ndarray, dtype: str, encoding: Encoding, method: str) -> object:
        taken.append(method)
        return None

    monkeypatch.setattr(cuda, "quantize", take)
    large = from_float32(np.ones((1024, 1024), np.float32), "BF16")
    calls = [(large, "minmax"), (large[:512], "starts"), (large, "starts")]
    for missing, expected in (("no CUDA device", []), (None, ["starts"])):
        monkeypatch.setattr(cuda, "missing", lambda why=missing: why)
        for stored, method in calls:
            fastest(stored, "BF16", Encoding("affine", "BF16", 4, 64), method)
        assert taken == expected
