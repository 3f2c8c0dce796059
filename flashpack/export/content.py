"""What is in a pack, for exports: dense tensors and experts one by one, as stored or decoded, each proven first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flashpack.errors import FormatError, IntegrityError, UnsupportedError
from flashpack.formats import Pack
from flashpack.formats.checksums import hexdigest
from flashpack.formats.dtypes import NUMPY
from flashpack.formats.encodings import decode
from flashpack.formats.entries import Layer
from flashpack.formats.files import pread
from flashpack.formats.reader import Shard
from flashpack.formats.records import Encoding, RecordKind
from flashpack.skeleton import build, find_experts, read_config, read_whole_config, tied_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from flashpack.skeleton import ExpertsModule

Progress = Callable[[int], object]

Parts = Mapping[str, NDArray[np.generic]]

PIECE_VALUES = 4 * 2**20
"""Values that are decoded at a time: 16 MiB in float32."""

_MORE_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "mtp_num_layers")
"""What families call the number of layers that predict further tokens."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the model: its name in the model class (of an expert: "gate", "down.bias", ...), its shape, and the
    stored ``parts``, as ``NUMPY[dtype]`` in the shapes of ``encoding.parts(shape)``."""

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    parts: Parts

    def values(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) decoded; of all if ``stop`` is None. float32 (but integers of ``raw`` tensors as such)."""
        if not self.encoding.quantized:
            whole = self.parts["weight"].reshape(self.shape)
            rows = whole if stop is None else whole[start:stop]
            return decode(self.encoding, {"weight": rows}, rows.shape)
        height, width = self.shape
        stop = height if stop is None else stop
        parts = {p: a[self.encoding.part_rows(p, start, stop, width)] for p, a in self.parts.items()}
        return decode(self.encoding, parts, (stop - start, width), self.encoding.first_in_block(start, width))

    def pieces(self) -> Iterator[NDArray[np.float32]]:
        """The values of all rows in pieces of about ``PIECE_VALUES``, in order."""
        if len(self.shape) < 2:
            yield self.values()
            return
        step = max(1, PIECE_VALUES // max(1, int(np.prod(self.shape[1:]))))
        for start in range(0, self.shape[0], step):
            yield self.values(start, min(self.shape[0], start + step))


@dataclass(frozen=True)
class Expert:
    """An expert: its matrices by projection ("gate", "up", "down"), and biases, as raw vectors, of those that have
    one. ``number`` counts from 0 in its layer. The arrays lie in memory of their own."""

    number: int
    kind: RecordKind
    matrices: dict[str, Stored]
    biases: dict[str, Stored]


class Content:
    """The content of an open pack. ``progress`` is called with the bytes that were read.

    Reading raises ``IntegrityError`` where they are not those that were written.
    """

    def __init__(self, pack: Pack, progress: Progress) -> None:
        self.pack, self._progress = pack, progress
        self.layers: tuple[Layer, ...] = pack.manifest.layers
        self._matrices = {m.name: m for m in pack.manifest.matrices}

    @property
    def nbytes(self) -> int:
        """Bytes of the pack that an export of everything reads."""
        dense = sum(t.nbytes for t in self.pack.manifest.tensors)
        return dense + sum(f.size for f in self.pack.manifest.files if f.role == "experts")

    @cached_property
    def config(self) -> PretrainedConfig:
        """The language model's configuration."""
        with self._format_errors():
            return read_config(self.pack.folder, self.pack.manifest.model["architecture"])

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model class, all of it on the meta device."""
        manifest = self.pack.manifest
        with self._format_errors():
            model = build(self.config, most=len(manifest.tensors) + 2 * len(manifest.layers))
        if type(model).__name__ != manifest.model["architecture"]:
            raise FormatError(
                f"{self.pack.folder}: config.json describes {type(model).__name__}, the manifest "
                f"{manifest.model['architecture']}"
            )
        return model

    @cached_property
    def sites(self) -> dict[int, ExpertsModule]:
        """The experts modules of ``model`` by the number of their layer; checked to be the pack's."""
        with self._format_errors():
            found = {site.layer: site for site in find_experts(self.model)}
        same = {(n, site.name, site.num_experts) for n, site in found.items()}
        if same != {(layer.index, layer.module, layer.experts) for layer in self.layers}:
            raise FormatError(f"{self.pack.folder}: config.json and manifest disagree about the experts")
        for layer in self.layers:
            for kind in self.kinds(layer):
                if {p.name: p.shape for p in kind.projections} != found[layer.index].projections():
                    raise FormatError(
                        f"{self.pack.folder}: experts of layer {layer.index} do not have the model's shape"
                    )
        return found

    def kinds(self, layer: Layer) -> list[RecordKind]:
        """The record kinds of a layer's experts."""
        return [self.pack.manifest.record_kinds[kind] for kind, _ in layer.kinds]

    @cached_property
    def dense(self) -> dict[str, tuple[tuple[int, ...], Encoding]]:
        """The dense tensors and matrices in the order of the files: name -> (shape, encoding). Reads nothing."""
        parts = {n for m in self._matrices.values() for n in m.tensor_names().values()}
        found: dict[str, tuple[tuple[int, ...], Encoding]] = {}
        for tensors in self.pack.manifest.dense_tensors.values():
            for t in tensors:
                if t.name in self._matrices:
                    found[t.name] = self._matrices[t.name].shape, self._matrices[t.name].encoding
                elif t.name not in parts:
                    found[t.name] = t.shape, Encoding("raw", t.dtype)
        return found

    def check_dense(self) -> None:
        """Every parameter of ``model`` must be there in its shape, and nothing else."""
        experts = {f"{site.name}.{name}" for site in self.sites.values() for name in site.parameters}
        tied = tied_names(self.model)
        expected = {n: tuple(p.shape) for n, p in self.model.state_dict().items() if n not in experts and n not in tied}
        found = {name: shape for name, (shape, _) in self.dense.items()}
        for name in sorted({*expected, *found}):
            if expected.get(name) != found.get(name):
                raise FormatError(f"{self.pack.folder}: config.json and manifest disagree about the tensor {name}")

    def peek(self, name: str) -> Stored:
        """A dense tensor or matrix, its parts mapped. Its bytes are not proven, and count for no progress."""
        shape, encoding = self.dense[name]
        return Stored(name, shape, encoding, {p: self.pack.map_tensor(n) for p, n in self._parts(name).items()})

    def tensor(self, name: str) -> Stored:
        """A dense tensor or matrix, its parts mapped. Its bytes are proven."""
        found = self.peek(name)
        for part, stored in self._parts(name).items():
            entry = self.pack.tensors[stored]
            if hexdigest(np.ascontiguousarray(found.parts[part]).data.cast("B")) != entry.digest:
                raise self._damaged(f"{self.pack.folder / entry.path}: tensor {stored}")
            self._progress(entry.nbytes)
        return found

    def _parts(self, name: str) -> dict[str, str]:
        """Part -> stored tensor."""
        return self._matrices[name].tensor_names() if name in self._matrices else {"weight": name}

    def experts(self, layer: Layer, count: int | None = None) -> Iterator[Expert]:
        """The experts of a layer, in order; the first ``count`` of them, for a look that counts for no progress."""
        with self.pack.open_shard(layer) as shard:
            progress = self._progress if count is None else _nothing
            progress(self.pack.files[layer.path].size - sum(shard.tail.spans))
            for number in range(layer.experts if count is None else count):
                yield self._expert(shard, layer, number)
                progress(shard.extent(number)[1])

    def _expert(self, shard: Shard, layer: Layer, number: int) -> Expert:
        offset, span = shard.extent(number)
        stored = memoryview(pread(shard.fd, span, offset, str(shard.path)))
        if not shard.intact(number, stored):
            raise self._damaged(f"{shard.path}: layer {layer.index}, expert {number}")
        kind = shard.kind(number)
        record = memoryview(bytearray(kind.stride))
        shard.decode(number, stored, record)
        arrays = {
            s.name: np.frombuffer(record[s.offset : s.offset + s.nbytes], NUMPY[s.dtype]).reshape(s.shape)
            for s in kind.sections
        }
        matrices, biases = {}, {}
        for p in kind.projections:
            parts = {part: arrays[f"{p.name}.{part}"] for part in p.encoding.part_names}
            matrices[p.name] = Stored(p.name, p.shape, p.encoding, parts)
            if p.bias:
                name = f"{p.name}.bias"
                biases[p.name] = Stored(name, p.shape[:1], Encoding("raw", p.bias), {"weight": arrays[name]})
        return Expert(number, kind, matrices, biases)

    def copies(self) -> list[str]:
        """Names of the files that the pack has unchanged (configuration, tokenizer, ...)."""
        return [f.path for f in self.pack.manifest.files if f.role == "copy"]

    def copy(self, name: str) -> bytes:
        """The bytes of one of ``copies``."""
        fd = self.pack.open(name)
        try:
            return bytes(pread(fd, self.pack.files[name].size, 0, str(self.pack.folder / name)))
        finally:
            os.close(fd)

    def left_out(self) -> list[str]:
        """Lines on the parts that config.json speaks of and no pack holds: towers for images and sound, layers that
        predict further tokens."""
        whole = read_whole_config(self.pack.folder)
        text = whole.get_text_config(decoder=True)
        lines = []
        for name in whole.sub_configs:
            part = getattr(whole, name, None)
            if part is not None and part is not text and text is not whole:
                what = name.removesuffix("_config").replace("_", " ")
                line = f"the checkpoint's {what} part is in no pack, so it is not exported"
                if self.config.get_text_config(decoder=True) is not self.config:
                    line += f"; {type(self.model).__name__} has a place for it, which transformers fills at random"
                lines.append(line)
        for name in _MORE_LAYERS:
            if getattr(text, name, None) or getattr(whole, name, None):
                lines.append(f"layers that predict further tokens ({name}) are in no pack, so they are not exported")
        return lines

    @contextlib.contextmanager
    def _format_errors(self) -> Iterator[None]:
        """A configuration that no checkpoint could be converted with is in no sound pack."""
        try:
            yield
        except UnsupportedError as e:
            folder = self.pack.folder
            raise FormatError(f"{folder}: {str(e).removeprefix(f'{folder}/')}") from e

    def _damaged(self, what: str) -> IntegrityError:
        return IntegrityError(f"{what}: is damaged; run 'flashpack verify {self.pack.folder}', then 'flashpack repair'")


def _nothing(count: int) -> None:
    pass
