"""Random stored matrices and records for tests of Metal kernels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flashpack.formats import Encoding, RecordKind
from flashpack.formats import constants as C
from flashpack.formats.dtypes import from_float32
from flashpack.formats.records import MXFP4, affine_dq, align, fp8, nvfp4
from flashpack.formats.writer import RecordBuffer
from flashpack.kernels import StoredMatrix
from flashpack.kernels.metal.layouts import parts_of
from tests.kernels.test_reference import random_matrix, stored, stored_matrix

AFFINE = [
    Encoding("affine", dtype, bits, group)
    for bits in C.AFFINE_BITS
    for group in C.GROUP_SIZES
    for dtype in C.SCALE_DTYPES
]
PLAIN = [Encoding("raw", dtype) for dtype in C.RAW_DTYPES]
FP8 = [
    *(fp8(dtype, (0, 0)) for dtype in C.FP8_SCALE_DTYPES),
    fp8("BF16", (1, 0)), fp8("F16", (0, 1)), fp8("E8M0", (1, 32)), fp8("F32", (128, 128)), fp8("BF16", (5, 7)),
    fp8("E8M0", (48, 0)), fp8("F16", (2, 16)),
]  # fmt: skip
DOUBLE = [affine_dq(bits) for bits in C.DQ_BITS]
EVERY = [*AFFINE, *DOUBLE, MXFP4, *map(nvfp4, C.GLOBAL_SCALES), *FP8, *PLAIN]
"""Encodings with all types of scales, groups and kinds of blocks."""

ONE_OF_EACH = [
    *(Encoding("affine", dtype, bits, group) for bits, group, dtype in
      zip(C.AFFINE_BITS, C.GROUP_SIZES * 2, C.SCALE_DTYPES * 2, strict=True)),
    *DOUBLE, MXFP4, nvfp4("multiply"), fp8("BF16", (1, 32)), *PLAIN,
]  # fmt: skip
"""One encoding for each format that has kernels of its own."""


def name_of(encoding: Encoding) -> str:
    return f"{encoding} {encoding.dtype} {encoding.global_scale}".strip()


def matrix(
    encoding: Encoding, rows: int, width: int, seed: int = 0, last: int = 0
) -> tuple[Tensor | StoredMatrix, np.ndarray]:
    """A matrix whose parts lie in one piece of memory, and its values; ``last``: which part is at its very end.

    Where values come in blocks, it has as many rows more as whole blocks need.
    """
    if encoding.name == "affine_dq":
        rows = align(rows, encoding.whole_rows(width))
    parts, values = random_matrix(rows, width, encoding, seed)
    if not encoding.quantized:
        return together([stored(parts["weight"], encoding.dtype)])[0], values
    arrays = parts_of(stored_matrix(parts, encoding, (rows, width)))
    names = list(arrays)
    names.append(names.pop(last % len(names)))
    placed = dict(zip(names, together([arrays[name] for name in names]), strict=True))
    return StoredMatrix.of(encoding, placed), values


def together(arrays: list[Tensor]) -> list[Tensor]:
    """Copies in one piece of memory, each at a multiple of 64 bytes, not at its beginning; the last one ends it."""
    starts, end = [], 3 * C.SECTION_ALIGNMENT
    for array in arrays:
        starts.append(align(end, C.SECTION_ALIGNMENT))
        end = starts[-1] + array.nbytes
    piece = torch.zeros(end, dtype=torch.uint8)
    found = []
    for array, start in zip(arrays, starts, strict=True):
        found.append(piece[start : start + array.nbytes].view(array.dtype).view(array.shape))
        found[-1].copy_(array)
    return found


def record(kind: RecordKind, seed: int = 0) -> Tensor:
    """The bytes of a record of random matrices and biases, uint8 [stride]."""
    buffer = RecordBuffer(kind)
    generator = np.random.default_rng(seed)
    for i, p in enumerate(kind.projections):
        for part, array in random_matrix(*p.shape, p.encoding, seed=10 * seed + i)[0].items():
            section = buffer.sections[f"{p.name}.{part}"]
            section[:] = array.view(section.dtype).reshape(section.shape)
        if p.bias:
            bias = from_float32(generator.standard_normal(p.shape[0]).astype(np.float32), p.bias)
            section = buffer.sections[f"{p.name}.bias"]
            section[:] = bias.view(section.dtype).reshape(section.shape)
    return torch.from_numpy(buffer.data)


def states(tokens: int, width: int, seed: int = 0) -> Tensor:
    """float32 [tokens, width]"""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
