"""Random matrices and records of every kind, on the processor and on the device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flashpack.formats import constants as C
from flashpack.formats.records import MXFP4, Encoding, Projection, RecordKind, affine_dq, align, fp8, nvfp4
from flashpack.kernels.activations import named
from flashpack.kernels.interface import ACTIVATIONS, Activation, Kernels, RecordView, StoredMatrix
from flashpack.kernels.metal.layouts import parts_of

RAW = tuple(Encoding("raw", dtype) for dtype in C.RAW_DTYPES)
AFFINE = tuple(
    Encoding("affine", C.SCALE_DTYPES[(i + j) % 3], bits, group)
    for i, bits in enumerate(C.AFFINE_BITS)
    for j, group in enumerate(C.GROUP_SIZES)
)
FLOATS = (
    MXFP4, *map(nvfp4, C.GLOBAL_SCALES), fp8("F32", (0, 0)), fp8("BF16", (1, 0)), fp8("F16", (0, 1)),
    fp8("E8M0", (1, 32)), fp8("F32", (128, 128)), fp8("BF16", (5, 7)),
)  # fmt: skip
ENCODINGS = (*RAW, *AFFINE, *map(affine_dq, C.DQ_BITS), *FLOATS)
"""Every number format with every kind of scale; each type and size of group at least once with each number of bits."""

ROWS, WIDTH, ODD_WIDTH = 70, 384, 77
"""Of matrices: no multiple of the rows of a SIMD group; a multiple of all sizes of groups, and of nothing."""

MANY = 11
"""Tokens: more than one tile of 8, and not two."""

_FLOAT_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Samples:
    """Random data on the processor, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def integers(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """From low to high - 1."""
        return torch.randint(low, high, tuple(shape), generator=self._generator, dtype=dtype)

    def matrix(self, encoding: Encoding, rows: int, width: int) -> Tensor | StoredMatrix:
        """Any codes, but for NaN; scales such that values are about 1."""
        parts = {part: self._part(encoding, part, *kind) for part, kind in encoding.parts((rows, width)).items()}
        return StoredMatrix.of(encoding, parts) if encoding.quantized else parts["weight"]

    def _part(self, encoding: Encoding, part: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        if dtype == "U32":
            return self.integers(-(2**31), 2**31, shape, torch.int32)
        if part == "weight" and dtype == "U8":
            codes = self.integers(0, 256, shape, torch.uint8)
            return torch.where(codes & 127 == 127, 0x38, codes)
        if encoding.name == "affine_dq" and part == "scales":
            return self.integers(0, 256, shape, torch.uint8)
        if dtype == "U8":  # exponents; of nvfp4, floats
            low = {"nvfp4": 0x30, "mxfp4": 122, "fp8_e4m3": 116}[encoding.name]
            return self.integers(low, low + (17 if encoding.name == "nvfp4" else 9), shape, torch.uint8)
        # Codes of many bits are large numbers.
        affine = 2.0 ** (encoding.bits - 2)
        largest = {"affine": affine, "affine_dq": 8 * affine, "fp8_e4m3": 64.0}.get(encoding.name, 1.0)
        return (self.normal(*shape) / largest).to(_FLOAT_TYPES[dtype])

    def record(self, kind: RecordKind) -> Tensor:
        """A record's bytes [stride]."""
        bytes_ = torch.zeros(kind.stride, dtype=torch.uint8)
        parts: dict[str, Tensor] = {}
        for p in kind.projections:
            matrix = self.matrix(p.encoding, *p.shape)
            parts |= {f"{p.name}.{part}": array for part, array in parts_of(matrix).items()}
            if p.bias:
                parts[f"{p.name}.bias"] = self.normal(p.shape[0]).to(_FLOAT_TYPES[p.bias])
        for section in kind.sections:
            array = parts[section.name].contiguous().view(torch.uint8).view(-1)
            bytes_[section.offset : section.offset + section.nbytes] = array
        return bytes_


def to(device: torch.device, matrix: Tensor | StoredMatrix) -> Tensor | StoredMatrix:
    """A matrix on ``device``."""
    return together(device, [matrix])[0]


def together(device: torch.device, matrices: Sequence[Tensor | StoredMatrix]) -> list[Tensor | StoredMatrix]:
    """Matrices in one piece of memory of ``device``, as those of a dense file are."""
    stored = [parts_of(m) for m in matrices]
    arrays = [array for parts in stored for array in parts.values()]
    starts = list(itertools.accumulate((align(array.nbytes, C.SECTION_ALIGNMENT) for array in arrays), initial=0))
    memory = torch.zeros(starts[-1], dtype=torch.uint8, device=device)
    views = []
    for array, start in zip(arrays, starts, strict=False):
        views.append(memory[start : start + array.nbytes].view(array.dtype).view(array.shape))
        views[-1].copy_(array)
    left = iter(views)
    placed = [{part: next(left) for part in parts} for parts in stored]
    return [
        parts["weight"] if isinstance(m, Tensor) else StoredMatrix.of(m.encoding, parts)
        for m, parts in zip(matrices, placed, strict=True)
    ]


def in_arena(kernels: Kernels, kind: RecordKind, records: Sequence[Tensor]) -> list[RecordView]:
    """Records written to the device's memory as the expert store does it."""
    arena = kernels.arena(kind.stride * len(records))
    views = []
    for i, record in enumerate(records):
        start = i * kind.stride
        room = arena.room(start, kind.stride)
        torch.frombuffer(room, dtype=torch.uint8).copy_(record)
        arena.landed(start, room)
        views.append(kernels.view_record(arena.tensor[start : start + kind.stride], kind))
    return views


def kinds() -> Iterator[tuple[str, RecordKind, Activation]]:
    """Experts of every encoding, activation and type of bias, with gate and up as one matrix and as two, and without
    a gate."""
    hidden, inner = 128, 96

    def kind(gate: Encoding | None, up: Encoding, down: Encoding, bias: str = "") -> RecordKind:
        first = [Projection("gate", (inner, hidden), gate, bias)] if gate else []
        return RecordKind(
            (*first, Projection("up", (inner, hidden), up, bias), Projection("down", (hidden, inner), down, bias))
        )

    small, other = Encoding("affine", "BF16", 4, 32), Encoding("affine", "F16", 3, 32)
    for i, encoding in enumerate(e for e in ENCODINGS if e.name != "affine" or e.group_size == 32):
        activation = named(ACTIVATIONS[i % len(ACTIVATIONS)], True, 7.0)
        yield f"{encoding}, {activation.name}", kind(encoding, encoding, encoding), activation
    for bias in C.BIAS_DTYPES:
        activation = named("swiglu_oai", True, 7.0)
        yield f"{MXFP4}, biases {bias.lower()}", kind(MXFP4, MXFP4, MXFP4, bias), activation
    yield (
        "gate and up of two encodings",
        kind(other, small, small, "F32"),
        named("silu", True),
    )
    yield "without a gate", kind(None, small, small), named("relu2", False)
