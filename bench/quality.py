"""How much a pack's quantization changes a model, and fewer experts per token do: KL divergence, and tool calls.

    python bench/quality.py [--experts q4 --dense q8] [--calls 500]      # of the trained model in examples
    python bench/quality.py --pack PACK --text FILE --experts-per-token 4 --experts-per-token 2    # of any pack

The first one's reference is a lossless pack of the same checkpoint, whose logits equal transformers' (see the tests);
the second one's the pack itself with all the experts per token that its model was trained with. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

import flashpack
from flashpack.runtime.generate import encode_prompt, generate, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
MODEL = ROOT / "examples" / "tiny-qwen3.5-moe"
WINDOWS, LENGTH = 8, 512


@torch.inference_mode()
def divergence(reference: torch.nn.Module, model: torch.nn.Module, ids: list[int]) -> tuple[float, float, float]:
    """Mean and 99th percentile of KL(reference || model) in nats per token, and the share of equal best tokens."""
    losses, same = [], []
    for i in range(min(WINDOWS, len(ids) // LENGTH)):
        window = torch.tensor([ids[i * LENGTH : (i + 1) * LENGTH]])
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


def fewer_experts(pack: Path, texts: list[Path], numbers: list[int]) -> None:
    """A row for each number of experts per token and text."""
    reference, tokenizer = flashpack.load(pack), load_tokenizer(pack)
    own = reference.flashpack.experts_per_token[1]
    print("| experts per token | text | KLD mean | KLD 99 % | same best token |")
    print("|---|---|---|---|---|")
    for number in numbers:
        model = flashpack.load(pack, experts_per_token=number)
        for text in texts:
            mean, tail, same = divergence(reference, model, tokenizer(text.read_text())["input_ids"])
            print(f"| {number} of {own} | {text.stem} | {mean:.4f} | {tail:.3f} | {same:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", default="q4")
    parser.add_argument("--dense", default="q8")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--pack", type=Path, help="of any model: measure what fewer experts per token change")
    parser.add_argument("--text", type=Path, action="append", help=f"with --pack: {LENGTH} tokens or more; repeatable")
    parser.add_argument("--experts-per-token", type=int, action="append", help="with --pack; repeatable")
    args = parser.parse_args()
    if args.pack:
        if not args.text or not args.experts_per_token:
            parser.error("--pack needs --text and --experts-per-token")
        fewer_experts(args.pack, args.text, args.experts_per_token)
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
