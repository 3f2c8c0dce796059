"""What a conversion would need and give, told from the source's headers: sizes for each option, memory, disk, reading.

Every number follows from plans; nothing is read but headers. What the machine has, and what running the pack needs,
is added by the caller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashpack.converter.convert import Bound, disk_space
from flashpack.converter.options import DENSE_CHOICES, EXPERT_CHOICES, Options
from flashpack.converter.plan import Plan, bits_per_weight
from flashpack.converter.quantize import block_rows, is_exact
from flashpack.converter.tensor import SourceTensor
from flashpack.converter.units import AHEAD
from flashpack.converter.window import HELD_BYTES
from flashpack.formats.records import Encoding

_DECODED = 4
"""float32 copies of a block that decoding and quantizing hold at most."""

_THREAD = 8 * 2**20
"""Stack, allocator and small buffers of a thread."""


@dataclass(frozen=True)
class Choice:
    """A pack that could be made. Sizes in bytes, without the manifest; bits are stored bits per value."""

    experts: str
    dense: str
    expert_bytes: int
    dense_bytes: int
    pack_bytes: int
    expert_bits: float
    dense_bits: float
    bits: float
    chosen: bool


@dataclass(frozen=True)
class Dropped:
    """Tensors of the source that are no part of the language model, by where they stand: ``model.visual.*``."""

    pattern: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Forecast:
    """``plan`` and what follows from it. Bytes.

    ``read_bytes``: of tensors that the conversion reads; ``header_bytes`` and ``copy_bytes``: of headers and small
    files, read too; ``dropped_bytes``: of tensors that are not. ``working_bytes``: memory beside the process itself,
    an upper bound. ``disk_needed``: what is still to be written, ``disk_free``: on the target's file system.
    """

    plan: Plan
    choices: list[Choice]
    dropped: list[Dropped]
    remote: bool
    read_bytes: int
    header_bytes: int
    copy_bytes: int
    dropped_bytes: int
    working_bytes: int
    workers: int
    disk_needed: int
    disk_free: int

    @property
    def chosen(self) -> Choice:
        return next(choice for choice in self.choices if choice.chosen)

    @property
    def fits_disk(self) -> bool:
        return self.disk_needed <= self.disk_free

    def to_json(self) -> dict[str, Any]:
        own = ("remote", "read_bytes", "header_bytes", "copy_bytes", "dropped_bytes", "working_bytes", "workers")
        return {
            "choices": [asdict(c) for c in self.choices],
            "dropped_groups": [asdict(d) for d in self.dropped],
            **{name: getattr(self, name) for name in (*own, "disk_needed", "disk_free")},
        }


def forecast(bound: Bound, options: Options, target: Path, overwrite: bool, workers: int, remote: bool) -> Forecast:
    """What converting ``bound`` to ``target`` with ``options`` would need and give."""
    plan = bound.plan(options)
    sizes = plan.file_sizes()
    needed, free = disk_space(target, sizes, overwrite)
    folder = bound.checkpoint.folder
    dropped = {name: bound.tensors[name].nbytes for name in plan.dropped}
    shards = {extent.path for extent in bound.checkpoint.stored.values()}
    stored_bytes = sum(extent.nbytes for extent in bound.checkpoint.stored.values())
    return Forecast(
        plan=plan,
        choices=_choices(bound, options, plan),
        dropped=group(dropped, set(bound.tensors)),
        remote=remote,
        read_bytes=sum(plan.source_bytes().values()),
        header_bytes=sum(map(folder.size, shards)) - stored_bytes,
        copy_bytes=sum(sizes[name] for name in plan.copies),
        dropped_bytes=sum(dropped.values()),
        working_bytes=working_bytes(plan, workers) + (HELD_BYTES if remote else 0),
        workers=workers,
        disk_needed=needed,
        disk_free=free,
    )


def _choices(bound: Bound, options: Options, chosen: Plan) -> list[Choice]:
    """All combinations: the experts do not depend on the dense part's choice, nor it on theirs."""
    experts, dense = {}, {}
    plans = {
        name: bound.plan(Options(name, chosen.recipe["dense"], options.group_size, options.codec))
        for name in EXPERT_CHOICES[1:]
    }
    for name, plan in (plans | {chosen.recipe["experts"]: chosen}).items():
        sizes, weights = plan.file_sizes(), _expert_weights(plan)
        experts[name] = (sum(sizes[p.layer.path] for p in plan.layers), weights)
    for name in DENSE_CHOICES[1:]:
        plan = bound.plan(Options("auto", name, options.group_size, options.codec))
        sizes = plan.file_sizes()
        dense[name] = (sum(sizes[path] for path in plan.dense_files), _dense_weights(plan))
    copies = sum(chosen.file_sizes()[name] for name in chosen.copies)
    picked = (chosen.recipe["experts"], chosen.recipe["dense"])
    return [
        Choice(
            e,
            d,
            expert_bytes,
            dense_bytes,
            expert_bytes + dense_bytes + copies,
            bits_per_weight(expert_weights),
            bits_per_weight(dense_weights),
            bits_per_weight(expert_weights + dense_weights),
            (e, d) == picked,
        )
        for e, (expert_bytes, expert_weights) in experts.items()
        for d, (dense_bytes, dense_weights) in dense.items()
    ]


def _expert_weights(plan: Plan) -> list[tuple[int, Encoding]]:
    return [weights for p in plan.layers for weights in p.weights()]


def _dense_weights(plan: Plan) -> list[tuple[int, Encoding]]:
    return [(math.prod(t.source.shape), t.encoding) for t in plan.dense()]


def working_bytes(plan: Plan, workers: int) -> int:
    """Memory that ``workers`` files at once take at most, beside the process itself."""
    units = [
        AHEAD
        * (
            max(kind.stride for kind in set(p.kinds))
            + _THREAD
            + max(
                _encoding_bytes(p.sources[q.name].matrix(0), q.encoding)
                for kind in set(p.kinds)
                for q in kind.projections
            )
        )
        for p in plan.layers
    ]
    for tensors in plan.dense_files.values():
        units.append(2 * _THREAD + max(_encoding_bytes(t.source.flat(), t.encoding) for t in tensors))
    copies = sum(plan.checkpoint.folder.size(name) for name in plan.copies)
    calibrating = 0
    if plan.calibration is not None:
        together, each = plan.calibrated_at_once()
        calibrating = each * min(together, AHEAD * workers)
    return sum(sorted(units)[-workers:]) + calibrating + copies


def _encoding_bytes(source: SourceTensor, target: Encoding) -> int:
    """Memory for encoding a matrix: one block as it is stored, decoded, and encoded."""
    start, count = next(iter(block_rows(source, target)), (0, 0))
    block = source.rows(start, count) if count else source
    stored, values = block.nbytes, count * source.shape[-1]
    encoded = int(values * target.bits_per_weight() / 8)
    if is_exact(source, target):
        return stored + encoded
    return stored + encoded + _DECODED * 4 * values


def group(dropped: dict[str, int], names: set[str]) -> list[Dropped]:
    """Tensors (name -> bytes) by the shortest prefix under which all are dropped; ``names``: of the whole source.

    Prefixes that differ in a number only, but for the last part, are one: ``model.layers.*.rotary_emb.inv_freq``.
    """
    kept = {prefix for name in names.difference(dropped) for prefix in _prefixes(name)}
    groups: dict[str, list[str]] = {}
    for name in dropped:
        prefix = next((p for p in _prefixes(name) if p not in kept), name)
        stem, dot, last = prefix.rpartition(".")
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", stem) + dot + last
        groups.setdefault(pattern if prefix == name else f"{pattern}.*", []).append(name)
    return [Dropped(p, len(found), sum(dropped[n] for n in found)) for p, found in groups.items()]


def _prefixes(name: str) -> Iterable[str]:
    """Of "a.b.c": "a", "a.b", "a.b.c"."""
    end = name.find(".")
    while end >= 0:
        yield name[:end]
        end = name.find(".", end + 1)
    yield name
