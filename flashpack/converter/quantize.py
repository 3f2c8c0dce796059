"""Storing a source's values in an encoding, in blocks that stay in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

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


def encode_blocks(
    folder: SourceFolder, source: SourceTensor, target: Encoding, error: Error
) -> Iterator[tuple[int, int, Arrays]]:
    """Encode a 2-D tensor block by block: yields (first row, rows, part -> stored array)."""
    rows, width = source.shape
    step = max(1, BLOCK_VALUES // max(1, width))
    step = -(-step // source.block) * source.block if source.block else rows
    for start in range(0, rows, max(step, 1)):
        count = min(step, rows - start)
        block = source.rows(start, count)
        if is_exact(source, target):
            yield start, count, block.stored(folder)
            continue
        values = block.values(folder)
        if not target.quantized:
            yield start, count, {"weight": from_float32(values, target.dtype)}
            continue
        words, scales, biases, decoded = affine.quantize(values, target.bits, target.group_size, target.dtype)
        decoded -= values
        error.error += float(np.dot(decoded.ravel(), decoded.ravel()))
        error.norm += float(np.dot(values.ravel(), values.ravel()))
        if not math.isfinite(error.error):
            raise SourceError(f"tensor {source.name}: infinite or NaN values cannot be quantized")
        yield start, count, {"weight": words, "scales": scales, "biases": biases}
