"""What checking and decoding experts costs: decode speed of a pack, and of the same pack compressed, by --check.

    flashpack recode PACK ZSTD_PACK --codec zstd
    python bench/checks.py PACK [ZSTD_PACK] --memory 2.5GB

One process, the variants in turns, so that a noisy machine treats them alike; random tokens (uniform routing). "store"
is the same without kernels: the time to fetch the experts of one token. Prints a Markdown table of medians.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from pathlib import Path

import torch

import flashpack
from flashpack.runtime.store import ExpertStore


def fetch_token(store: ExpertStore, layers: dict[int, int], top_k: int, rng: random.Random) -> float:
    """Seconds to fetch ``top_k`` random experts of every layer."""
    begun = time.perf_counter()
    for layer, experts in layers.items():
        for _ in store.batches(layer, sorted(rng.sample(range(experts), top_k))):
            pass
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", nargs="+", type=Path)
    parser.add_argument("--memory", default="2.5GB")
    parser.add_argument("--tokens", type=int, default=24, help="tokens per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decode", action="store_true", help="also decode with kernels (slow)")
    args = parser.parse_args()
    variants = [(pack, check) for pack in args.packs for check in ("never", "first", "always")]
    fetch: dict[tuple[Path, str], list[float]] = {v: [] for v in variants}
    decode: dict[tuple[Path, str], list[float]] = {v: [] for v in variants}
    counts: dict[tuple[Path, str], tuple[float, float]] = {}
    for number in range(args.rounds):
        for pack, check in variants:
            model = flashpack.load(pack, memory=args.memory, context=512, check=check)
            store = model.flashpack.store
            layers = {layer.index: layer.experts for layer in model.flashpack.pack.manifest.layers}
            rng = random.Random(number)
            for _ in range(8):  # the first tokens fill the arena
                fetch_token(store, layers, model.config.num_experts_per_tok, rng)
            store.stats.reset()
            top_k = model.config.num_experts_per_tok
            fetch[pack, check] += [fetch_token(store, layers, top_k, rng) for _ in range(args.tokens)]
            total = store.stats.total()
            counts[pack, check] = store.stats.hit_rate, total.bytes_read / args.tokens
            if args.decode:
                generator = torch.Generator().manual_seed(number)
                with torch.inference_mode():
                    for _ in range(args.tokens):
                        token = torch.randint(0, model.config.vocab_size, (1, 1), generator=generator)
                        begun = time.perf_counter()
                        model(token)
                        decode[pack, check].append(time.perf_counter() - begun)
            store.close()
            del model, store
            gc.collect()  # the arena goes with the model, which refers to itself
    print("| pack | --check | experts of a token | decode | hits | read per token |\n|---|---|---|---|---|---|")
    for (pack, check), times in fetch.items():
        hits, read = counts[pack, check]
        speed = f"{1 / statistics.median(decode[pack, check]):.2f} tok/s" if args.decode else "-"
        print(
            f"| {pack.name} | {check} | {statistics.median(times) * 1e3:.1f} ms | {speed} | {hits:.0%} "
            f"| {read / 1e6:.0f} MB |"
        )


if __name__ == "__main__":
    main()
