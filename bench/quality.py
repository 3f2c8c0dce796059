"""How much a pack's quantization changes a model, and what `run` offers for speed does: KL divergence, and tool calls.

    python bench/quality.py [--experts q4 --dense q8] [--calls 500]      # of the trained model in examples
    python bench/quality.py --pack PACK --text FILE --experts-per-token 2 --prefer-cached 0.7 --arena 30 --arena 50

The first one's reference is a lossless pack of the same checkpoint, whose logits equal transformers' (see the tests);
the second one's the pack itself with its own routing. There, text is taken one token at a time, as in decoding, with a
part of the experts in memory; the records read per token are counted too. Prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

import flashpack
from flashpack.formats import Pack
from flashpack.runtime import budget
from flashpack.runtime.generate import encode_prompt, generate, load_tokenizer
from flashpack.skeleton import read_config

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
MODEL = ROOT / "examples" / "tiny-qwen3.5-moe"
WINDOWS, LENGTH = 8, 512


def windows(ids: list[int]) -> list[torch.Tensor]:
    """Pieces [1, LENGTH] of a text."""
    return [torch.tensor([ids[i * LENGTH : (i + 1) * LENGTH]]) for i in range(min(WINDOWS, len(ids) // LENGTH))]


@torch.inference_mode()
def divergence(reference: torch.nn.Module, model: torch.nn.Module, ids: list[int]) -> tuple[float, float, float]:
    """Mean and 99th percentile of KL(reference || model) in nats per token, and the share of equal best tokens."""
    losses, same = [], []
    for window in windows(ids):
        p, q = (m(window).logits[0].log_softmax(-1) for m in (reference, model))
        losses.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    kld = torch.cat(losses)
    return float(kld.mean()), float(kld.quantile(0.99)), float(torch.cat(same).float().mean())


def tool_calls(model: torch.nn.Module, tokenizer: object, count: int) -> tuple[int, int]:
    """(calls that are valid JSON, calls that equal the right one). `timeout` of `python` is random in the data."""
    valid = exact = 0
    lines = (DATA / "toolcalls.jsonl").read_text().splitlines()[:count]
    for request in tqdm(list(map(json.loads, lines)), desc="tool calls", leave=False):
        text = generate(model, tokenizer, encode_prompt(tokenizer, request["user"]), max_tokens=120).text
        try:
            call = json.loads(text.split("<tool_call>")[1].split("</tool_call>")[0])
        except (IndexError, ValueError):
            continue
        valid += 1
        found, right = call.get("arguments", {}), request["arguments"]
        if request["name"] == "python":
            found.pop("timeout", None)
            right.pop("timeout", None)
        exact += (call.get("name"), found) == (request["name"], right)
    return valid, exact


def load_with(pack: Path, arena: float, **options: Any) -> Any:
    """The model with room for ``arena`` per cent of all experts; ``options`` are those of ``load``."""
    divide = budget.divide

    def with_slots(opened: Pack, *numbers: Any) -> budget.Budget:
        counts = budget.stride_counts(opened.manifest)
        slots = {stride: max(budget.MIN_SLOTS, round(n * arena / 100)) for stride, n in counts.items()}
        return replace(divide(opened, *numbers), slots=slots)

    with mock.patch.object(budget, "divide", with_slots):
        return flashpack.load(pack, warm=False, prefetch=False, **options)


def decoded(model: Any, ids: list[int]) -> Iterator[tuple[torch.Tensor, int]]:
    """Log-probabilities [vocabulary] of what follows each token, which is taken alone, and what does follow."""
    for window in windows(ids):
        cache = model(window[:, :1], use_cache=True).past_key_values
        for i in range(1, LENGTH - 1):
            logits = model(window[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0, -1]
            yield logits.float().log_softmax(-1), int(window[0, i + 1])


@torch.inference_mode()
def routing(pack: Path, texts: list[Path], arenas: list[float], settings: dict[str, dict[str, Any]]) -> None:
    """A row for each text, arena and setting, after that of the model's own routing."""
    tokenizer = load_tokenizer(pack)
    vocabulary = read_config(pack).get_text_config(decoder=True).vocab_size
    print("| text | experts in memory | routing | read per token | KLD mean | KLD 99 % | same best | perplexity |")
    print("|---|---|---|---|---|---|---|---|")
    for text, arena in itertools.product(texts, arenas):
        ids = tokenizer(text.read_text())["input_ids"]
        shape = len(windows(ids)) * (LENGTH - 2), vocabulary
        with tempfile.TemporaryFile() as file:  # too much for memory with a large vocabulary
            own = torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))
            for name, options in ({"its own": {}} | settings).items():
                model = load_with(pack, arena, **options)
                klds, same, losses = torch.empty(len(own)), torch.empty(len(own)), torch.empty(len(own))
                for i, (found, following) in enumerate(decoded(model, ids)):
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
    parser.add_argument("--experts", default="q4")
    parser.add_argument("--dense", default="q8")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--pack", type=Path, help="of any model: measure what other routing changes")
    parser.add_argument("--text", type=Path, action="append", help=f"with --pack: {LENGTH} tokens or more; repeatable")
    parser.add_argument(
        "--arena", type=float, action="append", help="with --pack: slots, %% of all experts; repeatable"
    )
    parser.add_argument("--experts-per-token", type=int, action="append", default=[], help="with --pack; repeatable")
    parser.add_argument("--prefer-cached", type=float, action="append", default=[], help="with --pack; repeatable")
    args = parser.parse_args()
    if args.pack:
        if not args.text or not args.experts_per_token + args.prefer_cached:
            parser.error("--pack needs --text, and --experts-per-token or --prefer-cached")
        settings: dict[str, dict[str, Any]] = {f"K = {k}": {"experts_per_token": k} for k in args.experts_per_token}
        settings |= {f"prefer cached, {share:g}": {"prefer_cached": share} for share in args.prefer_cached}
        routing(args.pack, args.text, args.arena or [50], settings)
        return
    with tempfile.TemporaryDirectory() as folder:
        flashpack.convert(MODEL, f"{folder}/reference", "source", "source")
        report = flashpack.convert(MODEL, f"{folder}/pack", args.experts, args.dense, args.group_size)
        reference, model = flashpack.load(f"{folder}/reference"), flashpack.load(f"{folder}/pack")
        tokenizer = load_tokenizer(Path(folder) / "pack")
        print("| pack | bits experts / dense | text | KLD mean | KLD 99 % | same best token |")
        print("|---|---|---|---|---|---|")
        for name in ("docs", "chat"):
            ids = tokenizer((DATA / f"{name}.txt").read_text())["input_ids"]
            mean, tail, same = divergence(reference, model, ids)
            bits = f"{report.expert_bits:.2f} / {report.dense_bits:.2f}"
            print(f"| {args.experts}, {args.dense} | {bits} | {name} | {mean:.4f} | {tail:.3f} | {same:.3f} |")
        if args.calls:
            valid, exact = tool_calls(model, tokenizer, args.calls)
            print(f"\ntool calls: {valid} of {args.calls} valid JSON, {exact} exact")


if __name__ == "__main__":
    main()
