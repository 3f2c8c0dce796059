"""From a plan's sources to stored bytes: one expert's record, one dense tensor. Writing and checking share these."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from flashpack.converter.folder import SourceFolder
from flashpack.converter.plan import DensePlan, LayerPlan
from flashpack.converter.quantize import Error, encode_blocks, is_exact
from flashpack.formats.dtypes import from_float32
from flashpack.formats.writer import RecordBuffer


def encode_record(
    folder: SourceFolder, plan: LayerPlan, expert: int, buffer: RecordBuffer, advance: Callable[[int], object]
) -> list[float]:
    """Fill ``buffer`` with the record of ``expert``; returns the relative error of each matrix that was quantized.

    ``advance`` is called with the source bytes of each matrix.
    """
    relative = []
    record = buffer.data.data
    for projection in plan.kind.projections:
        source = plan.sources[projection.name].matrix(expert)
        if is_exact(source, projection.encoding) and source.verbatim:
            for section in plan.kind.sections:
                role, part = section.name.split(".")
                if role == projection.name and part in source.parts:
                    extent, end = source.parts[part], section.offset + section.nbytes
                    folder.read_into(extent.path, extent.offset, record[section.offset : end])
        else:
            error = Error()
            for pieces in encode_blocks(folder, source, projection.encoding, error):
                for part, rows, array in pieces:
                    stored = buffer.sections[f"{projection.name}.{part}"][rows]
                    stored[:] = unsigned(array).reshape(stored.shape)
            relative.append(error.relative())
        advance(source.nbytes)
        if projection.bias:
            vector = plan.sources[f"{projection.name}.bias"].matrix(expert)
            buffer.sections[f"{projection.name}.bias"][:, 0] = unsigned(
                from_float32(vector.values(folder), projection.bias)
            )
            advance(vector.nbytes)
    return relative


def encode_dense(folder: SourceFolder, plan: DensePlan, error: Error) -> Iterator[tuple[str, memoryview]]:
    """The stored tensors of a dense tensor or matrix, block by block: (tensor name, its next bytes)."""
    names = plan.tensor_names()
    for pieces in encode_blocks(folder, plan.source.flat(), plan.encoding, error):
        for part, _, array in pieces:
            yield names[part], unsigned(array).data.cast("B")


def unsigned(array: np.ndarray) -> np.ndarray:
    """The same bytes as unsigned integers, so that assignment copies bits and never converts."""
    return np.ascontiguousarray(array).view(f"<u{array.dtype.itemsize}")
