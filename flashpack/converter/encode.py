"""From a plan's sources to stored bytes: one expert's record, one dense tensor. Writing and checking share these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Event

import numpy as np
from numpy.typing import NDArray

from flashpack.converter.folder import Reader, SourceFolder, Span, Steps
from flashpack.converter.plan import DensePlan, LayerPlan
from flashpack.converter.quantize import Error, Errors, block_rows, encode_blocks, is_exact
from flashpack.converter.tensor import Arrays
from flashpack.formats.dtypes import from_float32
from flashpack.formats.writer import RecordBuffer

Values = NDArray[np.float32]


def encode_record(
    folder: Reader, plan: LayerPlan, expert: int, buffer: RecordBuffer, advance: Callable[[int], object]
) -> Errors:
    """Fill ``buffer`` with the record of ``expert``; returns the error of each matrix that was quantized.

    ``advance`` is called with the source bytes of each matrix.
    """
    record = buffer.data.data
    parts, errors = _calibrated(folder, plan, expert)
    for projection in plan.kinds[expert].projections:
        source = plan.sources[projection.name].matrix(expert)
        if is_exact(source, projection.encoding) and source.verbatim:
            for section in plan.kinds[expert].sections:
                role, part = section.name.split(".")
                if role == projection.name and part in source.parts:
                    extent, end = source.parts[part], section.offset + section.nbytes
                    folder.read_into(extent.path, extent.offset, record[section.offset : end])
        elif projection.name in parts:
            for part, array in parts[projection.name].items():
                stored = buffer.sections[f"{projection.name}.{part}"]
                stored[:] = unsigned(array).reshape(stored.shape)
        else:
            error = errors.get(projection.name, Error())
            for pieces in encode_blocks(folder, source, projection.encoding, error, plan.quantizer):
                for part, rows, array in pieces:
                    stored = buffer.sections[f"{projection.name}.{part}"][rows]
                    stored[:] = unsigned(array).reshape(stored.shape)
            if error.norm:  # else nothing was rounded
                errors[projection.name] = error
        advance(source.nbytes)
        if projection.bias:
            vector = plan.sources[f"{projection.name}.bias"].matrix(expert)
            buffer.sections[f"{projection.name}.bias"][:, 0] = unsigned(
                from_float32(vector.values(folder), projection.bias)
            )
            advance(vector.nbytes)
    return errors


def _calibrated(folder: Reader, plan: LayerPlan, expert: int) -> tuple[dict[str, Arrays], Errors]:
    """The stored arrays, by projection, of what calibration rounds, and errors of what it was asked for."""
    encodings = {
        p.name: p.encoding
        for p in plan.kinds[expert].projections
        if p.encoding.quantized and not is_exact(plan.sources[p.name].matrix(expert), p.encoding)
    }
    if plan.calibrated is None or not encodings:
        return {}, {}
    with plan.calibrated.room:
        return plan.calibrated.encode(expert, encodings, *expert_values(folder, plan, expert))


def expert_values(folder: Reader, plan: LayerPlan, expert: int) -> tuple[dict[str, Values], dict[str, Values]]:
    """The source's matrices of an expert, float32 [out, in] by projection, and its biases [out] where it has any."""
    values = {name: stack.matrix(expert).values(folder) for name, stack in plan.sources.items()}
    biases = {name.removesuffix(".bias"): v for name, v in values.items() if name.endswith(".bias")}
    return {name: v for name, v in values.items() if not name.endswith(".bias")}, biases


def record_spans(plan: LayerPlan, expert: int) -> list[Span]:
    """What ``encode_record`` reads."""
    sources = (stack.matrix(expert) for stack in plan.sources.values())
    return [(part.path, part.offset, part.nbytes) for source in sources for part in source.parts.values()]


def encode_dense(folder: Reader, plan: DensePlan, error: Error) -> Iterator[tuple[str, memoryview]]:
    """The stored tensors of a dense tensor or matrix, block by block: (tensor name, its next bytes)."""
    names = plan.tensor_names()
    for pieces in encode_blocks(folder, plan.source.flat(), plan.encoding, error, plan.quantizer):
        for part, _, array in pieces:
            yield names[part], unsigned(array).data.cast("B")


@contextmanager
def dense_reader(folder: SourceFolder, plans: list[DensePlan], stop: Event) -> Iterator[Reader]:
    """For ``encode_dense`` of these tensors, one after the other."""
    steps: list[list[Span]] = [[]]
    for plan in plans:
        source = plan.source.flat()
        for rows in block_rows(source, plan.encoding):
            spans = [(part.path, part.offset, part.nbytes) for part in source.rows(*rows).parts.values()]
            if not set(spans) <= set(steps[-1]):  # tensors that are computed from the same ones read them together
                steps.append(spans)
    del steps[0]
    with folder.steps(lambda number: steps[number], len(steps), stop) as prepared, ExitStack() as stack:
        yield _InTurn(folder, prepared, steps, stack)


class _InTurn:
    """Goes to the step that a read belongs to; the steps before it have ended then."""

    def __init__(self, folder: Reader, prepared: Steps, steps: list[list[Span]], stack: ExitStack) -> None:
        self._prepared, self._stack = prepared, stack
        self._reader, self._number = folder, -1
        self._step_of: dict[Span, int] = {}
        for number, spans in enumerate(steps):
            for span in spans:
                self._step_of.setdefault(span, number)

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        number = self._step_of.get((file, offset, buffer.nbytes), -1)
        while self._number < number:
            self._stack.close()
            self._number += 1
            self._reader = self._stack.enter_context(self._prepared.step(self._number))
        self._reader.read_into(file, offset, buffer)


def unsigned(array: np.ndarray) -> np.ndarray:
    """The same bytes as unsigned integers, so that assignment copies bits and never converts."""
    return np.ascontiguousarray(array).view(f"<u{array.dtype.itemsize}")
