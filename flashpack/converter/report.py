"""What a conversion did, in numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from flashpack.converter.quantize import Errors


@dataclass(frozen=True)
class LayerError:
    """Relative quantization error |decoded - source| / |source| over the matrices of one file."""

    path: str
    largest: float
    mean: float

    @classmethod
    def of(cls, path: str, errors: list[Errors]) -> LayerError:
        """``errors``: of each expert or dense tensor; at least one matrix was rounded."""
        relative = [error.relative() for matrices in errors for error in matrices.values()]
        return cls(path, max(relative), math.fsum(relative) / len(relative))  # in any order: the same sum


@dataclass(frozen=True)
class Report:
    """Result of ``convert``. Sizes in bytes, time in seconds, ``identity`` the pack's BLAKE3 identity.

    ``resumed_bytes`` of ``source_bytes`` were done by earlier, interrupted runs. ``quality``: the page of the quality
    report, a path. ``uncalibrated``: how many experts saw too few tokens for at least one of their matrices; None if
    nothing was to be calibrated.
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
    quality: str
    uncalibrated: int | None = None
    errors: list[LayerError] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
