"""Carrying out a plan: one work unit per file of the pack, any number at once, each finished file in the journal."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashpack.converter.ahead import in_order
from flashpack.converter.encode import dense_reader, encode_dense, encode_record, record_spans
from flashpack.converter.folder import SourceFolder, Stopped
from flashpack.converter.journal import Journal
from flashpack.converter.notes import Notes, begun_dense, begun_layer, part_of_dense, part_of_layer
from flashpack.converter.plan import DensePlan, LayerPlan, Plan
from flashpack.converter.quantize import Error
from flashpack.errors import FormatError, OutputError
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.entries import FileEntry, Matrix, TensorEntry
from flashpack.formats.files import open_inside, pread
from flashpack.formats.layout import ShardLayout, dense_header
from flashpack.formats.manifest import Manifest
from flashpack.formats.reader import read_manifest, unlisted
from flashpack.formats.records import RecordKind
from flashpack.formats.writer import DenseWriter, RecordBuffer, ShardWriter, commit, write_copy

Progress = Callable[[int], object]
"""Called with the number of source bytes done since the last call; may come from several threads."""

AHEAD = 3
"""Experts of a layer that are read and encoded at once, beside the one that is written: the drive and the processors
have work at the same time."""


@dataclass
class Outcome:
    """A finished file: its manifest entry, its tensors if dense, its quantization error if there is any.

    ``resumed_bytes`` of its source were done by an earlier run.
    """

    file: FileEntry
    tensors: list[TensorEntry] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    resumed_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file.to_json(),
            "tensors": [t.to_json() for t in self.tensors],
            "errors": self.errors,
        }

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Outcome:
        f = d["file"]
        return cls(
            FileEntry(f["path"], f["role"], f["size"], f["digests"]),
            [TensorEntry.from_json(t) for t in d["tensors"]],
            d["errors"],
        )


def resume(plan: Plan, out: Path, journal: Journal) -> dict[str, Outcome]:
    """What earlier runs finished and the folder still holds, by path; what has changed since is done again."""
    layers = {p.layer.path: p.layer for p in plan.layers}
    finished = {}
    for path, line in journal.done.items():
        outcome = Outcome.from_json(line)
        size = outcome.file.size
        try:
            if path in layers:
                layout = ShardLayout.of_size(layers[path], tuple(plan.kinds), size)
                header, tail = layout.header_bytes, layout.tail
            else:
                header, tail = dense_header([s for t in plan.dense_files[path] for s in t.specs()], path)[0], size
        except (KeyError, FormatError) as e:
            raise OutputError(
                f"{journal.path}: lists {path} of {size} bytes, which is no part of this pack; use --overwrite"
            ) from e
        if kept(out, outcome.file, header, tail):
            finished[path] = outcome
        else:
            journal.notices.append(f"{out / path}: was finished and has changed since; it is done again")
    return finished


def kept(out: Path, entry: FileEntry, header: bytes, tail: int) -> bool:
    """Whether a file still has its size, its header and its digest table (from byte ``tail``). Records are not read:
    damage to them is found by a check of the pack, against the digests in the table."""
    try:
        fd = open_inside(out, entry.path)
    except OSError:
        return False
    try:
        size = os.fstat(fd).st_size
        return (
            size == entry.size
            and pread(fd, len(header), 0, entry.path) == header
            and hexdigest(pread(fd, size - tail, tail, entry.path)) == entry.digests.get("tail", hexdigest(b""))
        )
    except OSError:
        return False
    finally:
        os.close(fd)


def execute(
    plan: Plan, out: Path, journal: Journal, finished: dict[str, Outcome], progress: Progress, workers: int
) -> tuple[str, dict[str, Outcome]]:
    """Write what is not ``finished`` yet, then commit; returns the identity and every file's outcome."""
    if (out / C.MANIFEST).exists():
        # An earlier run was killed between the commit and the removal of its journal.
        committed, raw = read_manifest(out)
        return hexdigest(raw), {f.path: finished.get(f.path, Outcome(f)) for f in committed.files}
    outcomes = dict(finished)
    stop = threading.Event()
    folder = plan.checkpoint.folder
    with ThreadPoolExecutor(workers) as pool:
        futures = _submit(pool, plan, out, journal, folder, progress, set(outcomes), stop)
        try:
            while futures:
                done, futures = wait(futures, return_when=FIRST_COMPLETED)
                # A failed unit last, so that one that finished at the same time is not lost.
                for future in sorted(done, key=lambda f: f.exception() is not None):
                    if isinstance(future.exception(), Stopped):
                        continue  # the unit that failed is still to come
                    outcome = future.result()
                    plan.checkpoint.check_unchanged()
                    journal.append(outcome.to_json())
                    outcomes[outcome.file.path] = outcome
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    copies = {name: folder.read(name) for name in plan.copies}
    plan.checkpoint.check_unchanged()
    for name, data in copies.items():
        journal.check()
        outcomes[name] = Outcome(write_copy(out, name, data))
    manifest = Manifest(
        model=plan.model,
        recipe=plan.recipe,
        record_kinds=tuple(plan.kinds),
        layers=tuple(p.layer for p in plan.layers),
        matrices=tuple(
            Matrix(t.name, (t.source.shape[0], t.source.shape[1]), t.encoding)
            for t in plan.dense()
            if t.encoding.quantized
        ),
        tensors=tuple(t for o in outcomes.values() for t in o.tensors),
        files=tuple(o.file for o in outcomes.values()),
    )
    # What a kill during an earlier commit left is replaced by this one.
    replaced = {name + C.PARTIAL_SUFFIX for name in (C.MANIFEST, C.MANIFEST_DIGEST)}
    strangers = [path for path in unlisted(out, manifest) if path not in replaced]
    if strangers:
        raise OutputError(f"{out / strangers[0]}: no part of the pack; remove it and run the same command again")
    journal.check()
    return commit(out, manifest), outcomes


def _submit(
    pool: Executor,
    plan: Plan,
    out: Path,
    journal: Journal,
    folder: SourceFolder,
    progress: Progress,
    skip: set[str],
    stop: threading.Event,
) -> set[Future[Outcome]]:
    def unit(write: Callable[..., Outcome], *arguments: Any) -> Outcome:
        journal.check()  # writing would make a removed folder anew
        try:
            return write(*arguments, out, folder, journal, progress, stop)
        except BaseException:
            stop.set()
            raise

    futures = set()
    for path, tensors in plan.dense_files.items():
        if path not in skip:
            futures.add(pool.submit(unit, _write_dense, path, tensors))
    for layer in plan.layers:
        if layer.layer.path not in skip:
            futures.add(pool.submit(unit, _write_layer, layer, plan.kinds))
    return futures


def _write_layer(
    plan: LayerPlan,
    kinds: list[RecordKind],
    out: Path,
    folder: SourceFolder,
    journal: Journal,
    progress: Progress,
    stop: threading.Event,
) -> Outcome:
    def advance(count: int) -> None:
        if stop.is_set():
            raise Stopped
        progress(count)

    layer = plan.layer
    earlier = begun_layer(journal, layer)
    buffers = [RecordBuffer(plan.kind) for _ in range(AHEAD)]
    with ShardWriter(out, layer, kinds, earlier=[record for record, _ in earlier]) as writer:
        first = writer.done
        relative = [error for _, errors in earlier[:first] for error in errors]
        resumed = sum(source.matrix(e).nbytes for e in range(first) for source in plan.sources.values())
        progress(resumed)
        notes = Notes(journal, layer.path, writer)
        with folder.steps(lambda i: record_spans(plan, first + i), layer.experts - first, stop) as steps:

            def encode(index: int, buffer: RecordBuffer) -> list[float]:
                with steps.step(index) as reader:
                    return encode_record(reader, plan, first + index, buffer, advance)

            with contextlib.closing(in_order(encode, layer.experts - first, buffers)) as records:
                for index, buffer, errors in records:
                    relative += errors
                    writer.write(first + index, buffer.data.data)
                    notes.add(part_of_layer(writer.stored[-1], errors))
        entry = writer.finish()
    return Outcome(entry, errors=_summary(relative), resumed_bytes=resumed)


def _write_dense(
    path: str,
    tensors: list[DensePlan],
    out: Path,
    folder: SourceFolder,
    journal: Journal,
    progress: Progress,
    stop: threading.Event,
) -> Outcome:
    earlier = begun_dense(journal, path)
    with DenseWriter(out, path, [s for t in tensors for s in t.specs()], [found for found, _ in earlier]) as writer:
        first = writer.done
        relative = [error for _, errors in earlier[:first] for error in errors]
        resumed = sum(tensor.source.nbytes for tensor in tensors[:first])
        progress(resumed)
        notes = Notes(journal, path, writer)
        with dense_reader(folder, tensors[first:], stop) as reader:
            for tensor in tensors[first:]:
                error = Error()
                for name, data in encode_dense(reader, tensor, error):
                    if stop.is_set():
                        raise Stopped
                    writer.append(name, data)
                errors = [error.relative()] if error.norm else []
                relative += errors
                progress(tensor.source.nbytes)
                digests = writer.digests()
                notes.add(part_of_dense({s.name: digests[s.name] for s in tensor.specs()}, errors))
        entry, entries = writer.finish()
    return Outcome(entry, entries, _summary(relative), resumed)


def _summary(relative: list[float]) -> dict[str, float]:
    return {"max": max(relative), "mean": sum(relative) / len(relative)} if relative else {}


def default_workers() -> int:
    """Work units at once: one per processor."""
    return os.cpu_count() or 1
