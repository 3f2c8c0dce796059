"""Native routines in C, built at installation where there is a compiler. Without them numpy does the same, slower.

What is built is a plain library, loaded here with ctypes. Results are the same to the bit with it and without.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
from numpy.typing import NDArray

from flashpack.formats.dtypes import ITEMSIZE, NUMPY
from flashpack.formats.records import Encoding
from flashpack.kernels.cpu.native.library import load

ABI = 3
"""What `flashpack_abi` in quantize.c must answer: a library left by another version is not used."""

LEVELS = ("portable", "avx2")
"""Instruction sets, by the number that the library gives them."""

METHODS = ("minmax", "starts")
"""Ways to round, by the number that the library gives them."""

_TYPES = {"BF16": 0, "F16": 1, "F32": 2}


class _Library:
    """The loaded library. ``OSError`` says why there is none."""

    def __init__(self) -> None:
        library = load("_quantize")
        if library.flashpack_abi() != ABI:
            raise OSError("_quantize was built from another version; install flashpack again")
        self.level: int = library.flashpack_level()
        self.affine = library.flashpack_quantize
        self.affine_dq = library.flashpack_quantize_dq
        number, pointer = ctypes.c_int, ctypes.c_void_p
        self.affine.argtypes = [pointer, number, ctypes.c_size_t, *[number] * 4, *[pointer] * 4, number]
        self.affine_dq.argtypes = [pointer, number, ctypes.c_size_t, *[number] * 2, *[pointer] * 4, number]


@functools.cache
def _load() -> _Library | str:
    """The library, or why there is none."""
    try:
        return _Library()
    except (OSError, AttributeError) as e:
        return str(e)


def available() -> bool:
    """Whether the native routines can be used."""
    return isinstance(_load(), _Library)


def status() -> str:
    """One line: which instruction set is used, or why the native routines are missing."""
    library = _load()
    if isinstance(library, str):
        return f"native quantizer: {library}; numpy is used, which is many times slower"
    return f"native quantizer: {LEVELS[library.level]}"


def quantize(
    stored: NDArray[np.generic], dtype: str, encoding: Encoding, method: str, level: int | None = None
) -> tuple[dict[str, NDArray[np.generic]], float, float]:
    """``kernels.cpu.quantize.quantize``, to the bit. Other threads run meanwhile. Only to be called if ``available``.

    ``level``: a number of ``LEVELS`` that the processor has, by default the best.
    """
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    level = library.level if level is None else level
    stored = np.ascontiguousarray(stored)
    if level > library.level or stored.dtype.itemsize != ITEMSIZE[dtype] or stored.ndim != 2:
        raise ValueError(f"level {level}, {dtype} as {stored.dtype} {stored.shape}")
    parts = {name: np.empty(shape, NUMPY[kind]) for name, (kind, shape) in encoding.parts(stored.shape).items()}
    sums = np.zeros(2)
    arrays = [array.ctypes.data for array in (*parts.values(), sums)]
    source = (stored.ctypes.data, _TYPES[dtype], stored.size)
    if encoding.name == "affine_dq":
        result = library.affine_dq(*source, encoding.bits, METHODS.index(method), *arrays, level)
    else:
        kind = (encoding.bits, encoding.group_size, _TYPES[encoding.dtype], METHODS.index(method))
        result = library.affine(*source, *kind, *arrays, level)
    if result:
        raise ValueError(f"{encoding}: not for this routine")
    return parts, float(sums[0]), float(sums[1])
