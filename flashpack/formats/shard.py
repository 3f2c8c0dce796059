"""The layout of one layer's expert shard (SPEC.md section 5): records, the expert table, the digests.

Writer and reader both derive it from the layer's record kinds, so neither trusts the other's arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from flashpack.errors import FormatError
from flashpack.formats import constants as C
from flashpack.formats.header import Header, TensorSpec, build_header
from flashpack.formats.manifest import Layer
from flashpack.formats.records import RecordKind


@dataclass(frozen=True)
class ShardLayout:
    """Where everything lies in the shard of ``layer``."""

    layer: Layer
    kinds: tuple[RecordKind, ...]

    @property
    def mixed(self) -> bool:
        """Whether experts differ in their record kind, so that an expert table is needed."""
        return len(self.layer.kinds) > 1

    @cached_property
    def specs(self) -> list[TensorSpec]:
        experts = self.layer.experts
        specs = [
            TensorSpec(C.RECORDS_TENSOR.format(kind=kind), "U8", (count, self.kinds[kind].stride), C.PAGE)
            for kind, count in self.layer.kinds
        ]
        if self.mixed:
            specs.append(TensorSpec(C.TABLE_TENSOR, "U32", (experts, 2)))
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

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Tensor name -> first byte in the file."""
        return {t.name: t.offset for t in self.built[1].tensors}

    @property
    def tail(self) -> int:
        """First byte after the records: the expert table, if any, and the digests follow."""
        return self.offsets[self.specs[-2 if self.mixed else -1].name]

    def extent(self, kind: int, row: int) -> tuple[int, int]:
        """(offset, stride) of record ``row`` of ``kind``."""
        stride = self.kinds[kind].stride
        return self.offsets[C.RECORDS_TENSOR.format(kind=kind)] + row * stride, stride

    def default_table(self) -> NDArray[np.uint32]:
        """[experts, 2] rows (kind, row) for experts of one kind in order."""
        if self.mixed:
            raise FormatError(f"{self.layer.path}: experts of several kinds need a table")
        table = np.empty((self.layer.experts, 2), dtype="<u4")
        table[:, 0] = self.layer.kinds[0][0]
        table[:, 1] = np.arange(self.layer.experts)
        return table

    def table(self, tail: bytes) -> NDArray[np.uint32]:
        """The expert table [experts, 2] of a shard, checked; ``tail`` is the file from byte ``self.tail`` on."""
        if not self.mixed:
            return self.default_table()
        table = np.frombuffer(tail, "<u4", 2 * self.layer.experts).reshape(-1, 2)
        self.check_table(table)
        return table

    def check_table(self, table: NDArray[np.uint32]) -> None:
        """Every record of every kind must belong to exactly one expert."""
        seen = sorted((int(kind), int(row)) for kind, row in table)
        if seen != sorted((kind, row) for kind, count in self.layer.kinds for row in range(count)):
            raise FormatError(f"{self.layer.path}: the expert table does not name every record once")
