"""Quantizing on a CUDA device: the bytes and sums of ``kernels.cpu.quantize``.

The kernels are compiled by torch (NVRTC) when the first matrix comes, in a second or two.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flashpack.formats.dtypes import NUMPY
from flashpack.formats.records import Encoding
from flashpack.kernels.cpu import native

THREADS = 128
"""Of a thread block."""

_TYPES = {"BF16": 0, "F16": 1, "F32": 2}


@functools.cache
def _kernels() -> dict[str, Any] | str:
    """Encoding -> its kernel; or why there is none."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    source = Path(__file__).with_name("quantize.cu").read_text()
    folder = str(Path(native.__file__).parent)
    found: dict[str, Any] = {}
    try:
        for name in ("affine", "affine_dq"):
            found[name] = torch.cuda._compile_kernel(
                source, f"quantize_{name}", cuda_include_dirs=[folder], nvcc_options=["--fmad=false"]
            )
    except (AttributeError, ImportError, OSError, RuntimeError) as e:
        return f"torch {torch.__version__} cannot compile for the device: {e}"
    return found


def available() -> bool:
    """Whether there is a device that these kernels run on."""
    return isinstance(_kernels(), dict)


def status() -> str:
    """One line: the device, or why none is used."""
    kernels = _kernels()
    why = kernels.splitlines()[0] if isinstance(kernels, str) else torch.cuda.get_device_name()
    return f"cuda quantizer: {why}"


def quantize(
    stored: NDArray[np.generic], dtype: str, encoding: Encoding, method: str
) -> tuple[dict[str, NDArray[np.generic]], float, float]:
    """``kernels.cpu.quantize.quantize``, to the bit. Only to be called if ``available``."""
    kernels = _kernels()
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
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
        numbers = [count, encoding.bits, encoding.group_size, _TYPES[encoding.dtype], starts]
    kernels[encoding.name](
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
