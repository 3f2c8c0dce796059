"""Carrying out a plan: one work unit per file of the pack, any number at once, each finished file in the journal."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashpack.converter.encode import encode_dense, encode_record
from flashpack.converter.journal import Journal
from flashpack.converter.plan import DensePlan, LayerPlan, Plan
from flashpack.converter.quantize import Error, SourceFiles
from flashpack.errors import IntegrityError
from flashpack.formats.entries import FileEntry, Matrix, TensorEntry
from flashpack.formats.manifest import Manifest
from flashpack.formats.records import RecordKind
from flashpack.formats.writer import DenseWriter, RecordBuffer, ShardWriter, commit, write_copy

Progress = Callable[[int], object]
"""Called with the number of source bytes done since the last call; may come from several threads."""


@dataclass
class Outcome:
    """A finished file: its manifest entry, its tensors if dense, its quantization error if there is any."""

    file: FileEntry
    tensors: list[TensorEntry] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

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


def execute(
    plan: Plan, out: Path, journal: Journal, progress: Progress, workers: int
) -> tuple[str, dict[str, Outcome]]:
    """Write what the journal does not list yet, then commit; returns the identity and every file's outcome."""
    outcomes = {path: Outcome.from_json(entry) for path, entry in journal.done.items()}
    for path, outcome in outcomes.items():
        there = (out / path).stat().st_size if (out / path).is_file() else None
        if there != outcome.file.size:
            raise IntegrityError(f"{out / path}: was finished and has changed since; use --overwrite to start anew")
    stop = threading.Event()
    with SourceFiles(plan.checkpoint.folder) as files, ThreadPoolExecutor(workers) as pool:
        futures = _submit(pool, plan, out, files, progress, set(outcomes), stop)
        try:
            while futures:
                done, futures = wait(futures, return_when=FIRST_COMPLETED)
                for future in done:
                    outcome = future.result()
                    journal.append(outcome.to_json())
                    outcomes[outcome.file.path] = outcome
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    for name in plan.copies:
        data = (plan.checkpoint.folder / name).read_bytes()
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
    return commit(out, manifest), outcomes


class Stopped(Exception):
    """Another unit failed; this one ends early."""


def _submit(
    pool: Executor,
    plan: Plan,
    out: Path,
    files: SourceFiles,
    progress: Progress,
    skip: set[str],
    stop: threading.Event,
) -> set[Future[Outcome]]:
    futures = set()
    for path, tensors in plan.dense_files.items():
        if path not in skip:
            futures.add(pool.submit(_write_dense, path, tensors, out, files, progress, stop))
    for layer in plan.layers:
        if layer.layer.path not in skip:
            futures.add(pool.submit(_write_layer, layer, plan.kinds, out, files, progress, stop))
    return futures


def _write_layer(
    plan: LayerPlan, kinds: list[RecordKind], out: Path, files: SourceFiles, progress: Progress, stop: threading.Event
) -> Outcome:
    def advance(count: int) -> None:
        if stop.is_set():
            raise Stopped
        progress(count)

    buffer = RecordBuffer(plan.kind)
    relative = []
    with ShardWriter(out, plan.layer, kinds) as writer:
        for expert in range(plan.layer.experts):
            relative += encode_record(files, plan, expert, buffer, advance)
            writer.write(expert, buffer.data.data)
        entry = writer.finish()
    return Outcome(entry, errors=_summary(relative))


def _write_dense(
    path: str, tensors: list[DensePlan], out: Path, files: SourceFiles, progress: Progress, stop: threading.Event
) -> Outcome:
    relative = []
    with DenseWriter(out, path, [s for t in tensors for s in t.specs()]) as writer:
        for tensor in tensors:
            error = Error()
            for name, data in encode_dense(files, tensor, error):
                if stop.is_set():
                    raise Stopped
                writer.append(name, data)
            if error.norm:
                relative.append(error.relative())
            progress(sum(p.nbytes for p in tensor.source.parts.values()))
        entry, entries = writer.finish()
    return Outcome(entry, entries, _summary(relative))


def _summary(relative: list[float]) -> dict[str, float]:
    return {"max": max(relative), "mean": sum(relative) / len(relative)} if relative else {}


def default_workers() -> int:
    """Work units at once: one per processor."""
    return os.cpu_count() or 1
