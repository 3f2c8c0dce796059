"""How the commands talk: sizes, progress bars, JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def gb(size: float) -> str:
    """A size in decimal units: 217 GB = 217 x 10^9 bytes."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.{2 if size < 10 * scale else 1}f} {unit}"
    return f"{size:.0f} B"


def note(text: str) -> None:
    """A line for the person, not part of the answer."""
    print(text, file=sys.stderr)


def answer_json(data: Any) -> None:
    """The answer for a script."""
    print(json.dumps(data, indent=1))


def progress_bar(total: int, text: str, done: int = 0) -> tqdm[Any]:
    """Bytes, rate and time left on stderr; silent where stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total, initial=done, desc=text, unit="B", unit_scale=True, disable=None, leave=False, mininterval=0.2
    )


def quiet_libraries() -> None:
    """Keep transformers' advice about kernels and defaults out of our output."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
