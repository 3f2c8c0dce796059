"""``convert``: the whole way from a checkpoint folder to a finished pack."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashpack.converter.allocation import Allocation, allocate, nominal
from flashpack.converter.elsewhere import Elsewhere, Job
from flashpack.converter.execute import default_workers, execute, resume
from flashpack.converter.folder import Source, SourceFolder, base_name, is_remote, pinned
from flashpack.converter.journal import Journal, check_folder, check_start, origin_of, start_of
from flashpack.converter.names import Bindings, fit
from flashpack.converter.options import Options
from flashpack.converter.plan import Plan, bits_per_weight, make_plan
from flashpack.converter.report import LayerError, Report
from flashpack.converter.source import CONFIG, Checkpoint, open_checkpoint
from flashpack.converter.tensor import Extent, SourceTensor
from flashpack.converter.units import Outcome, Progress
from flashpack.converter.weights import read_tensors
from flashpack.errors import FormatError, OutputError, SourceError
from flashpack.formats import constants as C
from flashpack.formats.files import output_errors
from flashpack.formats.writer import write_copy
from flashpack.skeleton import ExpertsModule, language_configs, tied_names
from flashpack.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bound:
    """A source whose every tensor has its place in the model; ``tensors`` are all that it has."""

    checkpoint: Checkpoint
    tensors: dict[str, SourceTensor]
    source_format: str
    model: PreTrainedModel
    sites: list[ExpertsModule]
    bindings: Bindings

    def plan(self, options: Options, allocation: Allocation | None = None) -> Plan:
        """What converting the source with ``options`` would do; the widths of experts are those of ``allocation``."""
        parts = self.checkpoint, options, self.model, self.sites, self.bindings, self.source_format
        if options.bpw and allocation is None:
            allocation = nominal(make_plan(*parts))
        return make_plan(*parts, allocation)


def bound(src: Source) -> Bound:
    """Read the headers of ``src`` and bind every tensor to a parameter of the model."""
    checkpoint = open_checkpoint(src)
    tensors, source_format = read_tensors(checkpoint)
    model, sites, bindings = fit(language_configs(checkpoint.config, checkpoint.folder.where(CONFIG)), tensors)
    _drop_tied(bindings, tied_names(model), checkpoint, tensors)
    return Bound(checkpoint, tensors, source_format, model, sites, bindings)


def plan(src: Source, options: Options | None = None) -> Plan:
    """What converting ``src`` would do; reads headers only."""
    return bound(src).plan(options or Options())


def convert(
    src: Source,
    out: str | os.PathLike[str] | None = None,
    experts: str = "auto",
    dense: str = "auto",
    group_size: int = 64,
    codec: str = "raw",
    overwrite: bool = False,
    workers: int | None = None,
    on_plan: Callable[[Plan, int], object] | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
    quality: str = "default",
    calib: str | os.PathLike[str] | None = None,
    bpw: str | float | None = None,
    choosing: Callable[[int], Progress] | None = None,
    calib_memory: int = Options.calib_memory,
) -> Report:
    """Convert a Hugging Face checkpoint to a pack: a folder, ``hf://org/model[@revision]``, or the URL of a folder.

    ``out`` defaults to ``./<name of src>.flashpack``. An interrupted conversion continues when called again with
    the same source and options. ``on_plan(plan, bytes already done)`` is called before the first byte is written;
    ``progress(bytes)`` from worker threads as source bytes are done.

    ``quality``: "fast" rounds to the nearest, "default" fits scales to the weights, "high" and "max" fit the weights to
    what the model does, as ``calib`` has recorded it (``flashpack calibrate``). ``bpw``: bits per weight of the routed
    experts together; each gets its own width then. To choose them the experts are read once more;
    ``choosing(bytes)`` is called before that, and gives what is called with the bytes as they are done.
    ``calib_memory``: bytes that experts may take together while they are calibrated.

    ``executor`` does the work in other processes or on other machines, which see source and ``out`` under the same
    paths and have the same versions of flashpack and transformers; else ``workers`` threads do it.

    Raises ``SourceError`` and ``UnsupportedError`` for the source, ``OutputError`` for the target.
    """
    begun = time.monotonic()
    target = Path(out) if out is not None else default_out(src)
    options = Options(
        experts, dense, group_size, codec, quality, str(calib or ""), "" if bpw is None else str(bpw), calib_memory
    )
    source = bound(src if overwrite else pinned(src, origin_of(target)))
    with contextlib.closing(source.checkpoint.folder):
        work = source.plan(options)
        with output_errors(target):
            check_folder(target, overwrite)
            check_space(target, work.file_sizes(), overwrite)
        if options.bpw:
            work = source.plan(
                options, _allocation(work, target, overwrite, choosing or (lambda total: lambda count: None))
            )
        elsewhere = None
        if executor is not None:
            where = str(src) if is_remote(src) else str(Path(src).resolve())
            elsewhere = Elsewhere(executor, Job(where, options, str(target.resolve()), json.dumps(start(work))))
        return _convert(work, target, overwrite, workers, elsewhere, on_plan, progress or (lambda count: None), begun)


def _allocation(work: Plan, target: Path, overwrite: bool, choosing: Callable[[int], Progress]) -> Allocation:
    """What an unfinished conversion decided, or else a decision now, which takes long: not before it is clear that the
    conversion can go on."""
    begun = {} if overwrite else start_of(target)
    if begun:
        wanted = json.loads(json.dumps(start(work)))
        for line in (begun, wanted):  # what is to be decided still
            line["recipe"] = {k: v for k, v in line.get("recipe", {}).items() if k != "allocation"}
        check_start(target, begun, wanted)
    known = None if overwrite else Allocation.read(target, work)
    return known or allocate(work, choosing)


def _convert(
    work: Plan,
    target: Path,
    overwrite: bool,
    workers: int | None,
    elsewhere: Elsewhere | None,
    on_plan: Callable[[Plan, int], object] | None,
    progress: Progress,
    begun: float,
) -> Report:
    source_bytes = work.source_bytes()
    journal = Journal(target, start(work), overwrite)
    try:
        if work.allocation is not None:  # before anything that follows it
            write_copy(target, C.ALLOCATION, work.allocation.to_bytes())
        finished = resume(work, target, journal)
        work.notices += journal.notices
        resumed_bytes = sum(source_bytes[path] for path in finished)
        if on_plan:
            on_plan(work, resumed_bytes)
        threads = workers or default_workers()
        identity, outcomes = execute(work, target, journal, finished, progress, threads, elsewhere)
        pack_bytes = sum(o.file.size for o in outcomes.values()) + (target / C.MANIFEST).stat().st_size
        journal.remove()
    except (FormatError, OSError):
        journal.check()
        raise
    finally:
        journal.close()
    errors = [LayerError.of(path, o.errors) for path, o in sorted(outcomes.items()) if any(o.errors)]
    by_role: dict[str, int] = {}
    for o in outcomes.values():
        by_role[o.file.role] = by_role.get(o.file.role, 0) + o.file.size
    return Report(
        pack=str(target),
        identity=identity,
        source_bytes=sum(source_bytes.values()),
        pack_bytes=pack_bytes,
        expert_bytes=by_role.get("experts", 0),
        dense_bytes=by_role.get("dense", 0),
        expert_bits=bits_per_weight([weights for p in work.layers for weights in p.weights()]),
        dense_bits=bits_per_weight([(math.prod(t.source.shape), t.encoding) for t in work.dense()]),
        seconds=time.monotonic() - begun,
        resumed_files=len(finished),
        resumed_bytes=resumed_bytes + sum(o.resumed_bytes for o in outcomes.values()),
        quality=str(target / C.QUALITY_PAGE),
        uncalibrated=_uncalibrated(outcomes) if work.calibration else None,
        errors=errors,
        notices=work.notices,
        dropped=work.dropped,
    )


def _uncalibrated(outcomes: dict[str, Outcome]) -> int:
    """Experts of which a matrix was to be calibrated and was not."""
    experts = [errors.values() for outcome in outcomes.values() for errors in outcome.errors]
    return sum(any(e.tokens is not None and e.weighted is None for e in matrices) for matrices in experts)


def default_out(src: Source) -> Path:
    """``./<name of src>.flashpack``."""
    return Path(base_name(src) + ".flashpack")


def _drop_tied(
    bindings: Bindings, tied: dict[str, str], checkpoint: Checkpoint, tensors: dict[str, SourceTensor]
) -> None:
    """A tied parameter that is present all the same must equal the one it is tied to; it is stored once."""
    for name, target in tied.items():
        if name not in bindings.dense:
            continue
        copy, original = bindings.dense.pop(name), bindings.dense[target]
        alike = (copy.format, copy.shape) == (original.format, original.shape) and all(
            _same_bytes(checkpoint.folder, extent, copy.parts[part]) for part, extent in original.parts.items()
        )
        if not alike:
            raise SourceError(f"config.json ties {copy.name} to {original.name}, but their values differ")
        bindings.dropped.append(next(n for n, t in tensors.items() if t.parts == copy.parts))


def _same_bytes(folder: SourceFolder, a: Extent, b: Extent) -> bool:
    rows = a.shape[0] if a.shape else 0
    blocks = [[x.take(row, min(1024, rows - row)) for x in (a, b)] for row in range(0, rows, 1024)]
    spans = [[(x.path, x.offset, x.nbytes) for x in block] for block in blocks]
    with folder.steps(spans.__getitem__, len(spans), threading.Event()) as steps:
        for number, (one, other) in enumerate(blocks):
            with steps.step(number) as reader:
                if not np.array_equal(one.read(reader), other.read(reader)):
                    return False
    return True


def start(work: Plan) -> dict[str, Any]:
    """What a conversion is of: all of this must be the same for one that continues it."""
    return {
        "flashpack": __version__,
        "format": C.VERSION,
        "source": work.checkpoint.fingerprint,
        "origin": work.checkpoint.folder.origin,
        "model": work.model,
        "recipe": work.recipe,
        "codec": work.options.codec,
    }


def check_space(target: Path, sizes: dict[str, int], overwrite: bool) -> None:
    """Refuse before the first byte what cannot fit; ``sizes`` are those of the files to come, by path."""
    needed, free = disk_space(target, sizes, overwrite)
    if needed > free:
        raise OutputError(
            f"{target}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; free some space or choose another disk"
        )


def disk_space(target: Path, sizes: dict[str, int], overwrite: bool) -> tuple[int, int]:
    """Bytes needed and free for the files ``sizes`` in the folder ``target``."""
    needed = sum(size for path, size in sizes.items() if overwrite or not (target / path).exists())
    existing = next(p for p in (target.absolute(), *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    # What is overwritten makes room before it is needed.
    replaced = target.rglob("*") if overwrite else (target / (path + C.PARTIAL_SUFFIX) for path in sizes)
    free += sum(p.lstat().st_blocks * 512 for p in replaced if p.is_file())
    # A little more than the files: manifest, journal, blocks of the file system.
    return needed + 16 * 2**20, free
