"""Sizes as people read them."""

from __future__ import annotations


def gb(size: float) -> str:
    """A size in decimal units: 217 GB = 217 x 10^9 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.{2 if size < 10 * scale else 1}f} {unit}"
    return f"{size:.0f} B"
