"""The plain torch kernels: correct on every machine, the oracle of all faster ones.

A stored matrix is widened to float32 a block of rows at a time, small enough for the processor's cache, multiplied,
and forgotten: nothing is ever copied whole.

Results depend on nothing but the values: blocks are cut by the matrix's shape alone, each is computed by exactly one
thread (``pool``), and every operand of a product begins at a multiple of 64 bytes, as one thread of a BLAS may still
choose its code by where an operand lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from flashpack.formats.records import Encoding, Projection, RecordKind, Section
from flashpack.kernels.cpu.arena import HostArena, PrefaultedMemory
from flashpack.kernels.cpu.pool import one_thread, pool
from flashpack.kernels.cpu.widen import aligned, block, cut, group_numbers, widen
from flashpack.kernels.interface import Activation, Arena, RecordView, Steps, StoredMatrix

BLOCK_VALUES = 2**19
"""Most values widened at a time: 2 MiB of float32."""

SHARES = 4
"""A matrix of several blocks has a multiple of so many, so that few threads get equal shares."""

_TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "U32": torch.int32,
}


class ReferenceKernels:
    """``Kernels`` in torch, on ``threads`` threads whatever torch's own number is. For inference: no gradients."""

    name = "torch"
    device = torch.device("cpu")
    asynchronous = False

    def __init__(self, threads: int) -> None:
        self.notices: list[str] = []
        self._pool = pool(threads)

    def view_record(self, record: Tensor, kind: RecordKind) -> RecordView:
        sections = {s.name: s for s in kind.sections}
        *first, down = kind.projections
        if len(first) == 2 and _side_by_side(first[0], first[1], sections):
            first, times = first[:1], 2
        else:
            times = 1
        return RecordView(
            tuple(_matrix(record, sections, p, times) for p in first),
            _matrix(record, sections, down),
            tuple(_bias(record, sections, p, times) for p in first),
            _bias(record, sections, down),
        )

    def expert(self, x: Tensor, record: RecordView, activation: Activation) -> Tensor:
        with one_thread():  # the activation's, too
            wide = x.float()
            pairs = zip(record.first, record.first_bias, strict=True)
            parts = [self.matmul(wide, matrix, bias) for matrix, bias in pairs]
            hidden = activation(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))
            return self.matmul(hidden, record.down, record.down_bias).to(x.dtype)

    def experts(
        self,
        x: Tensor,
        records: Sequence[RecordView],
        rows: Sequence[Sequence[int]],
        activation: Activation,
        out: Tensor,
    ) -> None:
        alone, start = len(x) == 1, 0
        for record, some in zip(records, rows, strict=True):
            states = x if alone else x[torch.tensor(some)]
            out[start : start + len(some)] = self.expert(states, record, activation)
            start += len(some)

    def combine(self, outputs: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        tokens, top_k = weights.shape
        total = outputs.new_zeros(tokens, outputs.shape[1])
        for k in range(top_k):
            rows = outputs[places[:, k].clamp(min=0)] * weights[:, k : k + 1]
            total += rows.masked_fill_((places[:, k] < 0).unsqueeze(-1), 0)
        return total

    def linear(self, x: Tensor, weight: Tensor | StoredMatrix) -> Tensor:
        return self.matmul(x.float(), weight).to(x.dtype)

    def embedding(self, ids: Tensor, weight: Tensor | StoredMatrix, dtype: torch.dtype) -> Tensor:
        if isinstance(weight, Tensor):
            return F.embedding(ids, weight).to(dtype)
        rows = _rows(weight, ids.reshape(-1))
        wide = torch.empty(rows.shape)
        step = _block_rows(*rows.shape)
        with one_thread():
            for part, out in zip(cut(rows, step), torch.split(wide, step), strict=True):
                widen(part, out)
        return wide.to(dtype).view(*ids.shape, wide.shape[1])

    def arena(self, size: int, early: PrefaultedMemory | None = None) -> Arena:
        return HostArena(size, early)

    def steps(self) -> Steps | None:
        return None

    def commit(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def matmul(self, x: Tensor, weight: Tensor | StoredMatrix, bias: Tensor | None = None) -> Tensor:
        """float32 x [..., in] @ weight.T + bias, the weight widened block by block."""
        rows, width = weight.shape
        flat = aligned(x.reshape(-1, width))
        out = x.new_empty(len(flat), rows)
        step = _block_rows(rows, width)
        # Cut here at once: every call of torch in a thread makes the others wait for the interpreter.
        blocks = list(zip(cut(weight, step), torch.split(out, step, dim=1), strict=True))

        def multiply(piece: tuple[Tensor | StoredMatrix, Tensor]) -> None:
            torch.mm(flat, block(piece[0]).t(), out=piece[1])

        self._pool.run(multiply, blocks)
        if bias is not None:
            out.add_(bias)
        return out.view(*x.shape[:-1], rows)


def _block_rows(rows: int, width: int) -> int:
    """Rows of a block: a multiple of 16, so that blocks of weight and result are as aligned as the whole."""
    rows = max(rows, 1)
    count = -(-rows * width // BLOCK_VALUES)
    if count > 1:
        count = -(-count // SHARES) * SHARES
    return -(-rows // (16 * count)) * 16


def _rows(weight: StoredMatrix, ids: Tensor) -> StoredMatrix:
    """The rows ``ids`` of a matrix, each with scales of its own."""
    e, scale_rows = weight.encoding, ids
    if e.name == "affine_dq":
        plain = Encoding("affine", "F32", e.bits, e.group_size)
        return StoredMatrix(plain, weight.weight[ids], *group_numbers(weight, ids))
    if e.name == "fp8_e4m3":
        scale_rows = ids // e.block[0] if e.block[0] else torch.zeros_like(ids)
        e = replace(e, block=(1, e.block[1]))
    biases = None if weight.biases is None else weight.biases[ids]
    return StoredMatrix(e, weight.weight[ids], weight.scales[scale_rows], biases, weight.global_scale)


def _array(record: Tensor, section: Section, times: int) -> Tensor:
    """A section as a torch tensor, with the equal ones that lie right behind it: ``times`` in all."""
    shape = (times * section.shape[0], *section.shape[1:])
    end = section.offset + times * section.nbytes
    return record[section.offset : end].view(_TORCH[section.dtype]).view(shape)


def _matrix(record: Tensor, sections: dict[str, Section], p: Projection, times: int = 1) -> Tensor | StoredMatrix:
    parts = {part: _array(record, sections[f"{p.name}.{part}"], times) for part in p.encoding.part_names}
    return StoredMatrix.of(p.encoding, parts) if p.encoding.quantized else parts["weight"]


def _bias(record: Tensor, sections: dict[str, Section], p: Projection, times: int = 1) -> Tensor | None:
    return _array(record, sections[f"{p.name}.bias"], times) if p.bias else None


def _side_by_side(gate: Projection, up: Projection, sections: dict[str, Section]) -> bool:
    """Whether gate and up can be used as one matrix of twice the rows: equal, without a gap between their parts."""
    if replace(gate, name=up.name) != up or not gate.encoding.stackable(gate.shape[0]):
        return False
    pairs = [
        (sections[f"gate.{part}"], sections[f"up.{part}"])
        for part in (*gate.encoding.part_names, *(["bias"] if gate.bias else []))
    ]
    return all(a.offset + a.nbytes == b.offset for a, b in pairs)
