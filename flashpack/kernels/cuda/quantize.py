"""Quantizing on a CUDA device: the bytes and sums of ``kernels.cpu.quantize``.

A kernel is compiled by torch (NVRTC) when the first matrix comes, which takes some seconds.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashpack.errors import DeviceError
from flashpack.formats.dtypes import NUMPY, from_float32
from flashpack.formats.records import Encoding
from flashpack.kernels.cpu import native
from flashpack.kernels.cpu import quantize as cpu

THREADS = 128
"""Of a thread block."""

_TYPES = {"BF16": 0, "F16": 1, "F32": 2}


_compiling = threading.Lock()


@functools.cache
def _kernel(name: str, group_size: int) -> Any:
    """The kernel of an encoding. Raises what torch does if it cannot compile."""
    options = ["--fmad=false"] + ([f"-DGROUP={group_size}"] if name == "affine" else [])
    folder = str(Path(native.__file__).parent)
    source = Path(__file__).with_name("quantize.cu").read_text()
    return torch.cuda._compile_kernel(source, f"quantize_{name}", cuda_include_dirs=[folder], nvcc_options=options)


@functools.cache
def missing() -> str | None:
    """Why no device is used, in one line; None if one is."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        torch.cuda._compile_kernel('extern "C" __global__ void nothing() {}', "nothing")
    except (AttributeError, ImportError, OSError, RuntimeError) as e:
        why = str(e).partition("\n")[0]
        return f"torch {torch.__version__} cannot compile for the CUDA device: {why}"
    return None


def status() -> str:
    """One line: the device, or why none is used."""
    return f"cuda quantizer: {missing() or torch.cuda.get_device_name()}"


def quantize(
    stored: NDArray[np.generic], dtype: str, encoding: Encoding, method: str
) -> tuple[dict[str, NDArray[np.generic]], float, float]:
    """``kernels.cpu.quantize.quantize``, to the bit. Only to be called if nothing is ``missing``.

    Raises ``DeviceError`` if the device's compiler made something else of it.
    """
    with _compiling:
        _check(dtype, encoding, method)
    return _quantize(stored, dtype, encoding, method)


@functools.cache
def _check(dtype: str, encoding: Encoding, method: str) -> None:
    """Compiles, and compares what is new with the processor: compilers for devices have been seen to err here."""
    values = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    stored = from_float32(values, dtype)
    found, *sums = _quantize(stored, dtype, encoding, method)
    expected, *totals = cpu.quantize(stored, dtype, encoding, method)
    if sums != totals or any(found[part].tobytes() != expected[part].tobytes() for part in expected):
        raise DeviceError(
            f"{torch.cuda.get_device_name()}: the quantizer of {encoding} compiled for it gives other bytes than the "
            f"processor's; set CUDA_VISIBLE_DEVICES= to convert without it"
        )


def _quantize(
    stored: NDArray[np.generic], dtype: str, encoding: Encoding, method: str
) -> tuple[dict[str, NDArray[np.generic]], float, float]:
    kernel = _kernel(encoding.name, encoding.group_size)
    device = torch.device("cuda")
    source = torch.from_numpy(np.ascontiguousarray(stored).view(np.uint8)).to(device)
    layout = encoding.parts(stored.shape)
    parts = {
        name: torch.empty(int(np.prod(shape)) * np.dtype(NUMPY[kind]).itemsize, dtype=torch.uint8, device=device)
        for name, (kind, shape) in layout.items()
    }
    groups = stored.size // encoding.group_size
    sums = torch.zeros(groups, 2, dtype=torch.float64, device=device)
    starts = native.METHODS.index(method)
    if encoding.name == "affine_dq":
        count = groups // 8
        numbers = [count, encoding.bits, starts]
    else:
        count = groups
        numbers = [count, encoding.bits, _TYPES[encoding.dtype], starts]
    kernel(
        grid=(-(-count // THREADS), 1, 1),
        block=(THREADS, 1, 1),
        args=[source, _TYPES[dtype], *numbers, *parts.values(), sums],
    )
    arrays = {
        name: parts[name].cpu().numpy().view(NUMPY[kind]).reshape(shape) for name, (kind, shape) in layout.items()
    }
    # One after the other, as the others add them up.
    error, norm = (float(np.add.accumulate(column)[-1]) for column in sums.T.contiguous().cpu().numpy())
    return arrays, error, norm
