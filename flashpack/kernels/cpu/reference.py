"""The plain torch kernels: correct on every machine, the oracle of all faster ones.

A stored matrix is widened to float32 a block of rows at a time, small enough for the processor's cache, multiplied,
and forgotten: nothing is ever copied whole.

Results depend on nothing but the values: blocks are cut by the matrix's shape alone, each is computed by exactly one
thread (``pool``), and every operand of a product begins at a multiple of 64 bytes, as one thread of a BLAS may still
choose its code by where an operand lies.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn import functional as F

from flashpack.formats.records import RecordKind, Section
from flashpack.kernels.cpu.pool import one_thread, pool
from flashpack.kernels.interface import Activation, AffineMatrix, RecordView

BLOCK_VALUES = 2**19
"""Most values widened at a time: 2 MiB of float32."""

SHARES = 4
"""A matrix of several blocks has a multiple of so many, so that few threads get equal shares."""

ALIGNMENT = 64
"""Bytes. torch allocates at multiples of it."""

_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U32": torch.int32}


class ReferenceKernels:
    """``Kernels`` in torch, on ``threads`` threads whatever torch's own number is. For inference: no gradients."""

    name = "torch"

    def __init__(self, threads: int) -> None:
        self._pool = pool(threads)

    def view_record(self, record: Tensor, kind: RecordKind) -> RecordView:
        sections = {s.name: s for s in kind.sections}
        matrices = [_matrix(record, kind, sections, p.name) for p in kind.projections]
        fused = _fused(record, kind, sections) if len(matrices) == 3 else None
        first = tuple(matrices[:-1]) if fused is None else (fused,)
        return RecordView(first, matrices[-1])

    def expert(self, x: Tensor, record: RecordView, activation: Activation) -> Tensor:
        with one_thread():  # the activation's, too
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
        wide = torch.empty(rows.shape)
        step = _block_rows(*rows.shape)
        with one_thread():
            for block, out in zip(_cut(rows, step), torch.split(wide, step), strict=True):
                _widen(block, out)
        return wide.to(dtype).view(*ids.shape, wide.shape[1])

    def _matmul(self, x: Tensor, weight: Tensor | AffineMatrix) -> Tensor:
        """float32 x [..., in] @ weight.T, the weight widened block by block."""
        rows, width = weight.shape
        flat = _aligned(x.reshape(-1, width))
        out = x.new_empty(len(flat), rows)
        step = _block_rows(rows, width)
        # Cut here at once: every call of torch in a thread makes the others wait for the interpreter.
        blocks = list(zip(_cut(weight, step), torch.split(out, step, dim=1), strict=True))

        def multiply(block: tuple[Tensor | AffineMatrix, Tensor]) -> None:
            torch.mm(flat, _block(block[0]).t(), out=block[1])

        self._pool.run(multiply, blocks)
        return out.view(*x.shape[:-1], rows)


def _block_rows(rows: int, width: int) -> int:
    """Rows of a block: a multiple of 16, so that blocks of weight and result are as aligned as the whole."""
    rows = max(rows, 1)
    count = -(-rows * width // BLOCK_VALUES)
    if count > 1:
        count = -(-count // SHARES) * SHARES
    return -(-rows // (16 * count)) * 16


def _cut(weight: Tensor | AffineMatrix, step: int) -> list[Tensor | AffineMatrix]:
    """The matrix in blocks of ``step`` rows, the last may have fewer."""
    if isinstance(weight, Tensor):
        return list(torch.split(weight, step))
    parts = zip(
        torch.split(weight.words, step), torch.split(weight.scales, step), torch.split(weight.biases, step), strict=True
    )
    return [AffineMatrix(*part, weight.bits, weight.group_size) for part in parts]


class _Scratch(threading.local):
    """Buffers of a thread, kept: the system's allocator would give such sizes back and fetch them again each time."""

    def __init__(self) -> None:
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._views: dict[tuple[torch.dtype, int, int], Tensor] = {}

    def take(self, dtype: torch.dtype, rows: int, width: int) -> Tensor:
        """[rows, width], contiguous and aligned; valid until this thread asks for the type again."""
        view = self._views.get((dtype, rows, width))
        if view is None:
            buffer = self._buffers.get(dtype)
            with torch.inference_mode(False):  # of use in both modes
                if buffer is None or len(buffer) < rows * width:
                    buffer = self._buffers[dtype] = torch.empty(rows * width, dtype=dtype)
                    # Views of the old buffer would keep it.
                    self._views = {key: v for key, v in self._views.items() if key[0] != dtype}
                view = self._views[dtype, rows, width] = buffer[: rows * width].view(rows, width)
        return view


_scratch = _Scratch()


def _block(weight: Tensor | AffineMatrix) -> Tensor:
    """A block in float32, contiguous and aligned; valid until the thread's next call."""
    if isinstance(weight, Tensor) and weight.dtype == torch.float32:
        return _aligned(weight)
    out = _scratch.take(torch.float32, *weight.shape)
    _widen(weight, out)
    return out


def _aligned(x: Tensor) -> Tensor:
    """``x`` itself or a copy that is contiguous and aligned."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def _widen(weight: Tensor | AffineMatrix, out: Tensor) -> None:
    """Write the values of ``weight`` to ``out`` (float32, contiguous, of its shape)."""
    if isinstance(weight, Tensor):
        out.copy_(weight)
        return
    _unpack_bits(weight.words, weight.bits, out)
    grouped = out.view(*weight.scales.shape, weight.group_size)
    grouped.mul_(weight.scales.unsqueeze(-1))
    grouped.add_(weight.biases.unsqueeze(-1))


def _unpack_bits(words: Tensor, bits: int, out: Tensor) -> None:
    """Write the codes in int32 [rows, W] (contiguous) to ``out``, float32 [rows, W*32/bits] (contiguous)."""
    rows, width = out.shape
    stream = words.view(torch.uint8)
    if bits == 8:
        out.copy_(stream)
    elif bits == 4:
        # One byte of two codes becomes two bytes of one: 0xba -> 0x0b0a.
        pairs = _scratch.take(torch.int16, rows, stream.shape[1]).copy_(stream)
        pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F)
        out.copy_(pairs.view(torch.uint8))
    elif bits == 2:
        codes = out.view(rows, width // 4, 4)
        for i in range(4):
            codes[..., i] = (stream >> (2 * i)) & 3
    else:
        # 8 values in `bits` bytes, as in formats.affine
        chunks = stream.view(rows, width // 8, bits).to(torch.int64)
        word = chunks[..., 0]
        for i in range(1, bits):
            word = word | (chunks[..., i] << (8 * i))
        codes = out.view(rows, width // 8, 8)
        for i in range(8):
            codes[..., i] = (word >> (bits * i)) & ((1 << bits) - 1)


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
