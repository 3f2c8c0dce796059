"""Routing files made up for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flashpack.formats.routing import RecordedRun, Routing

PAGE = 16384


def made_up(
    seed: int = 1,
    steps: Sequence[int] = (5, 1, 1, 1, 4, 1, 1),
    layers: Sequence[int] = (1, 2, 5),
    experts: int = 8,
    top_k: int = 2,
    strides: Sequence[int] = (PAGE,),
    run: RecordedRun | None = None,
) -> Routing:
    """Routing with skewed choices. ``steps``: tokens of each; those with more than one are chunks of a prompt.
    ``strides``: record sizes, in turns."""
    rng = np.random.default_rng(seed)
    tokens = sum(steps)
    odds = 1 / (1.0 + np.arange(experts))
    chosen = np.stack(
        [[rng.choice(experts, top_k, replace=False, p=odds / odds.sum()) for _ in layers] for _ in range(tokens)]
    )
    weights = -np.sort(-rng.random(chosen.shape), axis=-1)
    counts = np.array(steps)
    sizes = np.resize(np.array(strides, np.uint32), (len(layers), experts))
    return Routing(
        tuple(layers),
        sizes,
        rng.integers(0, 500, tokens).astype(np.int32),
        np.arange(tokens, dtype=np.int32),
        np.repeat(np.arange(len(steps), dtype=np.int32), counts),
        weights.astype(np.float16),
        chosen.astype(np.uint8 if experts < 256 else np.uint16),
        np.repeat(counts > 1, counts),
        run,
        {"architecture": "ToyMoe", "pack": "00"},
    )


def arrays(routing: Routing) -> dict[str, Any]:
    """The arrays by name."""
    names = ("record_bytes", "tokens", "positions", "steps", "weights", "experts", "prompt")
    return {name: getattr(routing, name) for name in names}
