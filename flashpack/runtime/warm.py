"""What earlier runs of a pack used most, kept in the user's cache folder, so that the next start reads it first.

It changes what is in memory, never a result. A file that cannot be read or does not fit is as good as none, and a
folder that cannot be written to is no error.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from flashpack import user_cache
from flashpack.errors import FormatError
from flashpack.formats.header import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from flashpack.formats import Pack
    from flashpack.runtime.cache import Key

MAX_EXPERTS = 32768
"""Experts that are remembered, the hottest ones."""

_MAX_BYTES = 2 * 2**20
_VERSION = 1


def wanted(warm: bool | None) -> bool:
    """Whether to keep a history: as the caller says, or else unless FLASHPACK_WARM is 0."""
    return os.environ.get("FLASHPACK_WARM", "1") != "0" if warm is None else warm


def history_path(pack: Pack) -> Path:
    """The file about this pack, wherever it lies."""
    return user_cache.folder() / _name(pack)


def _name(pack: Pack) -> str:
    return f"experts/{pack.identity[:32]}.json"


def read(pack: Pack) -> dict[Key, float]:
    """Chances of experts to be used at a step, hottest first; empty if nothing (sound) is known."""
    try:
        path = history_path(pack)
        with open(path, "rb") as f:
            raw = f.read(_MAX_BYTES + 1)
        return _parse(parse_json(raw, str(path)), pack) if len(raw) <= _MAX_BYTES else {}
    except (OSError, RuntimeError, FormatError, ValueError, LookupError, TypeError):  # RuntimeError: no home
        return {}


def write(pack: Pack, ranking: Iterable[tuple[Key, float]]) -> None:
    """Remember ``ranking``, hottest first, instead of what was known; nothing if it is empty."""
    kept = [[layer, expert, float(f"{score:.4g}")] for (layer, expert), score in list(ranking)[:MAX_EXPERTS]]
    if not kept:
        return
    text = json.dumps({"version": _VERSION, "pack": pack.identity, "experts": kept}, separators=(",", ":"))
    user_cache.write(_name(pack), text)


def _parse(data: object, pack: Pack) -> dict[Key, float]:
    """Raises ``ValueError``, ``LookupError`` or ``TypeError`` if ``data`` is not about ``pack``."""
    if not isinstance(data, dict) or data.get("version") != _VERSION or data.get("pack") != pack.identity:
        raise ValueError("another version or pack")
    counts = {layer.index: layer.experts for layer in pack.manifest.layers}
    scores: dict[Key, float] = {}
    for one in data["experts"]:
        layer, expert, score = one
        if type(layer) is not int or type(expert) is not int or not 0 <= expert < counts.get(layer, 0):
            raise ValueError(f"no expert of this pack: {one}")
        if type(score) not in (int, float) or not 0 <= score <= 1:
            raise ValueError(f"no chance: {one}")
        scores[layer, expert] = float(score)
    return scores
