"""Counters of the expert store and of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


@dataclass
class LayerStats:
    """One layer's experts.

    ``hits``: requests found in the arena; ``misses``: requests that were read, or being read. ``reads``: records that
    were read, ``bytes_read`` their bytes, ``ahead_bytes`` of these before the layer asked. ``guesses``: records read
    ahead for the layer's next request, ``right_guesses`` those that it then asked for.

    Seconds: ``wait_seconds`` nothing could be done but wait for reads, ``hit_seconds`` the caller used records that
    were found, ``miss_seconds`` records that were read, ``own_seconds`` the store took for itself.
    """

    hits: int = 0
    misses: int = 0
    reads: int = 0
    bytes_read: int = 0
    ahead_bytes: int = 0
    guesses: int = 0
    right_guesses: int = 0
    wait_seconds: float = 0.0
    hit_seconds: float = 0.0
    miss_seconds: float = 0.0
    own_seconds: float = 0.0

    def less(self, other: LayerStats) -> LayerStats:
        """The difference of every counter."""
        return LayerStats(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})


@dataclass
class StoreStats:
    """All layers' counters; ``io`` says how files are read: direct (past the page cache) or buffered, ``why`` why.

    ``steps``: how often the first layer that asks has asked: tokens, or chunks of a prompt.
    """

    io: str
    why: str
    layers: dict[int, LayerStats] = field(default_factory=dict)
    steps: int = 0

    def total(self) -> LayerStats:
        """The sum over all layers."""
        names = [f.name for f in fields(LayerStats)]
        return LayerStats(**{n: sum(getattr(one, n) for one in self.layers.values()) for n in names})

    @property
    def hit_rate(self) -> float:
        """Share of requests found in the arena; 0 before the first."""
        total = self.total()
        requests = total.hits + total.misses
        return total.hits / requests if requests else 0.0

    def copied(self) -> StoreStats:
        """As they are now."""
        return replace(self, layers={index: replace(one) for index, one in self.layers.items()})

    def since(self, before: StoreStats) -> StoreStats:
        """What has been counted after ``before`` was copied."""
        return replace(
            self,
            layers={index: one.less(before.layers[index]) for index, one in self.layers.items()},
            steps=self.steps - before.steps,
        )

    def reset(self) -> None:
        """Count from zero; what the arena holds stays."""
        self.layers = {index: LayerStats() for index in self.layers}
        self.steps = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "io": self.io,
            "io_why": self.why,
            "steps": self.steps,
            "hit_rate": self.hit_rate,
            "total": asdict(self.total()),
            "layers": {str(i): asdict(s) for i, s in sorted(self.layers.items())},
        }
