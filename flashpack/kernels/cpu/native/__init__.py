"""Native routines in C, built at installation where there is a compiler. Without them numpy does the same, slower.

What is built is a plain library, loaded here with ctypes. Results are the same to the bit with it and without.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np
from numpy.typing import NDArray

from flashpack.formats.dtypes import ITEMSIZE, NUMPY
from flashpack.kernels.cpu.native.library import load

ABI = 1
"""What `flashpack_abi` in quantize.c must answer: a library left by another version is not used."""

LEVELS = ("portable", "avx2")
"""Instruction sets, by the number that the library gives them."""

_TYPES = {"BF16": 0, "F16": 1, "F32": 2}


class _Library:
    """The loaded library. ``OSError`` says why there is none."""

    def __init__(self) -> None:
        library = load("_quantize")
        if library.flashpack_abi() != ABI:
            raise OSError("_quantize was built from another version; install flashpack again")
        self.level: int = library.flashpack_level()
        self.quantize = library.flashpack_quantize
        number, pointer = ctypes.c_int, ctypes.c_void_p
        self.quantize.argtypes = [
            pointer, number, ctypes.c_size_t, number, number, number, pointer, pointer, pointer, pointer, number,
        ]  # fmt: skip


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
        return f"native quantizer: {library}; numpy is used, which is several times slower"
    return f"native quantizer: {LEVELS[library.level]}"


def quantize(
    stored: NDArray[np.generic], dtype: str, bits: int, group_size: int, scale_dtype: str, level: int | None = None
) -> tuple[NDArray[np.uint32], NDArray[np.generic], NDArray[np.generic], float, float]:
    """``affine.quantize`` of [rows, I] values as stored (``NUMPY[dtype]``; BF16, F16 or F32), to the bit.

    Returns words uint32 [rows, I*bits/32], scales and biases [rows, I/group_size], the sum of squared errors (not
    finite exactly if a value or what it decodes to is not) and of squared values. ``level``: a number of ``LEVELS``
    that the processor has, by default the best. Other threads run meanwhile. Only to be called if ``available``.
    """
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    level = library.level if level is None else level
    rows, width = stored.shape
    stored = np.ascontiguousarray(stored)
    if level > library.level or width % group_size or stored.dtype.itemsize != ITEMSIZE[dtype]:
        raise ValueError(f"level {level}, {dtype} as {stored.dtype} {stored.shape} in groups of {group_size}")
    words = np.empty((rows, width * bits // 32), dtype="<u4")
    scales, biases = (np.empty((rows, width // group_size), dtype=NUMPY[scale_dtype]) for _ in range(2))
    sums = np.zeros(2)
    arrays = [a.ctypes.data for a in (words, scales, biases, sums)]
    source = stored.ctypes.data
    if library.quantize(source, _TYPES[dtype], stored.size, bits, group_size, _TYPES[scale_dtype], *arrays, level):
        raise ValueError(f"no such encoding: {bits} bits in groups of {group_size}")
    return words, scales, biases, float(sums[0]), float(sums[1])
