"""Carrying out a plan: one work unit per file of the pack, any number at once, each finished file in the journal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from flashpack.converter.elsewhere import Elsewhere, lost_workers, run
from flashpack.converter.folder import Stopped
from flashpack.converter.journal import Journal
from flashpack.converter.plan import Plan
from flashpack.converter.quality import quality_files
from flashpack.converter.units import Outcome, Progress, Site, write
from flashpack.errors import FormatError, OutputError
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.entries import FileEntry, Matrix
from flashpack.formats.files import open_inside, output_errors, pread
from flashpack.formats.layout import ShardLayout, dense_header
from flashpack.formats.manifest import Manifest
from flashpack.formats.reader import read_manifest, unlisted
from flashpack.formats.writer import commit, write_copy


def resume(plan: Plan, out: Path, journal: Journal) -> dict[str, Outcome]:
    """What earlier runs finished and the folder still holds, by path; what has changed since is done again."""
    layers = {p.layer.path: p.layer for p in plan.layers}
    finished = {}
    for path, line in journal.done.items():
        try:
            outcome = Outcome.from_json(line)
        except (FormatError, KeyError, TypeError) as e:
            raise OutputError(
                f"{journal.path}: what it says of {path} is of another version; use --overwrite to start anew"
            ) from e
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
    plan: Plan,
    out: Path,
    journal: Journal,
    finished: dict[str, Outcome],
    progress: Progress,
    workers: int,
    elsewhere: Elsewhere | None = None,
) -> tuple[str, dict[str, Outcome]]:
    """Write what is not ``finished`` yet, here or ``elsewhere``, then commit; returns the identity and every file's
    outcome."""
    if (out / C.MANIFEST).exists():
        # An earlier run was killed between the commit and the removal of its journal.
        committed, raw = read_manifest(out)
        return hexdigest(raw), {f.path: finished.get(f.path, Outcome(f)) for f in committed.files}
    folder = plan.checkpoint.folder
    _remove_abandoned(plan, out)
    missing = [path for path in (*plan.dense_files, *(p.layer.path for p in plan.layers)) if path not in finished]
    if elsewhere is None:
        made = _here(plan, missing, Site(out, folder, progress, journal.check, journal=journal), workers)
    else:
        made = _elsewhere(plan, missing, elsewhere, progress)
    outcomes = dict(finished)
    with contextlib.closing(made):
        for outcome in made:
            plan.checkpoint.check_unchanged()
            journal.append(outcome.to_json())
            outcomes[outcome.file.path] = outcome
    copies = {name: folder.read(name) for name in plan.copies}
    plan.checkpoint.check_unchanged()
    for name, data in copies.items():
        journal.check()
        outcomes[name] = Outcome(write_copy(out, name, data))
    if plan.allocation is not None:
        outcomes[C.ALLOCATION] = Outcome(write_copy(out, C.ALLOCATION, plan.allocation.to_bytes()))
    for name, data in quality_files(plan, {path: o.errors for path, o in outcomes.items()}).items():
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
    _remove_abandoned(plan, out)
    # What a kill during an earlier commit left is replaced by this one.
    replaced = {name + C.PARTIAL_SUFFIX for name in (C.MANIFEST, C.MANIFEST_DIGEST)}
    strangers = [path for path in unlisted(out, manifest) if path not in replaced]
    if strangers:
        raise OutputError(f"{out / strangers[0]}: no part of the pack; remove it and run the same command again")
    journal.check()
    return commit(out, manifest), outcomes


def _here(plan: Plan, paths: list[str], site: Site, workers: int) -> Generator[Outcome]:
    """Make the files in threads; yields each as it is finished."""
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(write, plan, path, site) for path in paths}
        try:
            for future in _as_finished(futures):
                if not isinstance(future.exception(), Stopped):  # the unit that failed is still to come
                    yield future.result()
        except BaseException:
            site.stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _elsewhere(plan: Plan, paths: list[str], elsewhere: Elsewhere, progress: Progress) -> Generator[Outcome]:
    """Make the files wherever the executor does; yields each as it is finished."""
    sizes = plan.source_bytes()
    futures = {elsewhere.executor.submit(run, elsewhere.job, path): path for path in paths}
    try:
        for future in _as_finished(futures):
            with lost_workers(futures[future]):
                outcome = future.result()
            progress(sizes[futures[future]])
            yield outcome
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _as_finished(futures: Iterable[Future[Outcome]]) -> Iterator[Future[Outcome]]:
    """Each future when it is done; a failed one last, so that one that finished at the same time is not lost."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        yield from sorted(done, key=lambda f: f.cancelled() or f.exception() is not None)


def _remove_abandoned(plan: Plan, out: Path) -> None:
    """Delete unfinished files of workers elsewhere that were lost; what they still write counts for nothing."""
    for path in (*plan.dense_files, *(p.layer.path for p in plan.layers)):
        final = out / path
        for part in final.parent.glob(f"{final.name}.*{C.PARTIAL_SUFFIX}"):
            with output_errors(part):
                part.unlink(missing_ok=True)


def default_workers() -> int:
    """Work units at once: one per processor."""
    return os.cpu_count() or 1
