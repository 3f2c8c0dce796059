"""Which width each expert gets under ``--bpw``: measured on the source, decided once, kept in the pack.

All experts are rounded to each candidate width, and what that costs is compared (``allocate``). The decision is a small
file of the pack, so that a conversion that is continued, here or elsewhere, follows it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flashpack.converter.ahead import in_order
from flashpack.converter.encode import expert_values, record_spans
from flashpack.converter.options import CANDIDATES
from flashpack.errors import UsageError
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.manifest import canonical

if TYPE_CHECKING:
    from flashpack.converter.plan import LayerPlan, Plan

GROUPS = (("gate", "up"), ("down",))
"""Projections that get the same width."""

AHEAD = 2
"""Experts that are measured at once."""

Widths = dict[str, str]
"""Projection -> one of ``CANDIDATES``."""


@dataclass(frozen=True)
class Allocation:
    """Layer -> the widths of each expert."""

    layers: dict[int, list[Widths]]

    def to_bytes(self) -> bytes:
        """The file ``C.ALLOCATION``: layer -> [gate and up, down] of each expert."""
        layers = {f"{i:04}": [f"{w['gate']} {w['down']}" for w in widths] for i, widths in self.layers.items()}
        return canonical(layers)

    @property
    def digest(self) -> str:
        return hexdigest(self.to_bytes())

    @classmethod
    def read(cls, folder: Path, plan: Plan) -> Allocation | None:
        """What an unfinished conversion in ``folder`` decided for ``plan``; None if there is none that fits it."""
        try:
            if not (folder / C.JOURNAL).exists():
                return None
            data = json.loads((folder / C.ALLOCATION).read_bytes())
            layers = {int(i): [_widths(*one.split(" ")) for one in widths] for i, widths in data.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return None
        known = all(w in CANDIDATES for widths in layers.values() for one in widths for w in one.values())
        fits = {i: len(widths) for i, widths in layers.items()} == {p.layer.index: p.layer.experts for p in plan.layers}
        return cls(layers) if known and fits else None


def allocate(plan: Plan, choosing: Callable[[int], Callable[[int], object]]) -> Allocation:
    """Decide for all experts of ``plan``, in which the widths are still open, by reading them once.

    ``choosing`` is called with their bytes, and what it gives with the bytes of each when it is done. Raises
    ``UsageError`` if no widths give the bits.
    """
    sizes = plan.source_bytes()
    advance = choosing(sum(sizes[layer.layer.path] for layer in plan.layers))
    return _decide(plan, [_measure(plan, layer, advance) for layer in plan.layers])


def nominal(plan: Plan) -> Allocation:
    """Widths that give the bits asked for, from nothing but shapes: the sizes are right before anything is read."""
    each = np.array([4.0 ** -int(width[2:]) for width in CANDIDATES])
    return _decide(plan, [_bits(plan, layer) * each for layer in plan.layers])


def _decide(plan: Plan, costs: list[NDArray[np.float64]]) -> Allocation:
    """``costs``: of each layer, [experts, groups, candidates], or what broadcasts to it."""
    bits = [_bits(plan, layer) for layer in plan.layers]
    shapes = [(layer.layer.experts, len(GROUPS), len(CANDIDATES)) for layer in plan.layers]
    flat = [
        np.concatenate(
            [np.broadcast_to(a, shape).reshape(-1, shape[-1]) for a, shape in zip(arrays, shapes, strict=True)]
        )
        for arrays in (costs, bits)
    ]
    weights = sum(n for layer in plan.layers for n, _ in layer.weights())
    least, most = (float(end.sum()) / weights for end in (flat[1].min(axis=1), flat[1].max(axis=1)))
    bpw = float(plan.options.bpw)
    if not least <= bpw <= most:
        raise UsageError(f"--bpw {plan.options.bpw}: the widths of this model's experts give {least:.4g} to {most:.4g}")
    from flashpack.converter.allocate import choose  # imports torch

    chosen = choose(flat[0], flat[1], bpw * weights).reshape(-1, len(GROUPS)).tolist()
    layers = {}
    for layer in plan.layers:
        layers[layer.layer.index] = [_widths(*(CANDIDATES[i] for i in row)) for row in chosen[: layer.layer.experts]]
        del chosen[: layer.layer.experts]
    return Allocation(layers)


def _widths(gate_up: str, down: str) -> Widths:
    return {"gate": gate_up, "up": gate_up, "down": down}


def _bits(plan: Plan, layer: LayerPlan) -> NDArray[np.float64]:
    """[groups, candidates] stored bits of an expert's matrices."""
    table = np.zeros((len(GROUPS), len(CANDIDATES)))
    for row, names in enumerate(GROUPS):
        for column, width in enumerate(CANDIDATES):
            for p in plan.projections(layer.sources, _widths(width, width)):
                if p.name in names:
                    table[row, column] += math.prod(p.shape) * p.encoding.bits_per_weight()
    return table


def _measure(plan: Plan, layer: LayerPlan, advance: Callable[[int], object]) -> NDArray[np.float64]:
    """[experts, groups, candidates] what rounding each expert costs."""
    from flashpack.converter.allocate import sensitivities  # imports torch

    encodings = [plan.projections(layer.sources, _widths(width, width)) for width in CANDIDATES]
    costs = np.zeros((layer.layer.experts, len(GROUPS), len(CANDIDATES)))
    folder = plan.checkpoint.folder
    with folder.steps(lambda i: record_spans(layer, i), layer.layer.experts, Event()) as steps:

        def measure(expert: int, _: None) -> int:
            # A matrix that no width fits is kept as it is, and costs nothing.
            candidates = {
                p.name: [e[i].encoding for e in encodings] for i, p in enumerate(encodings[0]) if p.encoding.quantized
            }
            nbytes = sum(source.matrix(expert).nbytes for source in layer.sources.values())
            with layer.calibrated.room if layer.calibrated else contextlib.nullcontext():
                with steps.step(expert) as reader:
                    values, biases = expert_values(reader, layer, expert)
                found = sensitivities(values, biases, candidates, layer.calibrated, expert)
            for row, names in enumerate(GROUPS):
                costs[expert, row] = sum(found[name] for name in names if name in found)
            return nbytes

        with contextlib.closing(in_order(measure, layer.layer.experts, [None] * AHEAD)) as measured:
            for _, _, nbytes in measured:
                advance(nbytes)
    return costs
