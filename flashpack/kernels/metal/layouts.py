"""Where stored matrices lie, in the words of formats.metal: a slab, a base in it, and a layout.

A slab is a uint8 tensor over a whole piece of memory: the arena, or a dense file. Nothing is copied if all parts of a
matrix lie in one slab at multiples of 16 bytes, as they do there.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashpack.formats.constants import GLOBAL_SCALES
from flashpack.formats.records import align
from flashpack.kernels.cpu.widen import cut
from flashpack.kernels.interface import RecordView, StoredMatrix

NUMBERS = ("BF16", "F16", "F32", "E8M0", "E4M3", "nibbles")
"""Types of numbers, in the order of blocks.h."""

BASE, OFFSET = 64, 16
"""Units of bases and of offsets, in bytes."""

UNIT, ROWS, TILE, MATRICES, SIMDS = 16, 4, 4, 4, 2
"""As in formats.metal and products.metal."""

WORDS = 16
"""Words of a layout."""

NONE = -1

_TORCH = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_FORMATS = {"BF16": "bf16", "F16": "f16", "F32": "f32"}

_slabs: MutableMapping[int, Tensor] = weakref.WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class Place:
    """``base``: in units of ``BASE`` bytes of the slab; ``offsets`` of the parts from there, in units of ``OFFSET``."""

    slab: Tensor
    base: int
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Placed:
    """A matrix [rows, width] in a slab. ``format``: one of ``source.FORMATS``; ``layout``: ``WORDS`` numbers."""

    format: str
    rows: int
    width: int
    slab: Tensor
    base: int
    layout: tuple[int, ...]


def locate(parts: Sequence[Tensor]) -> Place | None:
    """The parts where they are; None if they are not in one piece of memory, or not aligned to 16 bytes."""
    pieces = {part.untyped_storage().data_ptr() for part in parts}
    starts = [part.storage_offset() * part.element_size() for part in parts]
    base = min(starts) // BASE
    offsets = [start - base * BASE for start in starts]
    if len(pieces) > 1 or any(o % OFFSET for o in offsets) or not all(part.is_contiguous() for part in parts):
        return None
    piece = pieces.pop()
    slab = _slabs.get(piece)
    if slab is None:
        storage = parts[0].untyped_storage()
        slab = torch.empty(0, dtype=torch.uint8, device=parts[0].device).set_(storage, 0, (storage.nbytes(),), (1,))
        _slabs[piece] = slab
    return Place(slab, base, tuple(o // OFFSET for o in offsets))


def moved(parts: Sequence[Tensor]) -> Place:
    """Copies of the parts, in a slab of their own."""
    starts, end = [], 0
    for part in parts:
        starts.append(align(end, BASE))
        end = starts[-1] + part.nbytes
    slab = torch.empty(end, dtype=torch.uint8, device=parts[0].device)
    for part, start in zip(parts, starts, strict=True):
        slab[start : start + part.nbytes].view(part.dtype).view(part.shape).copy_(part)
    return Place(slab, 0, tuple(start // OFFSET for start in starts))


def format_of(weight: Tensor | StoredMatrix) -> str | None:
    """One of ``source.FORMATS``; None if there are no kernels for such a matrix."""
    if isinstance(weight, Tensor):
        return _FORMATS.get(_TORCH.get(weight.dtype, "")) if weight.ndim == 2 else None
    e = weight.encoding
    return f"{e.name}{e.bits}" if e.name.startswith("affine") else {"fp8_e4m3": "fp8"}.get(e.name, e.name)


def parts_of(weight: Tensor | StoredMatrix, add: Tensor | None = None) -> dict[str, Tensor]:
    """The arrays of a matrix, and ``add``, what is added to products with its rows."""
    if isinstance(weight, Tensor):
        found: dict[str, Tensor | None] = {"weight": weight}
    else:
        found = {"weight": weight.weight, "scales": weight.scales}
        found |= {"biases": weight.biases, "blocks": weight.blocks, "global": weight.global_scale}
    return {name: part.detach() for name, part in (found | {"add": add}).items() if part is not None}


def layout_of(weight: Tensor | StoredMatrix, add: Tensor | None, offsets: Mapping[str, int]) -> tuple[int, ...]:
    """``Layout`` of formats.metal, of parts at ``offsets``."""
    rows, width = weight.shape
    scale_type = scale_columns = shift = first = whole = rule = 0
    block = (1, 0)
    if isinstance(weight, StoredMatrix):
        e = weight.encoding
        scale_type = NUMBERS.index("nibbles" if e.name == "affine_dq" else e.dtype)
        scale_columns, first = weight.scales.shape[1], weight.first
        if e.name == "fp8_e4m3":
            block = e.block
            whole = int(width % UNIT == 0 and block[1] % UNIT == 0)
        else:
            shift = (e.group_size // UNIT).bit_length() - 1
        rule = GLOBAL_SCALES.index(e.global_scale or "none")
    add_type = NUMBERS.index(_TORCH[add.dtype]) if add is not None else 0
    names = ("weight", "scales", "blocks" if "blocks" in offsets else "biases", "global")
    places = [offsets.get(name, 0) for name in names]
    return (
        rows, width, *places, offsets.get("add", NONE), add_type, scale_type, scale_columns, shift, *block, first,
        whole, rule,
    )  # fmt: skip


def place(weight: Tensor | StoredMatrix) -> Placed | None:
    """A matrix of the dense part, copied if it does not lie together; None if there are no kernels for it."""
    kind = format_of(weight)
    if kind is None:
        return None
    parts = parts_of(weight)
    arrays = list(parts.values())
    where = locate(arrays) or moved(arrays)
    layout = layout_of(weight, None, dict(zip(parts, where.offsets, strict=True)))
    rows, width = weight.shape
    return Placed(kind, rows, width, where.slab, where.base, layout)


@dataclass(frozen=True, slots=True)
class Network:
    """What experts of one kind have in common. ``formats`` and ``layouts``: of gate, up and down, or of up and down.

    ``fused``: whether what comes before the activation is one product: it is if gate and up are stored alike.
    """

    formats: tuple[str, ...]
    layouts: tuple[tuple[int, ...], ...]
    inner: int
    hidden: int
    fused: bool

    @property
    def gated(self) -> bool:
        return len(self.formats) == 3


def network_of(view: RecordView, copy: bool) -> tuple[Network, Place] | None:
    """The network of a record, and where it is; None if there are no kernels for one of its matrices.

    ``copy``: whether parts that do not lie together are copied; else they are a ``ValueError``.
    """
    hidden, inner = view.down.shape
    matrices: list[Tensor | StoredMatrix] = []
    adds: list[Tensor | None] = []
    for matrix, add in zip(view.first, view.first_bias, strict=True):
        pieces = cut(matrix, inner)
        matrices += pieces
        adds += [None] * len(pieces) if add is None else list(torch.split(add, inner))
    matrices.append(view.down)
    adds.append(view.down_bias)
    formats = [format_of(m) for m in matrices]
    if any(f is None for f in formats):
        return None
    parts = [parts_of(m, add) for m, add in zip(matrices, adds, strict=True)]
    arrays = [array for some in parts for array in some.values()]
    where = locate(arrays)
    if where is None:
        if not copy:
            raise ValueError("a record's parts do not lie together, at multiples of 16 bytes")
        where = moved(arrays)
    offsets = iter(where.offsets)
    layouts = [
        layout_of(m, add, dict(zip(some, offsets, strict=False)))
        for m, add, some in zip(matrices, adds, parts, strict=True)
    ]
    encodings = [m.encoding if isinstance(m, StoredMatrix) else m.dtype for m in matrices[:-1]]
    fused = len(set(encodings)) == 1
    return Network(tuple(f for f in formats if f), tuple(layouts), inner, hidden, fused), where
