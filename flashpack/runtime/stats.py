"""Counters of the expert store and of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerStats:
    """One layer's experts: requests found in the arena, requests read, bytes read, seconds waited for reads."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    wait_seconds: float = 0.0


@dataclass
class StoreStats:
    """All layers' counters; ``io`` says how files are read: direct (past the page cache) or buffered."""

    io: str
    layers: dict[int, LayerStats] = field(default_factory=dict)

    def total(self) -> LayerStats:
        """The sum over all layers."""
        total = LayerStats()
        for one in self.layers.values():
            total.hits += one.hits
            total.misses += one.misses
            total.bytes_read += one.bytes_read
            total.wait_seconds += one.wait_seconds
        return total

    @property
    def hit_rate(self) -> float:
        """Share of requests found in the arena; 0 before the first."""
        total = self.total()
        requests = total.hits + total.misses
        return total.hits / requests if requests else 0.0

    def reset(self) -> None:
        """Count from zero; what the arena holds stays."""
        self.layers = {index: LayerStats() for index in self.layers}

    def to_json(self) -> dict[str, Any]:
        return {
            "io": self.io,
            "hit_rate": self.hit_rate,
            "total": asdict(self.total()),
            "layers": {str(i): asdict(s) for i, s in sorted(self.layers.items())},
        }
