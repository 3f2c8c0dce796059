"""The compute kernels in C++ (kernels.cpp), called with addresses of arrays; calls let other threads run meanwhile."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

from flashpack.kernels.cpu.native.library import load

ABI = 6
"""What `flashpack_kernels_abi` must answer: a library left by another version is not used."""

FUNCTIONS = {"linear": 0, "add_norm": 1, "attend": 2, "delta": 3, "route": 4, "combine": 5, "resident": 6, "row": 7}
"""What may be part of a sequence, by the numbers of kernels.h."""

MOST_RESIDENT = 64
"""Networks of a token that ``resident`` computes, by FP_MOST_RESIDENT of kernels.h."""

KINDS = {"BF16": 0, "F16": 1, "F32": 2, "affine": 3, "mxfp4": 4, "affine_dq": 3}
NIBBLES = 5
"""How a matrix is stored, and the type of the scales of ``affine_dq``, by the numbers of kernels.h."""


class Matrix(ctypes.Structure):
    """``fp_matrix`` of kernels.h."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("add", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("add_type", ctypes.c_int32),
        ("coarse", ctypes.c_int32),
    ]


class Expert(ctypes.Structure):
    """``fp_expert`` of kernels.h."""

    _fields_ = [("first", Matrix), ("second", Matrix), ("down", Matrix), ("gated", ctypes.c_int64)]


class Attention(ctypes.Structure):
    """``fp_attention`` of kernels.h."""

    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("rotary", ctypes.c_int32),
        ("query_stride", ctypes.c_int32),
        ("gate", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


class Delta(ctypes.Structure):
    """``fp_delta`` of kernels.h."""

    _fields_ = [
        ("window", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("filter", ctypes.c_void_p),
        ("filter_bias", ctypes.c_void_p),
        ("rate", ctypes.c_void_p),
        ("rate_bias", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("key_heads", ctypes.c_int32),
        ("value_heads", ctypes.c_int32),
        ("key_width", ctypes.c_int32),
        ("value_width", ctypes.c_int32),
        ("taps", ctypes.c_int32),
        ("key_stride", ctypes.c_int32),
        ("value_stride", ctypes.c_int32),
        ("number_stride", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
    ]


class Resident(ctypes.Structure):
    """``fp_resident`` of kernels.h."""

    _fields_ = [
        ("experts", ctypes.c_void_p),
        ("beside", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("beside_count", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("function", ctypes.c_int32),
        ("limit", ctypes.c_float),
        ("seconds", ctypes.c_double),
    ]


class Call(ctypes.Structure):
    """``fp_step`` of kernels.h."""

    _fields_ = [
        ("pointers", ctypes.c_void_p * 8),
        ("numbers", ctypes.c_int64 * 4),
        ("function", ctypes.c_int32),
        ("real", ctypes.c_float),
    ]


def address(expert: Expert) -> int:
    """Where an expert's description lies; it must be kept."""
    return ctypes.addressof(expert)


def declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions; ``OSError`` if it was built from another version."""
    try:
        if found.flashpack_kernels_abi() != ABI:
            raise OSError("_kernels was built from another version; install flashpack again")
        pointer, number, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        found.flashpack_kernels_level_name.restype = ctypes.c_char_p
        found.flashpack_workers.restype = pointer
        found.flashpack_workers.argtypes = [number, number]
        found.flashpack_linear.argtypes = [pointer, pointer, wide, pointer, number, pointer]
        found.flashpack_experts.argtypes = [
            pointer, pointer, wide, pointer, pointer, number, pointer, number, ctypes.c_float, pointer,
        ]  # fmt: skip
        found.flashpack_combine.argtypes = [pointer, pointer, pointer, pointer, wide, wide, wide, pointer]
        found.flashpack_combine.restype = None
        found.flashpack_run.argtypes = [pointer, pointer, number]
    except AttributeError as e:
        raise OSError(str(e)) from e
    return found


@functools.cache
def library() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        return declared(load("_kernels"))
    except OSError as e:
        return str(e)


def best_level() -> int | None:
    """The number of the best instruction set that the processor has; None without the library."""
    found = library()
    return None if isinstance(found, str) else int(found.flashpack_kernels_level())


def status() -> str:
    """One line: which instruction set is used, or why the native kernels are missing."""
    found = library()
    if isinstance(found, str):
        return f"native kernels: {found}; torch is used, which is several times slower"
    return f"native kernels: {found.flashpack_kernels_level_name(best_level()).decode()}"


class Workers:
    """Threads with working memory. Arguments are addresses (``data_ptr()``) of contiguous float32 and int32 arrays.

    ``level``: a number up to ``best_level()``, 0 for plain C++; by default the best. ``found``: a ``declared`` library,
    by default ``library``, without which this is not to be made. Kept for the life of the process.
    """

    def __init__(self, threads: int, level: int | None = None, found: ctypes.CDLL | str | None = None) -> None:
        found = library() if found is None else found
        if isinstance(found, str):
            raise RuntimeError(found)
        self.library = found
        level = found.flashpack_kernels_level() if level is None else level
        self.name: str = found.flashpack_kernels_level_name(level).decode()
        self.handle = found.flashpack_workers(threads, level)
        if self.handle is None:
            raise RuntimeError(f"no memory, or no instruction set {level}")

    def linear(self, x: int, tokens: int, matrix: Matrix, out: int) -> None:
        """x [tokens, width] times the transpose of ``matrix`` -> out [tokens, rows]."""
        self._check(
            self.library.flashpack_linear(
                self.handle, x, tokens, ctypes.byref(matrix), 1, ctypes.byref(ctypes.c_void_p(out))
            )
        )

    def experts(
        self, x: int, tokens: int, experts: Sequence[int], counts: int, rows: int, function: int, limit: float, out: int
    ) -> None:
        """Networks of ``experts`` (addresses of ``Expert``): the first gets the rows of x [tokens, width] that the
        first counts[0] entries of ``rows`` name, and so on. out [sum of counts, width]."""
        addresses = (ctypes.c_void_p * len(experts))(*experts)
        self._check(
            self.library.flashpack_experts(
                self.handle, x, tokens, addresses, counts, len(experts), rows, function, limit, out
            )
        )

    def combine(self, outputs: int, places: int, weights: int, tokens: int, top_k: int, width: int, out: int) -> None:
        """Sums over k, in order, of rows places [tokens, top_k] of outputs times weights [tokens, top_k] -> out."""
        self.library.flashpack_combine(self.handle, outputs, places, weights, tokens, top_k, width, out)

    def _check(self, status: int) -> None:
        if status == -2:
            raise MemoryError("no memory for the kernels' working space")
        if status:
            raise ValueError("the kernels do not know such a matrix")


@functools.cache
def workers(threads: int) -> Workers:
    """The process's ``threads`` threads on the best instruction set."""
    return Workers(threads)
