"""Dividing a memory budget: what is fixed is counted, the expert arena gets the rest. Pure arithmetic.

A budget is the whole process: anonymous memory, the mapped dense part, the KV cache of the whole context, working
space for a prompt chunk, and the arena.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashpack.errors import MemoryBudgetError
from flashpack.formats import Pack
from flashpack.formats.manifest import Manifest

MIN_SLOTS = 2
"""Slots per record size in the smallest arena: one to compute on, one to read into."""

PROMPT_CHUNK = 512
"""Tokens of a prompt processed at once; fixed, so that results do not depend on the memory given."""

_SLACK = 96 * 2**20
"""Allocator and thread overhead that no formula knows (measured: 40-80 MB)."""


@dataclass(frozen=True)
class Budget:
    """Bytes by use; ``total`` is their sum. ``slots`` says how many records of each stride the arena holds."""

    base: int
    dense: int
    kv: int
    work: int
    slots: dict[int, int]

    @property
    def arena(self) -> int:
        return sum(stride * count for stride, count in self.slots.items())

    @property
    def total(self) -> int:
        return self.base + self.dense + self.kv + self.work + self.arena

    def to_json(self) -> dict[str, int]:
        return {
            "base": self.base,
            "dense": self.dense,
            "kv": self.kv,
            "work": self.work,
            "arena": self.arena,
            "total": self.total,
        }


def work_bytes(hidden: int, top_k: int, vocab: int, heads_width: int) -> int:
    """Working space of one prompt chunk: expert outputs of all its tokens, activations, one row of logits."""
    activations = PROMPT_CHUNK * 4 * (top_k * hidden + 8 * hidden + 6 * heads_width)
    return activations + 8 * vocab + _SLACK


def divide(pack: Pack, base: int, kv: int, work: int, total: int | str | None, spare: int) -> Budget:
    """Divide ``total`` bytes (None: what may be taken unasked; "smallest": as little as works).

    ``base`` is the anonymous memory in use before the arena, ``spare`` what may be taken unasked. Raises
    ``MemoryBudgetError`` with the minimum if the total is too small.
    """
    counts = stride_counts(pack.manifest)
    minimum = smallest(base, pack.dense_bytes, kv, work, counts)
    if total == "smallest":
        return minimum
    if total is None:
        total = base + spare
        if total < minimum.total:
            raise MemoryBudgetError(
                f"not enough memory: {minimum.total / 1e9:.2f} GB needed at the least, {total / 1e9:.2f} GB available; "
                f"close other programs or lower --context"
            )
    assert isinstance(total, int)
    if total < minimum.total:
        raise MemoryBudgetError(
            f"--memory {total / 1e9:.2f} GB is too small: this pack needs at least {minimum.total / 1e9:.2f} GB "
            f"(process {base / 1e9:.2f}, dense part {pack.dense_bytes / 1e9:.2f}, KV cache {kv / 1e9:.2f}, working "
            f"space {work / 1e9:.2f}, experts {minimum.arena / 1e9:.3f}); a smaller --context needs less"
        )
    return Budget(base, pack.dense_bytes, kv, work, spread(counts, minimum.slots, total - minimum.total))


def smallest(base: int, dense: int, kv: int, work: int, counts: dict[int, int]) -> Budget:
    """The least that works; ``counts``: experts by record size."""
    return Budget(base, dense, kv, work, {stride: min(count, MIN_SLOTS) for stride, count in counts.items()})


def stride_counts(manifest: Manifest) -> dict[int, int]:
    """Number of experts by record size (stride)."""
    counts: dict[int, int] = {}
    for layer in manifest.layers:
        for kind, count in layer.kinds:
            stride = manifest.record_kinds[kind].stride
            counts[stride] = counts.get(stride, 0) + count
    return counts


def spread(counts: dict[int, int], smallest: dict[int, int], spare: int) -> dict[int, int]:
    """Slots: spread ``spare`` bytes over the record sizes in proportion to the bytes of their experts."""
    whole = sum(stride * count for stride, count in counts.items())
    return {stride: min(count, smallest[stride] + spare * count // whole) for stride, count in counts.items()}
