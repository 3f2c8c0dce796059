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
from flashpack.converter.journal import Journal, check_folder
from flashpack.converter.mlx import is_mlx, read_mlx
from flashpack.converter.names import Bindings, bind
from flashpack.converter.plan import Options, Plan, bits_per_weight, make_plan
from flashpack.converter.quantize import SourceFiles
from flashpack.converter.report import LayerError, Report
from flashpack.converter.source import Checkpoint, Extent, SourceTensor, open_checkpoint, plain_tensor
from flashpack.errors import FormatError, OutputError, SourceError, UnsupportedError
from flashpack.formats import constants as C
from flashpack.formats.files import output_errors
from flashpack.skeleton import build, find_experts, read_config, tied_names
from flashpack.version import __version__

log = logging.getLogger(__name__)


def plan(src: str | os.PathLike[str], options: Options | None = None) -> Plan:
    """What converting ``src`` would do; reads headers only (``--dry-run``)."""
    checkpoint = open_checkpoint(src)
    tensors, source_format = _read_tensors(checkpoint)
    model = build(read_config(checkpoint.folder))
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


def _read_tensors(checkpoint: Checkpoint) -> tuple[dict[str, SourceTensor], str]:
    """The logical tensors of the source and the name of its weight format."""
    if is_mlx(checkpoint):
        return read_mlx(checkpoint), "mlx-affine"
    for config in (checkpoint.config, checkpoint.config.get("text_config") or {}):
        quantization: Any = config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            raise UnsupportedError(f"{checkpoint.folder}: weights quantized with {method!r} are not supported yet")
    return {name: plain_tensor(name, *t) for name, t in checkpoint.stored.items()}, "plain"


def _drop_tied(bindings: Bindings, tied: dict[str, str], checkpoint: Checkpoint) -> None:
    """A tied parameter that is present all the same must equal the one it is tied to; it is stored once."""
    with SourceFiles(checkpoint.folder) as files:
        for name, target in tied.items():
            if name not in bindings.dense:
                continue
            copy, original = bindings.dense.pop(name), bindings.dense[target]
            alike = (copy.encoding, copy.shape) == (original.encoding, original.shape) and all(
                _same_bytes(files, extent, copy.parts[part]) for part, extent in original.parts.items()
            )
            if not alike:
                raise SourceError(f"config.json ties {copy.name} to {original.name}, but their values differ")
            bindings.dropped.append(copy.name)


def _same_bytes(files: SourceFiles, a: Extent, b: Extent) -> bool:
    blocks = ((row, min(1024, a.rows - row)) for row in range(0, a.rows, 1024))
    return all(np.array_equal(files.read(a.take(*block)), files.read(b.take(*block))) for block in blocks)


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
