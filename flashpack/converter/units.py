"""The work units of a conversion: one file of the pack each, written from the source and named when it is complete."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashpack.converter.ahead import in_order
from flashpack.converter.encode import dense_reader, encode_dense, encode_record, record_spans
from flashpack.converter.folder import SourceFolder, Stopped
from flashpack.converter.journal import Journal
from flashpack.converter.notes import Notes, begun_dense, begun_layer, part_of_dense, part_of_layer
from flashpack.converter.plan import DensePlan, LayerPlan, Plan
from flashpack.converter.quantize import Error, Errors, errors_from_json, errors_to_json
from flashpack.errors import OutputError
from flashpack.formats.entries import FileEntry, TensorEntry
from flashpack.formats.records import RecordKind
from flashpack.formats.writer import DenseWriter, RecordBuffer, ShardWriter

Progress = Callable[[int], object]
"""Called with the number of source bytes done since the last call; may come from several threads."""

AHEAD = 4
"""Experts of a layer that are read and encoded at once, beside the one that is written: the drive and the processors
have work at the same time."""


@dataclass
class Outcome:
    """A finished file: its manifest entry, its tensors if dense, and the errors of what was rounded.

    ``errors``: of each expert, or of each tensor or matrix of a dense file, in order. ``resumed_bytes`` of its source
    were done by an earlier run.
    """

    file: FileEntry
    tensors: list[TensorEntry] = field(default_factory=list)
    errors: list[Errors] = field(default_factory=list)
    resumed_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file.to_json(),
            "tensors": [t.to_json() for t in self.tensors],
            "errors": [errors_to_json(e) for e in self.errors],
        }

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Outcome:
        """Raises ``FormatError`` for a line of another form."""
        f = d["file"]
        return cls(
            FileEntry(f["path"], f["role"], f["size"], f["digests"]),
            [TensorEntry.from_json(t) for t in d["tensors"]],
            [errors_from_json(e) for e in d["errors"]],
        )


@dataclass(frozen=True)
class Site:
    """Where units are done: into which folder and from which one.

    ``stop`` ends them early with ``Stopped``. Without a ``journal`` they leave no notes on how far they have come.
    ``check`` is called before a file is made and before it gets its name. ``token`` makes the names of unfinished
    files this writer's own, where others may write the same file.
    """

    out: Path
    folder: SourceFolder
    progress: Progress
    check: Callable[[], object]
    stop: threading.Event = field(default_factory=threading.Event)
    journal: Journal | None = None
    token: str = ""


def write(plan: Plan, path: str, site: Site) -> Outcome:
    """Make the file ``path`` of the pack."""
    try:
        site.check()
        if path in plan.dense_files:
            return _write_dense(path, plan.dense_files[path], site)
        layer = next(p for p in plan.layers if p.layer.path == path)
        return _write_layer(layer, plan.kinds, site)
    except BaseException as e:
        site.stop.set()
        if isinstance(e, OutputError):
            site.check()  # says more, if the folder has gone
        raise


class _Slot:
    """Room for a record; new room where the one before was of another kind: between sections there are zeros."""

    def __init__(self) -> None:
        self._kind: RecordKind | None = None

    def of(self, kind: RecordKind) -> RecordBuffer:
        if kind is not self._kind:
            self._kind, self._buffer = kind, RecordBuffer(kind)
        return self._buffer


def _write_layer(
    plan: LayerPlan,
    kinds: list[RecordKind],
    site: Site,
) -> Outcome:
    def advance(count: int) -> None:
        if site.stop.is_set():
            raise Stopped
        site.progress(count)

    layer = plan.layer
    earlier = begun_layer(site.journal, layer)
    slots = [_Slot() for _ in range(AHEAD)]
    records = [record for record, _ in earlier]
    with ShardWriter(site.out, layer, kinds, plan.table(), records, site.token) as writer:
        first = writer.done
        errors = [found for _, found in earlier[:first]]
        resumed = sum(source.matrix(e).nbytes for e in range(first) for source in plan.sources.values())
        site.progress(resumed)
        notes = Notes(site.journal, layer.path, writer)
        with site.folder.steps(lambda i: record_spans(plan, first + i), layer.experts - first, site.stop) as steps:

            def encode(index: int, slot: _Slot) -> Errors:
                with steps.step(index) as reader:
                    return encode_record(reader, plan, first + index, slot.of(plan.kinds[first + index]), advance)

            with contextlib.closing(in_order(encode, layer.experts - first, slots)) as made:
                for index, slot, found in made:
                    errors.append(found)
                    writer.write(first + index, slot.of(plan.kinds[first + index]).data.data)
                    notes.add(part_of_layer(writer.stored[-1], found))
        site.check()
        entry = writer.finish()
    return Outcome(entry, errors=errors, resumed_bytes=resumed)


def _write_dense(
    path: str,
    tensors: list[DensePlan],
    site: Site,
) -> Outcome:
    specs = [s for t in tensors for s in t.specs()]
    earlier = begun_dense(site.journal, path)
    with DenseWriter(site.out, path, specs, [found for found, _ in earlier], site.token) as writer:
        first = writer.done
        errors = [found for _, found in earlier[:first]]
        resumed = sum(tensor.source.nbytes for tensor in tensors[:first])
        site.progress(resumed)
        notes = Notes(site.journal, path, writer)
        with dense_reader(site.folder, tensors[first:], site.stop) as reader:
            for tensor in tensors[first:]:
                error = Error()
                for name, data in encode_dense(reader, tensor, error):
                    if site.stop.is_set():
                        raise Stopped
                    writer.append(name, data)
                found = {tensor.name: error} if error.norm else {}
                errors.append(found)
                site.progress(tensor.source.nbytes)
                digests = writer.digests()
                notes.add(part_of_dense({s.name: digests[s.name] for s in tensor.specs()}, found))
        site.check()
        entry, entries = writer.finish()
    return Outcome(entry, entries, errors, resumed)
