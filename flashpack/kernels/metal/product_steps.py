"""Products and experts as steps of decoding one token: launches with their arguments bound."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from flashpack.kernels.interface import Activation, RecordView, Step, StoredMatrix
from flashpack.kernels.metal import fallback
from flashpack.kernels.metal.kernels import MetalKernels, MetalRecord, Tiles, grid, metal_record
from flashpack.kernels.metal.layouts import MATRICES, NONE, Placed


class ProductSteps:
    """Those of ``kernels.interface.Steps`` that multiply by stored matrices, and what belongs to experts."""

    fusion = None

    def __init__(self, kernels: MetalKernels) -> None:
        self.device = kernels.device
        self.kernels = kernels

    def products(
        self,
        x: Tensor,
        weights: Sequence[Tensor | StoredMatrix],
        biases: Sequence[Tensor | None],
        out: Sequence[Tensor],
    ) -> Step | None:
        kernels = self.kernels
        placed = [kernels.placed(weight) for weight in weights]
        steps: list[Step] = []
        together: dict[tuple[str, int], list[int]] = {}
        for i, matrix in enumerate(placed):
            if matrix is None:
                return None
            if kernels.usable(f"linear_{matrix.format}"):
                together.setdefault((matrix.format, id(matrix.slab)), []).append(i)
            else:
                steps.append(partial(_product, x, weights[i], biases[i], out[i]))
        for same in together.values():
            for start in range(0, len(same), MATRICES):
                some = same[start : start + MATRICES]
                matrices = [m for m in (placed[i] for i in some) if m is not None]
                steps.append(self._linear(x, matrices, [biases[i] for i in some], [out[i] for i in some]))
        return steps[0] if len(steps) == 1 else self.sequence(steps)

    def _linear(
        self, x: Tensor, matrices: Sequence[Placed], biases: Sequence[Tensor | None], out: Sequence[Tensor]
    ) -> Step:
        lengths = [0 if bias is None else len(bias) for bias in biases]
        starts = itertools.accumulate(lengths[:-1], initial=0)
        adds = [NONE if bias is None else start for bias, start in zip(biases, starts, strict=True)]
        known = [bias.detach().float() for bias in biases if bias is not None]
        add = torch.cat(known) if known else self.kernels.nothing
        return self.kernels.linear_launch(matrices, x, add, adds, out)

    def sequence(self, steps: Sequence[Step]) -> Step:
        kept = tuple(steps)

        def run() -> None:
            for step in kept:
                step()

        return run

    def record(self, view: RecordView) -> RecordView | None:
        return self.kernels.bound_record(view, copy=True)

    def experts(self, x: Tensor, activation: Activation, out: Tensor) -> Callable[[Sequence[RecordView], int], None]:
        kernels, inputs = self.kernels, torch.zeros(len(out), dtype=torch.int32, device=self.device)

        def step(records: Sequence[RecordView], first: int) -> None:
            known = [metal_record(record) for record in records]
            if not all(kernels.can_compute(record.bound.network) for record in known):
                some = out[first : first + len(known)]
                kernels.experts(x.unsqueeze(0), known, [[0]] * len(known), activation, some)
                return
            for run, tiles in self._runs(known, first):
                hidden = kernels.up(run, tiles, inputs, x, activation, len(out))
                kernels.down(run, tiles, hidden, out)

        return step

    def experts_combined(
        self, x: Tensor, activation: Activation, weights: Tensor, out: Tensor
    ) -> Callable[[Sequence[RecordView]], None] | None:
        kernels = self.kernels
        if any(name.startswith("experts_") for name in kernels.refused):
            return None
        inputs = torch.zeros(len(weights), dtype=torch.int32, device=self.device)

        def step(records: Sequence[RecordView]) -> None:
            done = 0
            for run, tiles in self._runs([metal_record(record) for record in records], 0):
                network = run.bound.network
                hidden = kernels.up(run, tiles, inputs, x, activation, len(weights))
                sums = kernels.tables.constant(tiles.count, done, int(done > 0))
                kernels.kernel("experts_sum", network.formats[-1])(
                    run.slab, run.bound.each[-1], sums, tiles.table, weights, hidden, out, **grid(1, network.hidden)
                )
                done += tiles.count

        return step

    def _runs(self, records: Sequence[MetalRecord], first: int) -> list[tuple[MetalRecord, Tiles]]:
        """Neighbours that a launch computes together, the first of each, their results from row ``first`` on."""
        numbers = [n for pair, record in enumerate(records, first) for n in (record.base, pair, 1)]
        table = self.kernels.tables.table(numbers)
        runs, end = [], 0
        for _, same in itertools.groupby(records, lambda record: (id(record.bound), id(record.slab))):
            run = list(same)
            start, end = end, end + len(run)
            runs.append((run[0], Tiles(table[3 * start : 3 * end], len(run), many=False)))
        return runs

    def combine(self, outputs: Tensor, places: Tensor, weights: Tensor, out: Tensor) -> Step:
        if not self.kernels.usable("combine"):
            return partial(_combine, outputs, places, weights, out)
        return self.kernels.combine_launch(outputs, places, weights, out.unsqueeze(0))


def _product(x: Tensor, weight: Tensor | StoredMatrix, bias: Tensor | None, out: Tensor) -> None:
    out.copy_(fallback.product(x.unsqueeze(0), weight, bias)[0])


def _combine(outputs: Tensor, places: Tensor, weights: Tensor, out: Tensor) -> None:
    out.copy_(fallback.combine(outputs, places.unsqueeze(0), weights.unsqueeze(0))[0])
