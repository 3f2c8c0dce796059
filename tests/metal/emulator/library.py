"""Kernels with the call rules of ``torch.mps.compile_shader``: what it refuses or misreads is refused."""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import build, source

MOST_BUFFERS = 31
MOST_THREADS = 1024  # of a group
MOST_THREADGROUP_BYTES = 32768
MOST_INLINE_BYTES = 4096  # of numbers that are no tensor
ORDERS = {"forward": 0, "reversed": 1, "random": 2}
CASTS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
# What may be bound to a pointer to a type; Metal itself would read any bytes. Types not here are the source's own.
MEANT = {
    "float": {torch.float32},
    "half": {torch.float16},
    "bfloat": {torch.bfloat16},
    "char": {torch.int8},
    "uchar": {torch.uint8},
    "bool": {torch.bool},
    "short": {torch.int16},
    "ushort": {torch.int16, torch.uint16},
    "int": {torch.int32},
    "uint": {torch.int32, torch.uint32},
    "long": {torch.int64},
    "ulong": {torch.int64, torch.uint64},
}
SYNONYMS = {"int8_t": "char", "uint8_t": "uchar", "int16_t": "short", "uint16_t": "ushort"} | {
    "int32_t": "int",
    "uint32_t": "uint",
    "atomic_int": "int",
    "atomic_uint": "uint",
    "atomic_float": "float",
}


class Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("written", ctypes.c_uint32),
    )


class Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("body", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(Buffer)),
        ("count", ctypes.c_uint32),
        ("threads", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("order", ctypes.c_uint32),
        ("guard", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
    )


class Runtime:
    """The library that runs kernels, one launch at a time."""

    lock = threading.Lock()
    library: ctypes.CDLL | None = None

    @classmethod
    def load(cls) -> ctypes.CDLL:
        with cls.lock:
            if cls.library is None:
                cls.library = ctypes.CDLL(str(build.runtime()), ctypes.RTLD_GLOBAL)  # kernels call its functions
            return cls.library

    @classmethod
    def run(cls, launch: Launch) -> None:
        error = ctypes.create_string_buffer(640)
        library = cls.load()
        with cls.lock:
            if library.metal_launch(ctypes.byref(launch), error, len(error)):
                raise RuntimeError(error.value.decode())


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Launches may take no longer than this of the processor's time."""
    limit = ctypes.c_uint.in_dll(Runtime.load(), "metal_seconds")
    before, limit.value = limit.value, seconds
    try:
        yield
    finally:
        limit.value = before


@functools.cache
def loaded(text: str, strict: bool) -> tuple[ctypes.CDLL, dict[str, source.Kernel]]:
    Runtime.load()
    return ctypes.CDLL(str(build.compiled(text, strict))), {k.name: k for k in source.kernels(build.preprocess(text))}


Submit = Callable[[Callable[[int, int, int], None], list[Tensor]], None]


class Library:
    """Attributes are kernels. ``submit(run, tensors)`` decides when ``run(order, guard, seed)`` is called."""

    def __init__(self, text: str, submit: Submit, strict: bool = True) -> None:
        if not text.isascii():
            raise SyntaxError("the source is not ASCII: torch hands it to Metal as ASCII")
        self.binary, self._kernels = loaded(text, strict)
        self._submit = submit

    def __getattr__(self, name: str) -> Kernel:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._kernels:
            raise RuntimeError(f"Failed to create function state object for: {name}")
        return Kernel(self.binary, self._kernels[name], self._submit)

    def __dir__(self) -> list[str]:
        return sorted(self._kernels)


class Kernel:
    max_threads_per_threadgroup = MOST_THREADS
    thread_execution_width = 32

    def __init__(self, library: ctypes.CDLL, kernel: source.Kernel, submit: Submit) -> None:
        self.name = kernel.name
        self._kernel = kernel
        self._body = ctypes.cast(library[f"emulated_launch_{kernel.name}"], ctypes.c_void_p)
        self._submit = submit
        self.static_thread_group_memory_length = int(library[f"emulated_bytes_{kernel.name}"]())
        if self.static_thread_group_memory_length > MOST_THREADGROUP_BYTES:
            raise RuntimeError(
                f"kernel {self.name}: {self.static_thread_group_memory_length} bytes of threadgroup memory, "
                f"Metal has {MOST_THREADGROUP_BYTES}"
            )

    def __call__(
        self,
        *arguments: Any,
        threads: int | Sequence[int] | None = None,
        group_size: int | Sequence[int] | None = None,
        arg_casts: str | dict[int, str] | None = None,
    ) -> None:
        parameters = self._kernel.buffers
        if len(arguments) != len(parameters) or len(arguments) > MOST_BUFFERS:
            names = ", ".join(p.name for p in parameters)
            raise TypeError(f"kernel {self.name}: {len(arguments)} arguments for the buffers {names}")
        tensors = []
        for i, (value, parameter) in enumerate(zip(arguments, parameters, strict=True)):
            cast = arg_casts if arg_casts is None or isinstance(arg_casts, str) else arg_casts.get(i)
            try:
                tensors.append(as_tensor(value, parameter, cast))
            except (TypeError, ValueError) as e:
                raise type(e)(f"kernel {self.name}: argument {i} '{parameter.name}': {e}") from None
        if threads is None and isinstance(arguments[0], Tensor):
            threads = arguments[0].numel()
        size, group = self._grid(threads, group_size)

        def run(order: int, guard: int, seed: int) -> None:
            buffers = (Buffer * len(tensors))(*map(buffer_of, tensors, parameters))
            launch = Launch(
                self.name.encode(), self._body, buffers, len(tensors), triple(size), triple(group), order, guard, seed
            )
            Runtime.run(launch)

        self._submit(run, tensors)

    def _grid(
        self, threads: int | Sequence[int] | None, group_size: int | Sequence[int] | None
    ) -> tuple[list[int], list[int]]:
        size = [threads] if isinstance(threads, int) else list(threads or ())
        if not 1 <= len(size) <= 3 or min(size) < 1:
            raise RuntimeError(f"kernel {self.name}: threads={threads}: one to three positive numbers")
        if group_size is None:
            group = [min(size[0], MOST_THREADS) if len(size) == 1 else MOST_THREADS, *[1] * (len(size) - 1)]
        else:
            group = [group_size] if isinstance(group_size, int) else list(group_size)
        if len(group) != len(size) or min(group) < 1:
            raise RuntimeError(f"kernel {self.name}: group_size={group_size} for threads={threads}")
        if math.prod(group) > MOST_THREADS:
            raise ValueError(f"kernel {self.name}: Threadgroup size exceeds {MOST_THREADS} limit")
        return size, group


def as_tensor(value: Any, parameter: source.Parameter, cast: str | None) -> Tensor:
    """What is bound for an argument: a tensor itself, or numbers as torch would send them."""
    base = SYNONYMS.get(parameter.base, parameter.base).rstrip("234")
    meant = MEANT.get(base)
    if not isinstance(value, Tensor):
        numbers = list(value) if isinstance(value, (list, tuple)) else [value]
        if not numbers or not all(isinstance(n, (int, float)) for n in numbers):
            raise TypeError(f"Unsupported argument type {type(value).__name__}")
        number_type = torch.float32 if isinstance(numbers[0], float) else torch.int64
        value = torch.tensor(numbers, dtype=number_type if cast is None else CASTS[cast])
        if value.nbytes > MOST_INLINE_BYTES:
            raise ValueError(f"{value.nbytes} bytes of numbers, {MOST_INLINE_BYTES} at most: give a tensor")
    if value.dtype == torch.float64:
        raise TypeError("Metal has no float64")
    if meant is not None and value.dtype not in meant:
        raise TypeError(f"{value.dtype} bound to '{parameter.type}'")
    if not value.is_contiguous():
        raise ValueError("not contiguous: Metal is given an offset and no strides")
    if value.device.type != "cpu" or value.layout is not torch.strided:
        raise TypeError(f"a tensor of {value.device} that the GPU cannot see")
    return value


def buffer_of(tensor: Tensor, parameter: source.Parameter) -> Buffer:
    return Buffer(tensor.data_ptr(), tensor.nbytes, parameter.name.encode(), parameter.written)


def triple(numbers: list[int]) -> Any:
    return (ctypes.c_uint32 * 3)(*numbers, *[1] * (3 - len(numbers)))
