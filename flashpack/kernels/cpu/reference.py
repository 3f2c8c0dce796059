"""The plain torch kernels: correct on every machine, the oracle of all faster ones.

A stored matrix is widened to float32 a block of rows at a time, small enough for the processor's cache, multiplied,
and forgotten: nothing is ever copied whole. Blocks have a fixed size, so results do not depend on memory; products
run on several threads only where that does not change their bits.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional as F

from flashpack.formats.records import RecordKind, Section
from flashpack.kernels.interface import Activation, AffineMatrix, RecordView

BLOCK_VALUES = 2**19
"""Values widened at a time: 2 MiB of float32."""

_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U32": torch.int32}


class ReferenceKernels:
    """``Kernels`` in torch, on ``threads`` threads; around its calls torch may have another number."""

    name = "torch"

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._product_threads = threads if _reproducible(threads) else 1

    def view_record(self, record: Tensor, kind: RecordKind) -> RecordView:
        sections = {s.name: s for s in kind.sections}
        matrices = [_matrix(record, kind, sections, p.name) for p in kind.projections]
        fused = _fused(record, kind, sections) if len(matrices) == 3 else None
        first = tuple(matrices[:-1]) if fused is None else (fused,)
        return RecordView(first, matrices[-1])

    def expert(self, x: Tensor, record: RecordView, activation: Activation) -> Tensor:
        wide = x.float()
        parts = [self._matmul(wide, m) for m in record.first]
        hidden = activation(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))
        return self._matmul(hidden, record.down).to(x.dtype)

    def linear(self, x: Tensor, weight: Tensor | AffineMatrix) -> Tensor:
        return self._matmul(x.float(), weight).to(x.dtype)

    def embedding(self, ids: Tensor, weight: Tensor | AffineMatrix, dtype: torch.dtype) -> Tensor:
        if isinstance(weight, Tensor):
            return F.embedding(ids, weight).to(dtype)
        flat = ids.reshape(-1)
        rows = AffineMatrix(
            weight.words[flat], weight.scales[flat], weight.biases[flat], weight.bits, weight.group_size
        )
        return _widen(rows, 0, len(flat)).to(dtype).view(*ids.shape, -1)

    def _matmul(self, x: Tensor, weight: Tensor | AffineMatrix) -> Tensor:
        """float32 x [..., in] @ weight.T, the weight widened block by block."""
        rows, width = weight.shape
        step = max(1, BLOCK_VALUES // width)
        out = x.new_empty(*x.shape[:-1], rows)

        outside = torch.get_num_threads()
        try:
            for start in range(0, rows, step):
                end = min(start + step, rows)
                # Widening takes exactly rounded steps only: the same bits on any number of threads.
                torch.set_num_threads(self._threads)
                block = _widen(weight, start, end)
                torch.set_num_threads(self._product_threads)
                out[..., start:end] = F.linear(x, block)
        finally:
            torch.set_num_threads(outside)
        return out


def _reproducible(threads: int) -> bool:
    """Whether products have the same bits on one and on ``threads`` threads.

    MKL may cut a sum into as many parts as it has threads, unless its strict reproducible mode is on. It reads the
    variable at the first product of the process, so that the answer may differ by what ran before.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    generator = torch.Generator().manual_seed(0)
    outside = torch.get_num_threads()
    try:
        # Shapes that did differ without the strict mode.
        for tokens, width, rows in ((1, 2048, 128), (32, 2048, 256), (100, 768, 340)):
            x = torch.randn(tokens, width, generator=generator)
            weight = torch.randn(rows, width, generator=generator)
            results = []
            for count in (1, threads):
                torch.set_num_threads(count)
                results.append(F.linear(x, weight))
            if not torch.equal(*results):
                return False
    finally:
        torch.set_num_threads(outside)
    return True


def _widen(weight: Tensor | AffineMatrix, start: int, end: int) -> Tensor:
    """Rows [start, end) in float32."""
    if isinstance(weight, Tensor):
        return weight[start:end].float()
    codes = unpack_bits(weight.words[start:end], weight.bits)
    grouped = codes.view(end - start, -1, weight.group_size)
    grouped.mul_(weight.scales[start:end].unsqueeze(-1).float())
    grouped.add_(weight.biases[start:end].unsqueeze(-1).float())
    return codes


def unpack_bits(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, W] (contiguous) -> the codes as float32 [rows, W*32/bits]."""
    rows = words.shape[0]
    stream = words.view(torch.uint8)
    if bits == 8:
        return stream.float()
    if bits in (2, 4):
        per_byte = 8 // bits
        codes = torch.empty(rows, stream.shape[1], per_byte)
        for i in range(per_byte):
            part = stream >> (bits * i) if i else stream
            codes[..., i] = part if i == per_byte - 1 else part & ((1 << bits) - 1)
        return codes.view(rows, -1)
    # 8 values in `bits` bytes, as in formats.affine
    chunks = stream.view(rows, -1, bits).to(torch.int64)
    word = chunks[..., 0]
    for i in range(1, bits):
        word = word | (chunks[..., i] << (8 * i))
    codes = torch.empty(rows, chunks.shape[1], 8)
    for i in range(8):
        codes[..., i] = (word >> (bits * i)) & ((1 << bits) - 1)
    return codes.view(rows, -1)


def _array(record: Tensor, section: Section, rows: int | None = None) -> Tensor:
    """A section as a torch tensor; ``rows`` beyond its own take the section after it along."""
    shape = (rows or section.shape[0], *section.shape[1:])
    nbytes = section.nbytes // section.shape[0] * shape[0]
    return record[section.offset : section.offset + nbytes].view(_TORCH[section.dtype]).view(shape)


def _matrix(
    record: Tensor, kind: RecordKind, sections: dict[str, Section], name: str, rows: int | None = None
) -> Tensor | AffineMatrix:
    encoding = next(p.encoding for p in kind.projections if p.name == name)
    arrays = [
        _array(record, sections[f"{name}.{part}"], rows) for part in encoding.parts((1, encoding.group_size or 1))
    ]
    if not encoding.quantized:
        return arrays[0]
    return AffineMatrix(arrays[0], arrays[1], arrays[2], encoding.bits, encoding.group_size)


def _fused(record: Tensor, kind: RecordKind, sections: dict[str, Section]) -> Tensor | AffineMatrix | None:
    """gate and up as one matrix of twice the rows, where they lie side by side without a gap."""
    gate, up = kind.projections[0], kind.projections[1]
    if (gate.encoding, gate.shape) != (up.encoding, up.shape):
        return None
    for part in gate.encoding.parts(gate.shape):
        a, b = sections[f"gate.{part}"], sections[f"up.{part}"]
        if a.offset + a.nbytes != b.offset:
            return None
    return _matrix(record, kind, sections, "gate", 2 * gate.shape[0])
