"""Kernels in C++ for what they know: affine and MXFP4 matrices, plain numbers for few tokens. The rest is torch's.

Products with stored codes round the activations of a token, differently for few tokens and for many (native/kernels.h);
within either, results do not depend on what is computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashpack.formats.records import RecordKind
from flashpack.kernels.cpu.native import compute
from flashpack.kernels.cpu.reference import ReferenceKernels
from flashpack.kernels.interface import ACTIVATIONS, Activation, RecordView, Steps, StoredMatrix

FEW_TOKENS = 4
"""Plain matrices times more tokens than these are torch's: its products of many float32 numbers are faster."""

_NUMBERS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True, slots=True)
class NativeRecord(RecordView):
    """A record that the library can compute: the address of its ``compute.Expert``, which ``native`` keeps."""

    native: compute.Expert | None
    address: int


class NativeKernels(ReferenceKernels):
    """``Kernels`` in C++ on ``threads`` threads. Only to be made where ``compute.library`` is one."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.workers = compute.workers(threads)
        self.name = f"native, {self.workers.name}"
        self._matrices: dict[int, tuple[object, compute.Matrix | None]] = {}

    def steps(self) -> Steps:
        from flashpack.kernels.cpu.steps import NativeSteps

        return NativeSteps(self)

    def view_record(self, record: Tensor, kind: RecordKind) -> RecordView:
        return native_record(super().view_record(record, kind))

    def experts(
        self,
        x: Tensor,
        records: Sequence[RecordView],
        rows: Sequence[Sequence[int]],
        activation: Activation,
        out: Tensor,
    ) -> None:
        addresses = [r.address for r in records if isinstance(r, NativeRecord) and r.native]
        if activation.name is None or len(addresses) < len(records):
            super().experts(x, records, rows, activation, out)
            return
        wide = x.float().contiguous()
        counts = torch.tensor([len(r) for r in rows], dtype=torch.int32)
        flat = torch.tensor([i for some in rows for i in some], dtype=torch.int32)
        self.workers.experts(
            wide.data_ptr(), len(wide), addresses, counts.data_ptr(), flat.data_ptr(),
            ACTIVATIONS.index(activation.name), activation.limit, out.data_ptr(),
        )  # fmt: skip

    def combine(self, outputs: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        tokens, top_k = weights.shape
        weights = weights.float().contiguous()
        out = torch.empty(tokens, outputs.shape[1])
        self.workers.combine(
            outputs.data_ptr(), places.data_ptr(), weights.data_ptr(), tokens, top_k, out.shape[1], out.data_ptr()
        )
        return out

    def linear(self, x: Tensor, weight: Tensor | StoredMatrix) -> Tensor:
        known = self._matrices.get(id(weight))
        if known is None or known[0] is not weight:
            known = self._matrices[id(weight)] = (weight, matrix_of(weight))  # callers keep their matrices
        return self._product(x.float(), weight, known[1], None).to(x.dtype)

    def matmul(self, x: Tensor, weight: Tensor | StoredMatrix, bias: Tensor | None = None) -> Tensor:
        return self._product(x, weight, matrix_of(weight, bias), bias)

    def _product(
        self, x: Tensor, weight: Tensor | StoredMatrix, matrix: compute.Matrix | None, bias: Tensor | None
    ) -> Tensor:
        rows, width = weight.shape
        tokens = x.numel() // width
        if matrix is None or not tokens or (isinstance(weight, Tensor) and tokens > FEW_TOKENS):
            return super().matmul(x, weight, bias)
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], rows)
        self.workers.linear(x.data_ptr(), tokens, matrix, out.data_ptr())
        return out


def native_record(view: RecordView) -> NativeRecord:
    """``view`` with what the library needs to compute it, if it knows all that is in it."""
    native = _expert(view)
    address = compute.address(native) if native else 0
    return NativeRecord(view.first, view.down, view.first_bias, view.down_bias, native, address)


def _expert(view: RecordView) -> compute.Expert | None:
    """The library's view of a record; None if there is something in it that the library does not know."""
    biases = (*view.first_bias, view.down_bias)
    matrices = []
    for weight, bias in zip((*view.first, view.down), biases, strict=True):
        matrix = matrix_of(weight, bias)
        if matrix is None:
            return None
        matrix.coarse = True
        matrices.append(matrix)
    inner = view.down.shape[1]
    gated = 2 if len(view.first) == 2 else view.first[0].shape[0] // inner - 1
    return compute.Expert(matrices[0], matrices[1] if gated == 2 else compute.Matrix(), matrices[-1], gated)


def matrix_of(weight: Tensor | StoredMatrix, add: Tensor | None = None) -> compute.Matrix | None:
    """The library's view of a matrix, with a bias ``add`` [out]; None if it does not know such a one."""
    extra = None if add is None else add.data_ptr()
    extra_type = 0 if add is None else compute.KINDS[_NUMBERS[add.dtype]]
    if isinstance(weight, Tensor):
        if weight.dtype not in _NUMBERS or not weight.is_contiguous() or weight.ndim != 2:
            return None
        kind = compute.KINDS[_NUMBERS[weight.dtype]]
        return compute.Matrix(weight.data_ptr(), None, None, extra, *weight.shape, kind, 0, 0, 0, extra_type)
    e = weight.encoding
    if e.name not in compute.KINDS or not weight.weight.is_contiguous():
        return None
    scale_type = 0 if weight.scales.dtype not in _NUMBERS else compute.KINDS[_NUMBERS[weight.scales.dtype]]
    constants = weight.biases
    if e.name == "affine_dq":
        if weight.first:
            return None
        scale_type, constants = compute.NIBBLES, weight.blocks
    biases = None if constants is None else constants.data_ptr()
    return compute.Matrix(
        weight.weight.data_ptr(), weight.scales.data_ptr(), biases, extra, *weight.shape,
        compute.KINDS[e.name], e.bits, e.group_size, scale_type, extra_type, weight.coarse,
    )  # fmt: skip
