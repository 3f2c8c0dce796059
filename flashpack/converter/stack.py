"""The experts of a layer as the source has them: matrices stacked in one tensor, or one tensor for each expert.

The operations of transformers' loader (merge, concatenate, transpose, interleave) are applied to descriptions of
rows, so a fused tensor of gigabytes is never put together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from flashpack.converter.tensor import Plain, SourceTensor
from flashpack.errors import SourceError, UnsupportedError

_NUMBER = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """One array of every expert: matrices [R, I], or vectors [R] (biases), and the rows that are meant.

    ``tensors``: one stacked tensor [E, R, I], or E tensors [R, I]. ``rows`` of their rows are meant, from ``start``,
    each ``step`` behind the one before.
    """

    tensors: tuple[SourceTensor, ...]
    stacked: bool
    rows: int
    start: int = 0
    step: int = 1

    @classmethod
    def of(cls, tensors: list[SourceTensor]) -> ExpertStack:
        """All rows of a stacked tensor, or of the experts' own tensors, which must be alike."""
        first = tensors[0]
        if len(tensors) == 1 and len(first.shape) >= 2:
            return cls((first,), True, first.shape[1])
        return cls.merged(tensors)

    @classmethod
    def merged(cls, tensors: list[SourceTensor]) -> ExpertStack:
        """All rows of the experts' own tensors, in the order of experts."""
        first = tensors[0]
        for t in tensors:
            if (t.shape, t.format, t.transposed) != (first.shape, first.format, first.transposed):
                raise SourceError(
                    f"{t.name} differs from {first.name} in shape or type; experts of a layer must be alike"
                )
        return cls(tuple(tensors), False, first.shape[0])

    @property
    def experts(self) -> int:
        return self.tensors[0].shape[0] if self.stacked else len(self.tensors)

    @property
    def width(self) -> tuple[int, ...]:
        """(I,) of matrices, () of vectors."""
        return self.tensors[0].shape[2:] if self.stacked else self.tensors[0].shape[1:]

    def matrix(self, expert: int) -> SourceTensor:
        """The array of one expert, [rows, I] or [rows]."""
        whole = self.tensors[0].expert(expert) if self.stacked else self.tensors[expert]
        return whole.rows(self.start, self.rows, self.step)

    def take(self, start: int, rows: int, step: int = 1) -> ExpertStack:
        """``rows`` of these rows."""
        return replace(self, start=self.start + start * self.step, rows=rows, step=self.step * step)

    def transpose(self) -> ExpertStack:
        """Rows and columns exchanged; of all rows only."""
        tensors = tuple(t.transpose() for t in self.tensors)
        return replace(self, tensors=tensors, rows=tensors[0].shape[1 if self.stacked else 0])


@dataclass(frozen=True, slots=True)
class Rows:
    """Stacks below each other: the rows of one parameter of an experts module."""

    pieces: tuple[ExpertStack, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """[E, R, I] or [E, R]."""
        first = self.pieces[0]
        return (first.experts, sum(p.rows for p in self.pieces), *first.width)

    def transpose(self, name: str) -> Rows:
        if len(self.pieces) != 1:
            raise UnsupportedError(f"{name}: several parts of a transposed expert matrix are not supported")
        return Rows((self.pieces[0].transpose(),))

    def take(self, start: int, rows: int, step: int, name: str) -> ExpertStack:
        """Some rows, which must come from one piece; ``name`` is for the error."""
        for piece in self.pieces:
            if start + (rows - 1) * step < piece.rows:
                return piece.take(start, rows, step)
            if start < piece.rows:
                break
            start -= piece.rows
        raise UnsupportedError(f"{name}: gate and up do not lie apart in the checkpoint; not supported")


def apply(name: str, converter: Any, sources: dict[str, list[SourceTensor]], shape: tuple[int, ...]) -> Rows:
    """What a converter of transformers' loader (None: nothing but the name changes) makes of ``sources`` (pattern ->
    tensors): the parameter ``name``, which has ``shape`` in the model."""
    from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose

    from flashpack.adapters import Unstack

    operations = converter.operations if converter is not None else []
    merges = bool(operations) and isinstance(operations[0], MergeModulelist)
    stacks = {}
    for pattern, tensors in sources.items():
        if len(tensors) > 1 and not merges:
            raise SourceError(f"{name}: both {tensors[0].name} and {tensors[1].name} of the checkpoint would become it")
        if merges:
            _check_numbers(name, tensors)
        # A list of one expert; MLX has the experts stacked under the names of single ones, with * for the expert.
        one = merges and ".*." not in tensors[0].name
        stacks[pattern] = Rows((ExpertStack.merged(tensors) if one else ExpertStack.of(tensors),))
    if converter is not None:  # the order is the loader's, whatever the checkpoint's is
        stacks = {p: stacks[p] for p in converter.source_patterns if p in stacks}
    for op in operations[merges:]:
        match op:
            case Unstack(experts=experts):
                stacks = {p: _unstack(rows, experts, name) for p, rows in stacks.items()}
            case Concatenate(dim=1):
                stacks = {"": Rows(tuple(p for rows in stacks.values() for p in rows.pieces))}
            case Transpose(dim0=1, dim1=2):
                # `check_dims` leaves alone what has the model's shape already.
                stacks = {
                    p: rows if op.check_dims and rows.shape == shape else rows.transpose(name)
                    for p, rows in stacks.items()
                }
            case Interleave(dim=1, inverse=False):
                stacks = {p: Rows(tuple(_alternate(rows, name))) for p, rows in stacks.items()}
            case _:
                raise UnsupportedError(f"{name}: the loader's operation {op!r} is not supported for experts")
    if len(stacks) != 1:
        raise SourceError(f"{name}: both {' and '.join(stacks)} of the checkpoint would become it")
    return next(iter(stacks.values()))


def _check_numbers(name: str, tensors: list[SourceTensor]) -> None:
    """Their names count the experts: one that is missing may not be made up for by a number too high."""
    for expert, tensor in enumerate(tensors):
        number = _NUMBER.search(tensor.name)
        if number is not None and int(number[1]) != expert:
            raise SourceError(f"{name}: expert {expert} is missing, or there twice: {tensor.name} stands in its place")


def _unstack(rows: Rows, experts: int, name: str) -> Rows:
    """The matrices of all experts below each other in one tensor, taken apart."""
    (tensor,) = rows.pieces[0].tensors
    if not isinstance(tensor.format, Plain):
        raise UnsupportedError(f"{name}: quantized experts below each other in one matrix are not supported")
    if len(tensor.shape) != 2 or tensor.shape[0] % experts:
        raise SourceError(f"{tensor.name} has shape {list(tensor.shape)}, not that of {experts} matrices")
    shape = (experts, tensor.shape[0] // experts, tensor.shape[1])
    parts = {k: part.reshape(*shape) for k, part in tensor.parts.items()}
    return Rows((ExpertStack.of([replace(tensor, shape=shape, parts=parts)]),))


def _alternate(rows: Rows, name: str) -> list[ExpertStack]:
    """Even rows, then odd ones."""
    half = rows.shape[1] // 2
    return [rows.take(i, half, 2, name) for i in (0, 1)]
