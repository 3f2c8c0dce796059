"""Storing a source's values in an encoding, in blocks that stay in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashpack.converter.folder import SourceFolder
from flashpack.converter.tensor import Arrays, SourceTensor
from flashpack.errors import SourceError
from flashpack.formats import affine
from flashpack.formats.dtypes import from_float32
from flashpack.formats.records import Encoding

BLOCK_VALUES = 2**17
"""Values quantized at a time: 512 KiB of float32, so that the passes over a block hit the L2 cache."""


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


def encode_blocks(folder: SourceFolder, source: SourceTensor, target: Encoding, error: Error) -> Iterator[list[Piece]]:
    """Encode a 2-D tensor block by block, in order; what all rows share comes with the first block."""
    rows, width = source.shape
    step = max(1, BLOCK_VALUES // max(1, width))
    step = -(-step // source.block) * source.block if source.block else max(rows, 1)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        arrays = _encode(folder, source.rows(start, count), target, error)
        pieces = [(part, target.part_rows(part, start, start + count), array) for part, array in arrays.items()]
        yield [piece for piece in pieces if start == 0 or piece[1].start > 0]


def _encode(folder: SourceFolder, block: SourceTensor, target: Encoding, error: Error) -> Arrays:
    """The stored arrays of a matrix."""
    if is_exact(block, target):
        return block.stored(folder)
    values = block.values(folder)
    if not target.quantized:
        return {"weight": from_float32(values, target.dtype)}
    words, scales, biases, decoded = affine.quantize(values, target.bits, target.group_size, target.dtype)
    decoded -= values
    error.error += float(np.dot(decoded.ravel(), decoded.ravel()))
    error.norm += float(np.dot(values.ravel(), values.ravel()))
    if not math.isfinite(error.error):
        raise SourceError(f"tensor {block.name}: infinite or NaN values cannot be quantized")
    return {"weight": words, "scales": scales, "biases": biases}
