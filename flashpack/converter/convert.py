"""``convert``: the whole way from a checkpoint folder to a finished pack."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flashpack.converter.execute import Progress, default_workers, execute, resume
from flashpack.converter.folder import SourceFolder
from flashpack.converter.journal import Journal, check_folder
from flashpack.converter.names import Bindings, bind
from flashpack.converter.plan import Options, Plan, bits_per_weight, make_plan
from flashpack.converter.report import LayerError, Report
from flashpack.converter.source import CONFIG, Checkpoint, open_checkpoint
from flashpack.converter.tensor import Extent
from flashpack.converter.weights import read_tensors
from flashpack.errors import FormatError, OutputError, SourceError
from flashpack.formats import constants as C
from flashpack.formats.files import output_errors
from flashpack.skeleton import build, find_experts, language_config, tied_names
from flashpack.version import __version__

log = logging.getLogger(__name__)


def plan(src: str | os.PathLike[str], options: Options | None = None) -> Plan:
    """What converting ``src`` would do; reads headers only (``--dry-run``)."""
    checkpoint = open_checkpoint(src)
    tensors, source_format = read_tensors(checkpoint)
    model = build(language_config(checkpoint.config, checkpoint.folder.where(CONFIG)))
    sites = find_experts(model)
    bindings = bind(model, sites, tensors)
    _drop_tied(bindings, tied_names(model), checkpoint)
    return make_plan(checkpoint, options or Options(), model, sites, bindings, source_format)


def convert(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    experts: str = "auto",
    dense: str = "auto",
    group_size: int = 64,
    codec: str = "raw",
    overwrite: bool = False,
    workers: int | None = None,
    on_plan: Callable[[Plan, int], object] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert a Hugging Face checkpoint folder to a pack.

    ``out`` defaults to ``./<name of src>.flashpack``. An interrupted conversion continues when called again with
    the same source and options. ``on_plan(plan, bytes already done)`` is called before the first byte is written;
    ``progress(bytes)`` from worker threads as source bytes are done.

    Raises ``SourceError`` and ``UnsupportedError`` for the source, ``OutputError`` for the target.
    """
    begun = time.monotonic()
    work = plan(src, Options(experts, dense, group_size, codec))
    target = Path(out) if out is not None else default_out(src)
    source_bytes = work.source_bytes()
    with output_errors(target):
        check_folder(target, overwrite)
        check_space(target, work.file_sizes(), overwrite)
    journal = Journal(target, _start(work), overwrite)
    try:
        finished = resume(work, target, journal)
        work.notices += journal.notices
        resumed_bytes = sum(source_bytes[path] for path in finished)
        if on_plan:
            on_plan(work, resumed_bytes)
        identity, outcomes = execute(
            work, target, journal, finished, progress or (lambda count: None), workers or default_workers()
        )
        pack_bytes = sum(o.file.size for o in outcomes.values()) + (target / C.MANIFEST).stat().st_size
        journal.remove()
    except (FormatError, OSError):
        journal.check()
        raise
    finally:
        journal.close()
        work.checkpoint.folder.close()
    errors = [LayerError(path, o.errors["max"], o.errors["mean"]) for path, o in sorted(outcomes.items()) if o.errors]
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
        expert_bits=bits_per_weight(
            [(p.layer.experts * math.prod(q.shape), q.encoding) for p in work.layers for q in p.kind.projections]
        ),
        dense_bits=bits_per_weight([(math.prod(t.source.shape), t.encoding) for t in work.dense()]),
        seconds=time.monotonic() - begun,
        resumed_files=len(finished),
        resumed_bytes=resumed_bytes,
        errors=errors,
        notices=work.notices,
        dropped=work.dropped,
    )


def default_out(src: str | os.PathLike[str]) -> Path:
    """``./<name of src>.flashpack``."""
    return Path(Path(src).resolve().name + ".flashpack")


def _drop_tied(bindings: Bindings, tied: dict[str, str], checkpoint: Checkpoint) -> None:
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
        bindings.dropped.append(copy.name)


def _same_bytes(folder: SourceFolder, a: Extent, b: Extent) -> bool:
    rows = a.shape[0] if a.shape else 0
    blocks = ((row, min(1024, rows - row)) for row in range(0, rows, 1024))
    return all(np.array_equal(a.take(*block).read(folder), b.take(*block).read(folder)) for block in blocks)


def _start(work: Plan) -> dict[str, Any]:
    """What a conversion is of: all of this must be the same for one that continues it."""
    return {
        "flashpack": __version__,
        "format": C.VERSION,
        "source": work.checkpoint.fingerprint,
        "model": work.model,
        "recipe": work.recipe,
        "codec": work.options.codec,
    }


def check_space(target: Path, sizes: dict[str, int], overwrite: bool) -> None:
    """Refuse before the first byte what cannot fit; ``sizes`` are those of the files to come, by path."""
    needed = sum(size for path, size in sizes.items() if overwrite or not (target / path).exists())
    existing = next(p for p in (target.absolute(), *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    # What is overwritten makes room before it is needed.
    replaced = target.rglob("*") if overwrite else (target / (path + C.PARTIAL_SUFFIX) for path in sizes)
    free += sum(p.lstat().st_blocks * 512 for p in replaced if p.is_file())
    # A little more than the files: manifest, journal, blocks of the file system.
    if needed + 16 * 2**20 > free:
        raise OutputError(
            f"{target}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; free some space or choose another disk"
        )
