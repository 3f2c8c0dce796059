"""Storing a source's values in an encoding, in blocks that stay in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashpack.converter.folder import Reader
from flashpack.converter.tensor import Arrays, SourceTensor
from flashpack.errors import FormatError, SourceError
from flashpack.formats import constants as C
from flashpack.formats.dtypes import from_float32
from flashpack.formats.records import Encoding, align
from flashpack.kernels.quantize import quantize

BLOCK_VALUES = 2**17
"""Values decoded at a time: 512 KiB of float32, so that the passes over a block hit the L2 cache."""

RAW_BLOCK_VALUES = 2**21
"""Values quantized at a time straight from what is stored: large reads."""


@dataclass
class Error:
    """Squared error and squared norm of what has been quantized.

    ``tokens``: how many calibration tokens there were for it, where it was to be calibrated. ``weighted``: the relative
    error of what the matrix gives for them; None if they were too few, and it was quantized without them.
    """

    error: float = 0.0
    norm: float = 0.0
    weighted: float | None = None
    tokens: int | None = None

    def relative(self) -> float:
        """|decoded - source| / |source|, Frobenius norms."""
        return math.sqrt(self.error / self.norm) if self.norm else 0.0

    def to_json(self) -> list[Any]:
        return [self.error, self.norm, self.weighted, self.tokens]

    @classmethod
    def from_json(cls, data: Any) -> Error:
        """Raises ``FormatError``."""
        match data:
            case [float(error), float(norm), float() | None as weighted, int() | None as tokens]:
                return cls(error, norm, weighted, tokens)
        raise FormatError("not the error of a matrix")


Errors = dict[str, Error]
"""Of one expert: projection -> error, for those that were rounded. Of a dense tensor: its name -> error, if it was."""


def errors_to_json(errors: Errors) -> dict[str, Any]:
    return {name: error.to_json() for name, error in errors.items()}


def errors_from_json(data: Any) -> Errors:
    """Raises ``FormatError``."""
    if not isinstance(data, dict):
        raise FormatError("not the errors of matrices")
    return {name: Error.from_json(error) for name, error in data.items()}


def is_exact(source: SourceTensor, target: Encoding) -> bool:
    """Whether ``target`` holds the values of ``source`` exactly."""
    return source.encoding == target


Piece = tuple[str, slice, NDArray[np.generic]]
"""A stored part, some rows of it, and their content."""


def encode_blocks(
    folder: Reader, source: SourceTensor, target: Encoding, error: Error, quantizer: str
) -> Iterator[list[Piece]]:
    """Encode a 2-D tensor block by block, in order; what all rows share comes with the first block.

    ``quantizer``: "minmax" or "starts", how values are rounded.
    """
    for start, count in block_rows(source, target):
        arrays = _encode(folder, source.rows(start, count), target, error, quantizer)
        width = source.shape[1]
        pieces = [(part, target.part_rows(part, start, start + count, width), array) for part, array in arrays.items()]
        yield [piece for piece in pieces if start == 0 or piece[1].start > 0]


def block_rows(source: SourceTensor, target: Encoding) -> Iterator[tuple[int, int]]:
    """First row and rows of each block that is encoded at a time."""
    rows, width = source.shape
    values = RAW_BLOCK_VALUES if _raw_dtype(source) and target.quantized else BLOCK_VALUES
    step = max(1, values // max(1, width))
    # Blocks of shared scales stay whole; where the source's are those of all rows, it is one block.
    whole = math.lcm(source.block, target.whole_rows(width) if target.name == "affine_dq" else 1)
    step = align(step, whole) if whole else max(rows, 1)
    for start in range(0, rows, step):
        yield start, min(step, rows - start)


def _encode(folder: Reader, block: SourceTensor, target: Encoding, error: Error, quantizer: str) -> Arrays:
    """The stored arrays of a matrix."""
    if is_exact(block, target):
        return block.stored(folder)
    if not target.quantized:
        return {"weight": from_float32(block.values(folder), target.dtype)}
    raw = _raw_dtype(block)
    values = block.stored(folder)["weight"] if raw else block.values(folder)
    arrays, squared, norm = quantize(values, raw or "F32", target, quantizer)
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
