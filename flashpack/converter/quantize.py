"""Storing a source's values in an encoding, in blocks that stay in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashpack.converter.folder import Reader
from flashpack.converter.tensor import Arrays, SourceTensor
from flashpack.errors import SourceError
from flashpack.formats import constants as C
from flashpack.formats.dtypes import from_float32
from flashpack.formats.records import Encoding
from flashpack.kernels.cpu.quantize import quantize

BLOCK_VALUES = 2**17
"""Values decoded at a time: 512 KiB of float32, so that the passes over a block hit the L2 cache."""

RAW_BLOCK_VALUES = 2**21
"""Values quantized at a time straight from what is stored: large reads."""


@dataclass
class Error:
    """Squared error and squared norm of what has been quantized."""

    error: float = 0.0
    norm: float = 0.0

    def relative(self) -> float:
        """|decoded - source| / |source|, Frobenius norms."""
        return math.sqrt(self.error / self.norm) if self.norm else 0.0


def is_exact(source: SourceTensor, target: Encoding) -> bool:
    """Whether ``target`` holds the values of ``source`` exactly."""
    return source.encoding == target


Piece = tuple[str, slice, NDArray[np.generic]]
"""A stored part, some rows of it, and their content."""


def encode_blocks(folder: Reader, source: SourceTensor, target: Encoding, error: Error) -> Iterator[list[Piece]]:
    """Encode a 2-D tensor block by block, in order; what all rows share comes with the first block."""
    for start, count in block_rows(source, target):
        arrays = _encode(folder, source.rows(start, count), target, error)
        pieces = [(part, target.part_rows(part, start, start + count), array) for part, array in arrays.items()]
        yield [piece for piece in pieces if start == 0 or piece[1].start > 0]


def block_rows(source: SourceTensor, target: Encoding) -> Iterator[tuple[int, int]]:
    """First row and rows of each block that is encoded at a time."""
    rows, width = source.shape
    values = RAW_BLOCK_VALUES if _raw_dtype(source) and target.quantized else BLOCK_VALUES
    step = max(1, values // max(1, width))
    step = -(-step // source.block) * source.block if source.block else max(rows, 1)
    for start in range(0, rows, step):
        yield start, min(step, rows - start)


def _encode(folder: Reader, block: SourceTensor, target: Encoding, error: Error) -> Arrays:
    """The stored arrays of a matrix."""
    if is_exact(block, target):
        return block.stored(folder)
    if not target.quantized:
        return {"weight": from_float32(block.values(folder), target.dtype)}
    raw = _raw_dtype(block)
    values = block.stored(folder)["weight"] if raw else block.values(folder)
    arrays, squared, norm = quantize(values, raw or "F32", target, "minmax")
    if not math.isfinite(squared):
        raise SourceError(f"tensor {block.name}: infinite or NaN values cannot be quantized")
    error.error += squared
    error.norm += norm
    return arrays


def _raw_dtype(source: SourceTensor) -> str | None:
    """The type of the stored values if they are the values themselves, as BF16, F16 or F32."""
    encoding = source.encoding
    if encoding is None or encoding.name != "raw" or encoding.dtype not in C.RAW_DTYPES:
        return None
    return encoding.dtype
