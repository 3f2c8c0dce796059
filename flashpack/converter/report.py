"""What a conversion did, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerError:
    """Relative quantization error |decoded - source| / |source| over the matrices of one file."""

    path: str
    largest: float
    mean: float


@dataclass(frozen=True)
class Report:
    """Result of ``convert``. Sizes in bytes, time in seconds, ``identity`` the pack's BLAKE3 identity.

    ``resumed_bytes`` of ``source_bytes`` were done by earlier, interrupted runs.
    """

    pack: str
    identity: str
    source_bytes: int
    pack_bytes: int
    expert_bytes: int
    dense_bytes: int
    expert_bits: float
    dense_bits: float
    seconds: float
    resumed_files: int
    resumed_bytes: int
    errors: list[LayerError] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
