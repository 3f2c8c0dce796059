"""A finished pack's content made again from its source: what ``verify --against`` compares and ``repair`` takes.

Only where the recipe is reproducible: the same source and options then give the same bytes on any machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from flashpack.converter.convert import plan
from flashpack.converter.encode import dense_reader, encode_dense, encode_record, record_spans
from flashpack.converter.folder import Source
from flashpack.converter.options import QUANTIZERS, Options
from flashpack.converter.plan import DensePlan, Plan
from flashpack.converter.quality import QUALITY_FILES, quality_files
from flashpack.converter.quantize import Error, Errors
from flashpack.errors import SourceError, UnsupportedError, UsageError
from flashpack.formats.entries import FileEntry, Layer, TensorEntry
from flashpack.formats.findings import Region
from flashpack.formats.manifest import Manifest
from flashpack.formats.repair import Bytes, encode_stored
from flashpack.formats.writer import RecordBuffer, RecordDigests

REPRODUCIBLE = ("minmax", "starts")
"""Quantizers whose result depends on source and options alone."""


class Remake:
    """The content of the pack described by ``manifest``, made from ``src``.

    Raises ``UnsupportedError`` if the recipe cannot be followed again, ``SourceError`` if ``src`` is damaged or
    another model than the pack's.
    """

    def __init__(self, src: Source, manifest: Manifest) -> None:
        self.manifest = manifest
        self.plan = plan(src, _options(manifest.recipe))
        self.folder = self.plan.checkpoint.folder
        self.name = self.folder.name
        try:
            _check_same(self.plan, manifest, self.name)
        except BaseException:
            self.close()
            raise
        self._layers = {p.layer.index: p for p in self.plan.layers}
        self._dense = {name: t for t in self.plan.dense() for name in t.tensor_names().values()}
        self._errors: dict[tuple[str, int | str], Errors] = {}

    def record(self, layer: Layer, expert: int, advance: Callable[[int], object] = lambda count: None) -> memoryview:
        """The record of an expert: stride bytes. ``advance`` is called with the source bytes that are done."""
        work = self._layers[layer.index]
        buffer = RecordBuffer(work.kinds[expert])
        with (
            self.folder.steps(lambda _: record_spans(work, expert), 1, threading.Event()) as steps,
            steps.step(0) as reader,
        ):
            self._errors[work.layer.path, expert] = encode_record(reader, work, expert, buffer, advance)
        return buffer.data.data

    def dense(self, plan: DensePlan) -> Iterator[tuple[str, memoryview]]:
        """The stored tensors of a dense tensor or matrix, piece by piece."""
        error = Error()
        with dense_reader(self.folder, [plan], threading.Event()) as reader:
            yield from encode_dense(reader, plan, error)
        self._errors["", plan.name] = {plan.name: error} if error.norm else {}

    def quality(self) -> dict[str, bytes]:
        """The quality report, name -> content. Everything that has not been made again yet is made for it."""
        for work in self.plan.layers:
            for expert in range(work.layer.experts):
                if (work.layer.path, expert) not in self._errors:
                    self.record(work.layer, expert)
        for tensor in self.plan.dense():
            if ("", tensor.name) not in self._errors:
                for _ in self.dense(tensor):
                    pass
        layers = {
            p.layer.path: [self._errors[p.layer.path, e] for e in range(p.layer.experts)] for p in self.plan.layers
        }
        dense = {path: [self._errors["", t.name] for t in tensors] for path, tensors in self.plan.dense_files.items()}
        return quality_files(self.plan, layers | dense)

    def copied(self, name: str) -> bytes | None:
        """A copied file, or one of the quality report; None if the source has none of this name."""
        if name in QUALITY_FILES:
            return self.quality()[name]
        return self.folder.read(name) if name in self.plan.copies else None

    # What ``formats.repair`` asks of a donor:

    def manifest_bytes(self) -> bytes | None:
        """A source has no manifest."""
        return None

    def tail(self, layer: Layer) -> bytes | None:
        """What stands behind the records of a shard, from all records made again."""
        digests = RecordDigests(layer, self.manifest.record_kinds, self._layers[layer.index].table())
        for expert in range(layer.experts):
            digests.add(expert, self.record(layer, expert))
        return digests.finish()[1]

    def stored(self, region: Region, layer: Layer) -> Iterator[Bytes]:
        """An expert's record as this pack's codec stores it."""
        assert region.expert is not None
        yield encode_stored(self.record(layer, region.expert), layer.codec)

    def tensor(self, entry: TensorEntry) -> Iterator[Bytes] | None:
        """The bytes of a dense tensor."""
        return (data for name, data in self.dense(self._dense[entry.name]) if name == entry.name)

    def copy(self, entry: FileEntry) -> bytes | None:
        """A copied file, or one of the quality report."""
        return self.copied(entry.path)

    def close(self) -> None:
        """Close the source's files."""
        self.folder.close()


def _options(recipe: dict[str, object]) -> Options:
    quantizer = recipe.get("quantizer")
    if quantizer not in REPRODUCIBLE:
        raise UnsupportedError(
            f"the pack's quantizer {quantizer!r} does not give the same bytes again from the source; "
            f"repair from another copy of the pack, and check with its own digests"
        )
    if "bpw" in recipe:
        raise UnsupportedError(
            "the widths of its experts were chosen one by one, which is not done again; "
            "repair from another copy of the pack, and check with its own digests"
        )
    experts, dense, group_size = (recipe.get(k) for k in ("experts", "dense", "group_size"))
    try:
        if not (isinstance(experts, str) and isinstance(dense, str) and isinstance(group_size, int)):
            raise UsageError("experts, dense or group_size is missing")
        quality = next(quality for quality, name in QUANTIZERS.items() if name == quantizer)
        return Options(experts, dense, group_size, quality=quality)
    except UsageError as e:
        raise UnsupportedError(f"the pack's recipe is not one that this version follows: {e}") from e


def _check_same(work: Plan, manifest: Manifest, name: str) -> None:
    """The plan must describe this very pack, up to the codec; says what differs."""
    theirs = {k: v for k, v in manifest.model.items() if k != "transformers"}
    ours = {k: v for k, v in work.model.items() if k != "transformers"}
    codecs = {layer.index: layer.codec for layer in manifest.layers}
    layers = [
        Layer(x.index, x.module, x.path, x.kinds, codecs.get(x.index, "raw")) for x in (p.layer for p in work.layers)
    ]
    tensors = {(s.name, path, s.dtype, s.shape) for path, ts in work.dense_files.items() for t in ts for s in t.specs()}
    for what, mine, its in (
        ("model", ours, theirs),
        ("recipe", work.recipe, manifest.recipe),
        ("shapes of experts", tuple(work.kinds), manifest.record_kinds),
        ("MoE layers", layers, list(manifest.layers)),
        ("dense tensors", tensors, {(t.name, t.path, t.dtype, t.shape) for t in manifest.tensors}),
    ):
        if mine != its:
            raise SourceError(f"{name}: not the source of this pack: other {what}{_difference(mine, its)}")


def _difference(ours: object, theirs: object) -> str:
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return ""
    key = next(k for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k))
    return f" ({key}: {ours.get(key)!r}, the pack's {theirs.get(key)!r})"
