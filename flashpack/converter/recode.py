"""``recode``: the same pack with its records stored by another codec, without the source and without loss."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flashpack.converter.convert import check_space
from flashpack.converter.execute import default_workers, kept
from flashpack.converter.folder import Stopped
from flashpack.converter.journal import Journal, check_folder
from flashpack.converter.units import Outcome, Progress
from flashpack.errors import IntegrityError, UsageError
from flashpack.formats import Pack
from flashpack.formats import constants as C
from flashpack.formats.entries import FileEntry, Layer
from flashpack.formats.files import chunks, output_errors, pread
from flashpack.formats.layout import ShardLayout, dense_spec
from flashpack.formats.writer import DenseWriter, ShardWriter, commit, write_copy
from flashpack.version import __version__


@dataclass(frozen=True)
class Recoded:
    """Result of ``recode``: sizes of the experts' files before and after, in bytes, and the new identity."""

    pack: str
    identity: str
    codec: str
    before: int
    after: int
    resumed_files: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def recode(
    pack: str | os.PathLike[str],
    out: str | os.PathLike[str],
    codec: str,
    overwrite: bool = False,
    workers: int | None = None,
    on_start: Callable[[int], object] | None = None,
    progress: Progress | None = None,
) -> Recoded:
    """Write ``pack`` to ``out`` with its records stored by ``codec``: "raw" or "zstd".

    Every byte of ``pack`` is compared with its digest on the way; the digests of the experts' contents stay as they
    are. An interrupted run continues when called again. ``on_start`` is called with the bytes to read.

    Raises ``IntegrityError`` where ``pack`` is damaged, ``OutputError`` for the target.
    """
    if codec not in C.CODECS:
        raise UsageError(f"--codec {codec}: choose from {', '.join(C.CODECS)}")
    opened, target = Pack(pack), Path(out)
    opened.check_copies()
    manifest = opened.manifest
    layers = {x.path: replace(x, codec=codec) for x in manifest.layers}
    with output_errors(target):
        check_folder(target, overwrite)
        sizes = {f.path: f.size for f in manifest.files}
        largest = {p: ShardLayout.largest(x, manifest.record_kinds).size for p, x in layers.items()}
        check_space(target, sizes | largest, overwrite)
    start = {"flashpack": __version__, "format": C.VERSION, "pack": opened.identity, "codec": codec}
    journal = Journal(target, start, overwrite)
    try:
        work = _Work(opened, target, layers, progress or (lambda count: None))
        outcomes = {path: o for path, line in journal.done.items() if work.is_kept((o := Outcome.from_json(line)).file)}
        resumed = len(outcomes)
        todo = [f for f in manifest.files if f.path not in outcomes]
        if on_start:
            on_start(sum(f.size for f in todo))
        with ThreadPoolExecutor(workers or default_workers()) as pool:
            jobs = [pool.submit(work.store, f) for f in todo]
            try:
                for job in as_completed(jobs):
                    outcome = Outcome(job.result())
                    journal.append(outcome.to_json())
                    outcomes[outcome.file.path] = outcome
            except BaseException:
                work.stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        files = tuple(o.file for o in outcomes.values())
        identity = commit(target, replace(manifest, layers=tuple(layers.values()), files=files))
        journal.remove()
    except OSError:
        journal.check()
        raise
    finally:
        journal.close()
    before = sum(f.size for f in manifest.files if f.role == "experts")
    after = sum(f.size for f in files if f.role == "experts")
    return Recoded(str(target), identity, codec, before, after, resumed)


class _Work:
    """Storing the files of an open pack in another folder, from any thread."""

    def __init__(self, pack: Pack, target: Path, layers: dict[str, Layer], progress: Progress) -> None:
        self.pack, self.target, self.layers, self.progress = pack, target, layers, progress
        self.stop = threading.Event()

    def is_kept(self, entry: FileEntry) -> bool:
        """Whether a file that an earlier run finished is still what it was."""
        manifest = self.pack.manifest
        if entry.path in self.layers:
            layout = ShardLayout.of_size(self.layers[entry.path], manifest.record_kinds, entry.size)
            return kept(self.target, entry, layout.header_bytes, layout.tail)
        if entry.role == "dense":
            return kept(self.target, entry, manifest.dense_layout(entry.path)[0], entry.size)
        return False  # copied files are small

    def store(self, entry: FileEntry) -> FileEntry:
        """Write one file; returns its row of the new manifest."""
        if entry.role == "experts":
            return self._shard(self.pack.manifest.layer_of(entry.path))
        fd = self.pack.open(entry.path)
        try:
            if entry.role == "dense":
                return self._dense(fd, entry)
            self._advance(entry.size)
            return write_copy(self.target, entry.path, bytes(pread(fd, entry.size, 0, entry.path)))
        finally:
            os.close(fd)

    def _shard(self, layer: Layer) -> FileEntry:
        manifest = self.pack.manifest
        with (
            self.pack.open_shard(layer) as shard,
            ShardWriter(self.target, self.layers[layer.path], manifest.record_kinds, shard.tail.table) as writer,
        ):
            for expert in range(layer.experts):
                offset, span = shard.extent(expert)
                stored = memoryview(pread(shard.fd, span, offset, str(shard.path)))
                if not shard.intact(expert, stored):
                    raise self._damaged(f"{shard.path}: layer {layer.index}, expert {expert}")
                record = memoryview(bytearray(shard.kind(expert).stride))
                shard.decode(expert, stored, record)
                writer.write(expert, record)
                self._advance(span)
            return writer.finish()

    def _dense(self, fd: int, entry: FileEntry) -> FileEntry:
        tensors = self.pack.manifest.dense_tensors[entry.path]
        specs = [dense_spec(t.name, t.dtype, t.shape) for t in tensors]
        with DenseWriter(self.target, entry.path, specs) as writer:
            for t in tensors:
                for piece in chunks(fd, t.offset, t.nbytes, entry.path):
                    writer.append(t.name, piece)
                    self._advance(len(piece))
            digests = writer.digests()
            for t in tensors:
                if digests[t.name] != t.digest:
                    raise self._damaged(f"{self.pack.folder / entry.path}: tensor {t.name}")
            return writer.finish()[0]

    def _advance(self, count: int) -> None:
        if self.stop.is_set():
            raise Stopped
        self.progress(count)

    def _damaged(self, what: str) -> IntegrityError:
        return IntegrityError(f"{what}: damaged; run 'flashpack repair {self.pack.folder} --from COPY_OR_SOURCE' first")
