"""``kernels.interface.Kernels`` on Metal: launches of the kernels in products.metal, experts.metal and combine.metal.

A launch returns at once. Results do not depend on what is computed together, as long as all kernels can be used.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashpack.formats.records import RecordKind
from flashpack.kernels.cpu.reference import ReferenceKernels
from flashpack.kernels.interface import ACTIVATIONS, Activation, Arena, RecordView, Step, Steps, StoredMatrix
from flashpack.kernels.metal import fallback, layouts
from flashpack.kernels.metal.device import Gpu
from flashpack.kernels.metal.layouts import MATRICES, NONE, ROWS, SIMDS, TILE, UNIT, WORDS, Network, Placed
from flashpack.kernels.metal.source import source
from flashpack.kernels.metal.tables import Tables

GROUP = 32 * SIMDS
"""Threads of a threadgroup."""


@dataclass(frozen=True, slots=True, eq=False)
class BoundNetwork:
    """A network with its layouts on the device: those before the activation together, and each."""

    network: Network
    first: Tensor
    each: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class MetalRecord(RecordView):
    """A record that kernels can compute: it begins at ``base`` in ``slab``."""

    bound: BoundNetwork
    slab: Tensor
    base: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """``Tile`` of experts.metal, int32 [count, 3]. ``many``: whether one has several pairs."""

    table: Tensor
    count: int
    many: bool

    @property
    def suffix(self) -> str:
        return "_many" if self.many else ""


class MetalKernels:
    """``Kernels`` on ``gpu``. ``refused``: names of kernels that must not be used; torch operations are instead.

    ``notices``: what is computed by torch, a line for each reason.
    """

    name = "metal"
    asynchronous = True

    def __init__(self, gpu: Gpu, refused: frozenset[str] = frozenset()) -> None:
        self.gpu, self.device, self.refused = gpu, gpu.device, refused
        self.notices: list[str] = []
        self.tables = Tables(gpu)
        self.nothing = torch.zeros(1, device=gpu.device)
        self._libraries: dict[str, Any] = {}
        self._kernels: dict[str, Any] = {}
        self._networks: dict[Network, BoundNetwork] = {}
        self._placed: dict[int, tuple[object, Placed | None]] = {}
        self._identity = torch.arange(0, dtype=torch.int32, device=gpu.device)
        self._views = ReferenceKernels(1)

    def library(self, part: str) -> Any:
        """The kernels of one of ``source.PARTS``, compiled when they are first asked for."""
        if part not in self._libraries:
            self._libraries[part] = self.gpu.compile(source(part))
        return self._libraries[part]

    def usable(self, *names: str) -> bool:
        """Whether kernels may be used; if not, a notice says so."""
        for name in self.refused.intersection(names):
            self.notice(f"kernel {name} is not used: torch operations are in its place")
        return self.refused.isdisjoint(names)

    def notice(self, line: str) -> None:
        if line not in self.notices:
            self.notices.append(line)

    def view_record(self, record: Tensor, kind: RecordKind) -> RecordView:
        view = self._views.view_record(record, kind)
        found = self.bound_record(view, copy=False)
        assert found is not None  # every encoding of records has kernels
        return found

    def bound_record(self, view: RecordView, copy: bool) -> MetalRecord | None:
        """``view`` with what kernels need; see ``layouts.network_of``."""
        found = layouts.network_of(view, copy)
        if found is None:
            return None
        network, where = found
        bound = self._networks.get(network)
        if bound is None:
            first = self.tables.constant(*itertools.chain(*network.layouts[:-1]))
            each = tuple(self.tables.constant(*layout) for layout in network.layouts)
            bound = self._networks[network] = BoundNetwork(network, first, each)
        return MetalRecord(view.first, view.down, view.first_bias, view.down_bias, bound, where.slab, where.base)

    def expert(self, x: Tensor, record: RecordView, activation: Activation) -> Tensor:
        out = torch.empty(x.shape, dtype=torch.float32, device=self.device)
        if len(x):
            self.experts(x, [record], [range(len(x))], activation, out)
        return out.to(x.dtype)

    def experts(
        self,
        x: Tensor,
        records: Sequence[RecordView],
        rows: Sequence[Sequence[int]],
        activation: Activation,
        out: Tensor,
    ) -> None:
        x = x.float().contiguous()
        starts = list(itertools.accumulate((len(some) for some in rows), initial=0))
        pairs = [row for some in rows for row in some]
        tiles: list[tuple[int, int, int]] = []
        groups: list[tuple[MetalRecord, int, int]] = []
        for members in _alike(records):
            first = metal_record(records[members[0]])
            if not self.can_compute(first.bound.network):
                for i in members:
                    states = x[torch.tensor(rows[i], dtype=torch.long, device=self.device)]
                    out[starts[i] : starts[i + 1]] = fallback.expert(states, records[i], activation)
                continue
            begin = len(tiles)
            tiles += [
                (metal_record(records[i]).base, pair, min(TILE, starts[i + 1] - pair))
                for i in members
                for pair in range(starts[i], starts[i + 1], TILE)
            ]
            groups.append((first, begin, len(tiles)))
        # One table: a second one may have to wait until nobody needs the first.
        table = self.tables.table([*pairs, *itertools.chain(*tiles)])
        inputs, places = table[: len(pairs)], table[len(pairs) :]
        for record, begin, end in groups:
            if begin < end:
                some = Tiles(places[3 * begin : 3 * end], end - begin, any(t[2] > 1 for t in tiles[begin:end]))
                hidden = self.up(record, some, inputs, x, activation, len(pairs))
                self.down(record, some, hidden, out)

    def can_compute(self, network: Network) -> bool:
        """Whether the kernels of experts that a network needs may be used."""
        kinds = zip(("up", *["down"] * 3), (network.formats[0], *network.formats), strict=False)
        return not self.refused or self.usable(
            *(f"experts_{step}{many}_{kind}" for step, kind in kinds for many in ("", "_many"))
        )

    def up(
        self, record: MetalRecord, tiles: Tiles, inputs: Tensor, x: Tensor, activation: Activation, pairs: int
    ) -> Tensor:
        """What comes after the activation, float32 [pairs, inner]: ``inputs`` are the pairs' rows of x."""
        network, bound = record.bound.network, record.bound
        if not network.fused or activation.name is None:
            return self._up_apart(record, tiles, inputs, x, activation, pairs)
        hidden = torch.empty(pairs, network.inner, device=self.device)
        between = self.tables.constant(
            ACTIVATIONS.index(activation.name), int(network.gated), float(activation.limit)
        )  # fmt: skip
        self.kernel(f"experts_up{tiles.suffix}", network.formats[0])(
            record.slab, bound.first, between, tiles.table, inputs, x, hidden,
            **grid(tiles.count, network.inner, ROWS // 2 if network.gated else ROWS),
        )  # fmt: skip
        return hidden

    def _up_apart(
        self, record: MetalRecord, tiles: Tiles, inputs: Tensor, x: Tensor, activation: Activation, pairs: int
    ) -> Tensor:
        """The same, with torch's activation between products of gate and of up."""
        network, bound = record.bound.network, record.bound
        if activation.name is None:
            self.notice("an activation that no kernel has is computed by torch operations")
        parts = []
        for kind, layout in zip(network.formats[:-1], bound.each, strict=False):
            parts.append(torch.empty(pairs, network.inner, device=self.device))
            self._product_of_pairs(record.slab, kind, layout, network.inner, tiles, inputs, x, parts[-1])
        return activation(torch.cat(parts, dim=-1)).float().contiguous()

    def down(self, record: MetalRecord, tiles: Tiles, hidden: Tensor, out: Tensor) -> None:
        """``hidden`` [pairs, inner] to the same rows of ``out``."""
        network, layout = record.bound.network, record.bound.each[-1]
        inputs = self.identity(len(hidden))
        self._product_of_pairs(record.slab, network.formats[-1], layout, network.hidden, tiles, inputs, hidden, out)

    def _product_of_pairs(
        self, slab: Tensor, kind: str, layout: Tensor, rows: int, tiles: Tiles, inputs: Tensor, x: Tensor, out: Tensor
    ) -> None:
        self.kernel(f"experts_down{tiles.suffix}", kind)(
            slab, layout, tiles.table, inputs, x, out, **grid(tiles.count, rows)
        )

    def combine(self, outputs: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        if not self.usable("combine"):
            return fallback.combine(outputs, places, weights)
        y = torch.empty(len(weights), outputs.shape[1], device=self.device)
        if y.numel():
            self.combine_launch(outputs, places.contiguous(), weights.float().contiguous(), y)()
        return y

    def combine_launch(self, outputs: Tensor, places: Tensor, weights: Tensor, y: Tensor) -> Step:
        """``combine`` of arrays as the kernel wants them, to y [tokens, width]."""
        tokens, width = y.shape
        shape = self.tables.constant(width, weights.numel() // tokens)
        kernel, threads = self.kernel("combine"), {"threads": (width, tokens), "group_size": (min(width, 256), 1)}
        return partial(kernel, shape, outputs, places, weights, y, **threads)

    def linear(self, x: Tensor, weight: Tensor | StoredMatrix) -> Tensor:
        rows, width = weight.shape
        flat = x.reshape(-1, width).float().contiguous()
        placed = self.placed(weight)
        if placed is None or not self.usable(f"linear_{placed.format}", f"linear_many_{placed.format}"):
            y = fallback.product(flat, weight)
        else:
            y = torch.empty(len(flat), rows, device=self.device)
            if len(flat) == 1:
                self.linear_launch([placed], flat, self.nothing, [NONE], [y])()
            elif len(flat):
                self.kernel("linear_many", placed.format)(
                    placed.slab, self._matrices([placed], [NONE]), self.tables.constant(len(flat)), flat, y,
                    **grid(-(-len(flat) // TILE), rows),
                )  # fmt: skip
        return y.to(x.dtype).view(*x.shape[:-1], rows)

    def linear_launch(
        self, matrices: Sequence[Placed], x: Tensor, add: Tensor, adds: Sequence[int], out: Sequence[Tensor]
    ) -> Step:
        """x [in] times up to ``MATRICES`` matrices of one format and slab; see ``Linear`` of products.metal."""
        blocks = sum(-(-m.rows // ROWS) for m in matrices)
        outputs = [*out, *[out[0]] * (MATRICES - len(out))]
        kernel, table = self.kernel("linear", matrices[0].format), self._matrices(matrices, adds)
        return partial(kernel, matrices[0].slab, table, x, add, *outputs, **grid(1, blocks, 1))

    def _matrices(self, matrices: Sequence[Placed], adds: Sequence[int]) -> Tensor:
        """``Linear`` of products.metal."""
        missing = MATRICES - len(matrices)
        ends = list(itertools.accumulate(-(-m.rows // ROWS) for m in matrices))
        return self.tables.constant(
            *itertools.chain(*(m.layout for m in matrices)), *[0] * (missing * WORDS),
            *(m.base for m in matrices), *[0] * missing, *ends, *[ends[-1]] * missing, *adds, *[NONE] * missing,
        )  # fmt: skip

    def placed(self, weight: Tensor | StoredMatrix) -> Placed | None:
        """Where a matrix of the dense part lies; None if there are no kernels for it, which a notice says."""
        known = self._placed.get(id(weight))
        if known is None:
            known = self._placed[id(weight)] = (weight, layouts.place(weight))  # kept, so that its id is
            if known[1] is None and isinstance(weight, Tensor):
                self.notice(f"no kernel knows {weight.dtype}: torch operations compute with it")
        return known[1]

    def embedding(self, ids: Tensor, weight: Tensor | StoredMatrix, dtype: torch.dtype) -> Tensor:
        flat, width = ids.reshape(-1), weight.shape[1]
        placed = self.placed(weight)
        if placed is None or not self.usable(f"rows_{placed.format}"):
            y = fallback.rows(flat, weight)
        else:
            y = torch.empty(len(flat), width, device=self.device)
            units = -(-width // UNIT)
            if len(flat):
                self.kernel("rows", placed.format)(
                    placed.slab, self._matrices([placed], [NONE]), flat.to(torch.int32), y,
                    threads=(units, len(flat)), group_size=(min(units, 256), 1),
                )  # fmt: skip
        return y.to(dtype).view(*ids.shape, width)

    def identity(self, count: int) -> Tensor:
        """int32 0, 1, 2 and so on."""
        if len(self._identity) < count:
            self._identity = torch.arange(2 * count, dtype=torch.int32, device=self.device)
        return self._identity[:count]

    def kernel(self, name: str, kind: str = "") -> Any:
        """A kernel by its name, or by its name before that of a format."""
        whole = f"{name}_{kind}" if kind else name
        found = self._kernels.get(whole)
        if found is None:
            found = self._kernels[whole] = getattr(self.library(kind or name), whole)
        return found

    def arena(self, size: int, early: object = None) -> Arena:
        from flashpack.kernels.metal.arena import MetalArena

        return MetalArena(self.gpu, size)

    def steps(self) -> Steps | None:
        from flashpack.kernels.metal.steps import KERNELS, MetalSteps

        return MetalSteps(self) if self.usable(*KERNELS) else None

    def commit(self) -> None:
        self.gpu.commit()

    def wait(self) -> None:
        self.gpu.wait()
        self.tables.waited()


def grid(tiles: int, rows: int, each: int = ROWS) -> dict[str, tuple[int, int]]:
    """Threads for products of tiles with matrices of so many rows, ``each`` of them for a SIMD group."""
    blocks = -(-rows // each)
    return {"threads": (GROUP * tiles, -(-blocks // SIMDS)), "group_size": (GROUP, 1)}


def metal_record(record: RecordView) -> MetalRecord:
    if not isinstance(record, MetalRecord):
        raise TypeError("a record that these kernels have not seen: view_record makes one")
    return record


def _alike(records: Sequence[RecordView]) -> Iterator[list[int]]:
    """The places of records that one launch can compute."""

    def key(i: int) -> tuple[int, int]:
        record = metal_record(records[i])
        return id(record.bound), id(record.slab)

    for _, members in itertools.groupby(sorted(range(len(records)), key=key), key):
        yield list(members)
