"""What an export is asked for, and what a target answers before it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flashpack.errors import UsageError

SHARD_BYTES = 5 * 10**9
"""A safetensors file ends before it is larger: transformers' own default."""


@dataclass(frozen=True)
class Options:
    """``weights``: how they are stored, None for the target's default; ``shard_size``: bytes of a safetensors file."""

    weights: str | None = None
    shard_size: int = SHARD_BYTES

    def choose(self, to: str, *choices: str) -> str:
        """``weights``, which must be one of the target's ``choices``; the first is its default."""
        if self.weights is not None and self.weights not in choices:
            raise UsageError(f"--weights {self.weights}: --to {to} has {', '.join(choices)}")
        return self.weights or choices[0]


@dataclass(frozen=True)
class Prepared:
    """``nbytes`` will be written by ``write(folder)``, which returns the losses that only the values show; those known
    before are in ``losses``."""

    nbytes: int
    write: Callable[[Path], list[str]]
    losses: list[str] = field(default_factory=list)
