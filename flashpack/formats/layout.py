"""Where everything lies in the large files (SPEC.md sections 5 and 7).

Writer and reader derive it from the manifest's tables alone, down to the bytes of the header, so neither trusts
the other's arithmetic, and a damaged header can be made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from flashpack.errors import FormatError
from flashpack.formats import constants as C
from flashpack.formats.entries import Layer, TensorEntry
from flashpack.formats.header import Header, TensorSpec, build_header
from flashpack.formats.records import RecordKind, align

_TAIL = {C.TABLE_TENSOR, C.SIZES_TENSOR, C.CONTENTS_TENSOR, C.DIGESTS_TENSOR}


def dense_spec(name: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
    """A dense tensor to be written: large ones start on a page, so that they can be used where they are mapped."""
    spec = TensorSpec(name, dtype, shape)
    alignment = C.PAGE if spec.nbytes >= C.PAGE_ALIGNED_FROM else C.SECTION_ALIGNMENT
    return TensorSpec(name, dtype, shape, alignment)


def dense_header(specs: Sequence[TensorSpec], path: str) -> tuple[bytes, Header]:
    """The header of a dense file whose tensors stand in this order: its bytes and its parsed form."""
    return build_header(list(specs), {"flashpack": "dense"}, path)


def dense_layout(tensors: Sequence[TensorEntry], path: str) -> tuple[bytes, Header]:
    """The header of a dense file from the manifest's rows; refuses offsets that are not those of the format."""
    ordered = sorted(tensors, key=lambda t: t.offset)
    raw, header = dense_header([dense_spec(t.name, t.dtype, t.shape) for t in ordered], path)
    places = [(t.name, t.offset) for t in header.tensors if not t.hidden]
    for t, place in zip(ordered, places, strict=True):
        if (t.name, t.offset) != place:
            raise FormatError(f"{C.MANIFEST}: tensor {t.name}: offset {t.offset} of {path}, it belongs at {place[1]}")
    return raw, header


@dataclass(frozen=True)
class Tail:
    """What stands behind the records, checked: the place, kind and digests of each expert.

    ``table`` [experts, 2]: (kind, row). ``offsets``: first byte of the stored record. ``spans``: bytes to read
    there, a multiple of the page. ``sizes``: bytes of them that are not padding of a frame. ``digests``: of the
    stored span. ``contents``: of the record itself, whatever the codec.
    """

    table: NDArray[np.uint32]
    offsets: list[int]
    spans: list[int]
    sizes: list[int]
    digests: list[bytes]
    contents: list[bytes]


@dataclass(frozen=True)
class ShardLayout:
    """The shard of ``layer``. ``frames``: bytes of all frames, for a compressed shard only."""

    layer: Layer
    kinds: tuple[RecordKind, ...]
    frames: int = 0

    @classmethod
    def of_size(cls, layer: Layer, kinds: tuple[RecordKind, ...], size: int) -> ShardLayout:
        """The layout of a shard of ``size`` bytes; refuses a size that no such shard has."""
        layout = cls(layer, kinds)
        if layer.codec != "raw":
            layout = cls(layer, kinds, max(0, size - C.PAGE - layout.tail_bytes))
        if layout.size != size or layout.frames % C.PAGE:
            raise FormatError(f"{C.MANIFEST}: {layer.path}: {size} bytes do not follow from its experts")
        return layout

    @classmethod
    def largest(cls, layer: Layer, kinds: tuple[RecordKind, ...]) -> ShardLayout:
        """The layout if no record can be compressed."""
        frames = sum(count * kinds[kind].stride for kind, count in layer.kinds)
        return cls(layer, kinds, 0 if layer.codec == "raw" else frames)

    @cached_property
    def specs(self) -> list[TensorSpec]:
        experts = self.layer.experts
        if self.layer.codec == "raw":
            specs = [
                TensorSpec(C.RECORDS_TENSOR.format(kind=kind), "U8", (count, self.kinds[kind].stride), C.PAGE)
                for kind, count in self.layer.kinds
            ]
        else:
            specs = [TensorSpec(C.FRAMES_TENSOR, "U8", (self.frames,), C.PAGE)]
        if self.layer.mixed:
            specs.append(TensorSpec(C.TABLE_TENSOR, "U32", (experts, 2)))
        if self.layer.codec != "raw":
            specs.append(TensorSpec(C.SIZES_TENSOR, "U32", (experts,)))
            specs.append(TensorSpec(C.CONTENTS_TENSOR, "U8", (experts, C.DIGEST_BYTES)))
        specs.append(TensorSpec(C.DIGESTS_TENSOR, "U8", (experts, C.DIGEST_BYTES)))
        return specs

    @cached_property
    def built(self) -> tuple[bytes, Header]:
        metadata = {"flashpack": "experts", "layer": str(self.layer.index), "module": self.layer.module}
        return build_header(self.specs, metadata, self.layer.path)

    @property
    def header_bytes(self) -> bytes:
        """The first bytes of the file, up to the first record."""
        return self.built[0]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.built[1].size

    @property
    def tail(self) -> int:
        """First byte after the records."""
        return self.size - self.tail_bytes

    @property
    def tail_bytes(self) -> int:
        """Bytes of table, sizes, contents and digests."""
        return sum(s.nbytes for s in self.specs if s.name in _TAIL)

    def stride(self, kind: int) -> int:
        """Bytes of a record of ``kind``."""
        return self.kinds[kind].stride

    @cached_property
    def record_offsets(self) -> dict[int, int]:
        """Kind -> first byte of its records, in a shard that is not compressed."""
        places = {t.name: t.offset for t in self.built[1].tensors}
        return {kind: places[C.RECORDS_TENSOR.format(kind=kind)] for kind, _ in self.layer.kinds}

    def default_table(self) -> NDArray[np.uint32]:
        """[experts, 2] rows (kind, row) for experts of one kind in order."""
        if self.layer.mixed:
            raise FormatError(f"{self.layer.path}: experts of several kinds need a table")
        table = np.empty((self.layer.experts, 2), dtype="<u4")
        table[:, 0] = self.layer.kinds[0][0]
        table[:, 1] = np.arange(self.layer.experts)
        return table

    def check_table(self, table: NDArray[np.uint32]) -> None:
        """Every record of every kind must belong to exactly one expert."""
        seen = sorted((int(kind), int(row)) for kind, row in table)
        if seen != sorted((kind, row) for kind, count in self.layer.kinds for row in range(count)):
            raise FormatError(f"{self.layer.path}: the expert table does not name every record once")

    def parse_tail(self, tail: bytes) -> Tail:
        """The tail's arrays, checked against each other; ``tail`` is the file from byte ``self.tail`` on."""
        arrays: dict[str, bytes] = {}
        at = 0
        for spec in self.specs:
            if spec.name in _TAIL:
                arrays[spec.name] = tail[at : at + spec.nbytes]
                at += spec.nbytes
        if C.TABLE_TENSOR in arrays:
            table = np.frombuffer(arrays[C.TABLE_TENSOR], "<u4").reshape(-1, 2)
            self.check_table(table)
        else:
            table = self.default_table()
        digests = _rows(arrays[C.DIGESTS_TENSOR])
        strides = [self.stride(int(kind)) for kind, _ in table]
        if self.layer.codec == "raw":
            starts = self.record_offsets
            offsets = [starts[int(k)] + int(row) * self.stride(int(k)) for k, row in table]
            return Tail(table, offsets, strides, strides, digests, digests)
        sizes = np.frombuffer(arrays[C.SIZES_TENSOR], "<u4").tolist()
        if any(not 0 < size <= stride for size, stride in zip(sizes, strides, strict=True)):
            raise FormatError(f"{self.layer.path}: a frame is empty or larger than its record")
        spans = [align(size, C.PAGE) for size in sizes]
        if sum(spans) != self.frames:
            raise FormatError(f"{self.layer.path}: the frames' sizes do not fill their place")
        offsets = [len(self.header_bytes) + before for before in accumulate(spans[:-1], initial=0)]
        return Tail(table, offsets, spans, sizes, digests, _rows(arrays[C.CONTENTS_TENSOR]))


def _rows(data: bytes) -> list[bytes]:
    return [data[i : i + C.DIGEST_BYTES] for i in range(0, len(data), C.DIGEST_BYTES)]
