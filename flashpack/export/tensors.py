"""Writing safetensors files of known tensors, in any order and in pieces, with the index that names the files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flashpack.errors import FormatError
from flashpack.formats import constants as C
from flashpack.formats.dtypes import ITEMSIZE
from flashpack.formats.files import create, output_errors, pwrite, resize, sync, write_durably
from flashpack.formats.header import Tensor, TensorSpec, build_header
from flashpack.formats.manifest import canonical

INDEX = "model.safetensors.index.json"


class Tensors:
    """The files ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` with an index, of ``specs`` in order.

    A file ends before it holds more than ``shard_size`` bytes; a tensor is never cut. ``framework`` is what
    ``__metadata__`` says: "pt" or "mlx". ``nbytes``: of all files. Nothing is written before ``open``.
    """

    def __init__(self, specs: Sequence[TensorSpec], shard_size: int, framework: str) -> None:
        shards: list[list[TensorSpec]] = [[]]
        size = 0
        for spec in specs:
            if shards[-1] and size + spec.nbytes > shard_size:
                shards.append([])
                size = 0
            shards[-1].append(spec)
            size += spec.nbytes
        count = len(shards)
        self._index: dict[str, str] = {}
        self._places: dict[str, tuple[str, Tensor]] = {}
        self._headers: dict[str, bytes] = {}
        self._left: dict[str, int] = {}
        self._fds: dict[str, int] = {}
        self._folder = Path()
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            # As the safetensors library does it: wide types first, so that every tensor is aligned to its own.
            ordered = sorted(shard, key=lambda s: -ITEMSIZE[s.dtype])
            self._headers[file], header = build_header(ordered, {"format": framework}, file)
            self._places |= {t.name: (file, t) for t in header.tensors}
            self._left[file] = header.size - header.data_start
        self._index = {name: file for name, (file, _) in self._places.items()} if count > 1 else {}
        if len(self._places) != len(specs):
            raise FormatError(f"a tensor would be exported twice: {_twice([s.name for s in specs])}")
        self._total = sum(self._left.values())
        self.nbytes = sum(map(len, self._headers.values())) + self._total

    def open(self, folder: Path) -> None:
        """Write to ``folder`` from here on."""
        self._folder = folder
        for file in [file for file, left in self._left.items() if not left]:
            self._close(file)

    def write(self, name: str, data: NDArray[np.generic], at: int = 0) -> None:
        """The bytes of ``data`` to byte ``at`` of the tensor ``name``; each byte once. Raises ``OutputError``."""
        file, tensor = self._places[name]
        raw = np.ascontiguousarray(data).data.cast("B")
        if at + len(raw) > tensor.nbytes:
            raise FormatError(f"{file}: tensor {name}: more than its {tensor.nbytes} bytes")
        if len(raw) > self._left[file]:
            raise FormatError(f"{file}: tensor {name}: written twice")
        with output_errors(self._folder / file):
            pwrite(self._descriptor(file), raw, tensor.offset + at)
            self._left[file] -= len(raw)
            if not self._left[file]:
                self._close(file)

    def finish(self) -> None:
        """All has been written: add the index, if there are several files."""
        for file, left in self._left.items():
            if left:
                raise FormatError(f"{file}: {left} bytes have not been written")
        if self._index:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._index}
            write_durably(self._folder, INDEX, canonical(index), C.PARTIAL_SUFFIX)

    def close(self) -> None:
        """Close what an error left open."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _descriptor(self, file: str) -> int:
        if file not in self._fds:
            self._fds[file] = create(self._folder / file, self._folder)
            header = self._headers[file]
            resize(self._fds[file], len(header) + self._left[file])
            pwrite(self._fds[file], header, 0)
        return self._fds[file]

    def _close(self, file: str) -> None:
        fd = self._descriptor(file)
        sync(fd)
        os.close(self._fds.pop(file))


def _twice(names: list[str]) -> str:
    return next(n for i, n in enumerate(names) if n in names[:i])
