"""What the self-test computes with Metal's kernels, and with torch on the processor to compare: products and experts.

A case answers with pairs of what was found and what was expected, both on the processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from flashpack.formats import constants as C
from flashpack.formats.records import MXFP4, Encoding, Projection, RecordKind, fp8, nvfp4
from flashpack.kernels.activations import named
from flashpack.kernels.cpu.reference import ReferenceKernels
from flashpack.kernels.interface import ACTIVATIONS, Activation, Kernels, RecordView, StoredMatrix

PRODUCT = 1e-5
"""Largest error: the largest difference, relative to the largest value expected. Sums in another order and fused
multiplications differ by a few roundings of float32, 6e-8 each; what is wrong differs by far more than this."""

EXPERT = 3e-5
"""Of two products and an activation, whose exponential Metal may have 4 roundings off."""

DECODED = 1e-6
"""Of single values: a fused multiplication and addition is not rounded in between."""

SAME = 0.0

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
ENCODINGS = (*RAW, *AFFINE, *FLOATS)
"""Every number format with every kind of scale; each type and size of group at least once with each number of bits."""

ROWS, WIDTH, ODD_WIDTH = 70, 384, 77
"""Of matrices: no multiple of the rows of a SIMD group; a multiple of all sizes of groups, and of nothing."""

MANY = 11
"""Tokens: more than one tile of 8, and not two."""

REFERENCE = ReferenceKernels(1)

_FLOAT_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Pairs = list[tuple[Tensor, Tensor]]


class Case(Protocol):
    """``run`` computes with ``kernels``; the error may be up to ``tolerance``.

    ``alone``: a wrong result speaks against the kernels that were launched. Otherwise against what they have in common.
    """

    tolerance: ClassVar[float]
    alone: ClassVar[bool]

    @property
    def name(self) -> str: ...

    def run(self, kernels: Kernels) -> Pairs: ...


class Samples:
    """Random data on the processor, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def integers(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """From low to high - 1."""
        return torch.randint(low, high, tuple(shape), generator=self._generator, dtype=torch.int64).to(dtype)

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
        if dtype == "U8":  # exponents about 0; of nvfp4, floats
            return self.integers(*((0x30, 0x41) if encoding.name == "nvfp4" else (122, 131)), shape, torch.uint8)
        values = self.normal(*shape)
        if encoding.name == "affine":  # codes of many bits are large
            values /= 2 ** (encoding.bits - 2)
        return values.to(_FLOAT_TYPES[dtype])

    def record(self, kind: RecordKind) -> Tensor:
        """A record's bytes [stride]."""
        bytes_ = torch.zeros(kind.stride, dtype=torch.uint8)
        parts: dict[str, Tensor] = {}
        for p in kind.projections:
            matrix = self.matrix(p.encoding, *p.shape)
            stored = {"weight": matrix} if isinstance(matrix, Tensor) else _parts(matrix)
            parts |= {f"{p.name}.{part}": array for part, array in stored.items()}
            if p.bias:
                parts[f"{p.name}.bias"] = self.normal(p.shape[0]).to(_FLOAT_TYPES[p.bias])
        for section in kind.sections:
            array = parts[section.name].contiguous().view(torch.uint8).view(-1)
            bytes_[section.offset : section.offset + section.nbytes] = array
        return bytes_


def _parts(matrix: StoredMatrix) -> Mapping[str, Tensor]:
    found = {"weight": matrix.weight, "scales": matrix.scales, "biases": matrix.biases, "global": matrix.global_scale}
    return {part: array for part, array in found.items() if array is not None}


def to(device: torch.device, matrix: Tensor | StoredMatrix) -> Tensor | StoredMatrix:
    """A matrix on ``device``."""
    if isinstance(matrix, Tensor):
        return matrix.to(device)
    return StoredMatrix.of(matrix.encoding, {part: array.to(device) for part, array in _parts(matrix).items()})


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


@dataclass(frozen=True)
class Product:
    """``tokens`` times a matrix."""

    encoding: Encoding
    tokens: int
    tolerance: ClassVar = PRODUCT
    alone: ClassVar = True

    @property
    def name(self) -> str:
        return f"product, {self.encoding}, {self.tokens} tokens"

    def run(self, kernels: Kernels) -> Pairs:
        matrix, x = _operands(self.encoding, self.tokens)
        return [(_linear(kernels, x, matrix), REFERENCE.linear(x, matrix))]


@dataclass(frozen=True)
class Company:
    """A token's product with a matrix, computed alone and beside others: the same bits."""

    encoding: Encoding
    tolerance: ClassVar = SAME
    alone: ClassVar = False

    @property
    def name(self) -> str:
        return f"product alone and beside others, {self.encoding}"

    def run(self, kernels: Kernels) -> Pairs:
        matrix, x = _operands(self.encoding, MANY)
        together = _linear(kernels, x, matrix)
        return [(_linear(kernels, x[i : i + 1], matrix), together[i : i + 1]) for i in (0, 4, MANY - 1)]


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix, by number."""

    encoding: Encoding
    tolerance: ClassVar = DECODED
    alone: ClassVar = True

    @property
    def name(self) -> str:
        return f"rows, {self.encoding}"

    def run(self, kernels: Kernels) -> Pairs:
        matrix, _ = _operands(self.encoding, 1)
        ids = torch.tensor([[0, ROWS - 1, 3], [3, 17, 64]])
        found = kernels.embedding(ids.to(kernels.device), to(kernels.device, matrix), torch.float32)
        return [(found.cpu(), REFERENCE.embedding(ids, matrix, torch.float32))]


@dataclass(frozen=True)
class Experts:
    """Three experts with one, few and many tokens, as in a prompt."""

    name: str
    kind: RecordKind
    activation: Activation
    tolerance: ClassVar = EXPERT
    alone: ClassVar = True

    def run(self, kernels: Kernels) -> Pairs:
        samples = Samples(len(self.name))
        records = [samples.record(self.kind) for _ in range(3)]
        rows = [[0], [8, 2, 3], [*range(MANY), 3]]
        x = samples.normal(MANY, self.kind.projections[-1].shape[0])
        found = torch.zeros(sum(map(len, rows)), x.shape[1], device=kernels.device)
        kernels.experts(x.to(kernels.device), in_arena(kernels, self.kind, records), rows, self.activation, found)
        expected = torch.zeros(found.shape)
        views = [REFERENCE.view_record(record, self.kind) for record in records]
        REFERENCE.experts(x, views, rows, self.activation, expected)
        return [(found.cpu(), expected)]


@dataclass(frozen=True)
class Sums:
    """Weighted sums of experts' results, some of which are missing."""

    tolerance: ClassVar = PRODUCT
    alone: ClassVar = True
    name = "sums of experts"

    def run(self, kernels: Kernels) -> Pairs:
        samples = Samples(5)
        outputs, weights = samples.normal(13, ROWS), samples.normal(MANY, 8)
        places = samples.integers(-2, 13, weights.shape, torch.int32)
        found = kernels.combine(*(t.to(kernels.device) for t in (outputs, places, weights)))
        return [(found.cpu(), REFERENCE.combine(outputs, places, weights))]


def _operands(encoding: Encoding, tokens: int) -> tuple[Tensor | StoredMatrix, Tensor]:
    samples = Samples(encoding.bits + encoding.group_size)
    width = WIDTH if encoding.group_size else ODD_WIDTH
    return samples.matrix(encoding, ROWS, width), samples.normal(tokens, width)


def _linear(kernels: Kernels, x: Tensor, matrix: Tensor | StoredMatrix) -> Tensor:
    return kernels.linear(x.to(kernels.device), to(kernels.device, matrix)).cpu()


def cases() -> Iterator[Case]:
    """All of them."""
    for encoding in ENCODINGS:
        yield Product(encoding, 1)
        yield Product(encoding, MANY)
        yield Rows(encoding)
    for name, kind, activation in kinds():
        yield Experts(f"experts, {name}", kind, activation)
    yield Sums()
    for encoding in ENCODINGS:
        yield Company(encoding)
