"""What `run`'s options for speed do to a model, by how many experts are in memory, and how much less is read for it.

    python bench/quality.py PACK --text FILE --experts-per-token 2 --prefer-cached 0.7 --arena 30 --arena 50

`flashpack eval` compares packs; this compares a pack with itself under other routing. Text is taken one token at a
time, as in decoding, with a part of the experts in memory; the records read per token are counted too. Prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import flashpack
from flashpack.formats import Pack
from flashpack.runtime import budget
from flashpack.runtime.score import read_windows
from flashpack.skeleton import read_config

WINDOWS, LENGTH = 8, 512


def load_with(pack: Path, arena: float, **options: Any) -> Any:
    """The model with room for ``arena`` per cent of all experts; ``options`` are those of ``load``."""
    divide = budget.divide

    def with_slots(opened: Pack, *numbers: Any) -> budget.Budget:
        counts = budget.stride_counts(opened.manifest)
        slots = {stride: max(budget.MIN_SLOTS, round(n * arena / 100)) for stride, n in counts.items()}
        return replace(divide(opened, *numbers), slots=slots)

    with mock.patch.object(budget, "divide", with_slots):
        return flashpack.load(pack, warm=False, prefetch=False, **options)


def decoded(model: Any, windows: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """Log-probabilities [vocabulary] of what follows each token, which is taken alone, and what does follow."""
    for window in windows.split(1):
        cache = model(window[:, :1], use_cache=True).past_key_values
        for i in range(1, LENGTH - 1):
            logits = model(window[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0, -1]
            yield logits.float().log_softmax(-1), int(window[0, i + 1])


@torch.inference_mode()
def routing(pack: Path, texts: list[Path], arenas: list[float], settings: dict[str, dict[str, Any]]) -> None:
    """A row for each text, arena and setting, after that of the model's own routing."""
    vocabulary = read_config(pack).get_text_config(decoder=True).vocab_size
    print("| text | experts in memory | routing | read per token | KLD mean | KLD 99 % | same best | perplexity |")
    print("|---|---|---|---|---|---|---|---|")
    for text, arena in itertools.product(texts, arenas):
        windows = read_windows(pack, text, WINDOWS, LENGTH)
        shape = len(windows) * (LENGTH - 2), vocabulary
        with tempfile.TemporaryFile() as file:  # too much for memory with a large vocabulary
            own = torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))
            for name, options in ({"its own": {}} | settings).items():
                model = load_with(pack, arena, **options)
                klds, same, losses = torch.empty(len(own)), torch.empty(len(own)), torch.empty(len(own))
                for i, (found, following) in enumerate(decoded(model, windows)):
                    if not options:
                        own[i] = found
                    klds[i] = (own[i].exp() * (own[i] - found)).sum()
                    same[i], losses[i] = own[i].argmax() == found.argmax(), -found[following]
                read = model.flashpack.store.stats.total().misses / model.flashpack.store.stats.steps
                figures = (
                    f"{klds.mean():.4f} | {klds.quantile(0.99):.3f} | {same.mean():.3f} | {losses.mean().exp():.3f}"
                )
                print(f"| {text.stem} | {arena:g} % | {name} | {read:.2f} | {figures} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument(
        "--text", type=Path, action="append", required=True, help=f"{LENGTH} tokens or more; repeatable"
    )
    parser.add_argument("--arena", type=float, action="append", help="slots, %% of all experts; repeatable")
    parser.add_argument("--experts-per-token", type=int, action="append", default=[], help="repeatable")
    parser.add_argument("--prefer-cached", type=float, action="append", default=[], help="repeatable")
    args = parser.parse_args()
    if not args.experts_per_token + args.prefer_cached:
        parser.error("--experts-per-token or --prefer-cached is needed")
    settings: dict[str, dict[str, Any]] = {f"K = {k}": {"experts_per_token": k} for k in args.experts_per_token}
    settings |= {f"prefer cached, {share:g}": {"prefer_cached": share} for share in args.prefer_cached}
    routing(args.pack, args.text, args.arena or [50], settings)


if __name__ == "__main__":
    main()
