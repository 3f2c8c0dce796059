"""Reading source values and storing them in an encoding, in blocks that stay in the processor's cache."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from flashpack.converter.source import Extent, SourceTensor
from flashpack.errors import FormatError, SourceError
from flashpack.formats import affine
from flashpack.formats.dtypes import NUMPY, from_float32, to_float32
from flashpack.formats.files import pread_into
from flashpack.formats.records import Encoding

BLOCK_VALUES = 2**17
"""Values quantized at a time: 512 KiB of float32, so that the passes over a block hit the L2 cache."""

Arrays = dict[str, NDArray[np.generic]]


class SourceFiles:
    """Open files of a checkpoint; positional reads from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fds: dict[str, int] = {}

    def read(self, extent: Extent) -> NDArray[np.generic]:
        """The stored values of ``extent``: [rows, values per row] as ``NUMPY[dtype]``."""
        data = np.empty(extent.nbytes, dtype=np.uint8)
        self.read_into(extent, data.data)
        return data.view(NUMPY[extent.dtype]).reshape(extent.rows, -1)

    def read_into(self, extent: Extent, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of ``extent``."""
        path = self._folder / extent.path
        fd = self._fds.get(extent.path)
        if fd is None:
            try:
                # Two threads may open the same file at once; the loser's descriptor is closed.
                fd = os.open(path, os.O_RDONLY)
            except OSError as e:
                raise SourceError(f"{path}: cannot be opened: {e.strerror}") from e
            kept = self._fds.setdefault(extent.path, fd)
            if kept != fd:
                os.close(fd)
                fd = kept
        try:
            pread_into(fd, buffer, extent.offset, str(path))
        except FormatError as e:
            raise SourceError(f"{e}; the source changed or is damaged") from e
        except OSError as e:
            raise SourceError(f"{path}: reading at byte {extent.offset} failed: {e.strerror}") from e

    def values(self, tensor: SourceTensor) -> NDArray[np.float32]:
        """The values of a 2-D tensor in float32."""
        stored = {part: self.read(extent) for part, extent in tensor.parts.items()}
        e = tensor.encoding
        if e.quantized:
            values = affine.dequantize(
                stored["weight"].view("<u4"), stored["scales"], stored["biases"], e.bits, e.group_size, e.dtype
            )
        else:
            values = to_float32(stored["weight"], e.dtype)
        values = values.reshape(tensor.shape)
        return values + np.float32(tensor.add) if tensor.add else values

    def close(self) -> None:
        """Close all files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class Error:
    """Squared error and squared norm of what has been quantized."""

    error: float = 0.0
    norm: float = 0.0

    def relative(self) -> float:
        """|decoded - source| / |source|, Frobenius norms."""
        return math.sqrt(self.error / self.norm) if self.norm else 0.0


def is_copy(source: SourceTensor, target: Encoding) -> bool:
    """Whether storing ``source`` as ``target`` copies its bytes."""
    return source.encoding == target and not source.add


def encode_blocks(
    files: SourceFiles, source: SourceTensor, target: Encoding, error: Error
) -> Iterator[tuple[int, int, Arrays]]:
    """Encode a 2-D tensor block by block: yields (first row, rows, part -> stored array)."""
    rows, width = source.shape
    step = max(1, BLOCK_VALUES // max(1, width))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        block = source.rows(start, count)
        if is_copy(source, target):
            yield start, count, {part: files.read(extent) for part, extent in block.parts.items()}
            continue
        values = files.values(block)
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
