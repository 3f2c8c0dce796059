"""Quantizations of one model side by side: GGUF files, mlx folders and packs, by the same text and the same measure.

    python bench/quality_peers.py CHECKPOINT --text docs.txt --text chat.txt --tools toolcalls.jsonl FILE...

Each FILE (a .gguf file, a folder of mlx-lm, or a pack) is decoded to float32 and put into the transformers model of
CHECKPOINT, so that only the weights differ: first only its routed experts, with ``--whole`` all that it holds. KLD is
KL(checkpoint || file) in nats per token, natural logarithm, over all positions of windows of 512 tokens that each
start afresh; its standard error is over windows. Bits per weight are the bytes of the stored tensors without padding,
names and tokenizer, x 8 / weights. A tool call is what greedy decoding gives, judged as ``flashpack eval`` does; it
is generated from where it leaves what the checkpoint says. ``--half even`` and ``--half odd`` take every other window,
so that a choice can be made on one half and be reported on the other. Needs the package gguf for .gguf files.

How the files of the peers were made (of examples/tiny-qwen3.5-moe; see docs/experiments/quality_peers.md):

    python convert_hf_to_gguf.py CHECKPOINT --no-mtp --outtype f32 --outfile f32.gguf     # of llama.cpp
    llama-imatrix -m f32.gguf -f calibration.txt --parse-special -c 512 -o imatrix.gguf
    llama-quantize [--imatrix imatrix.gguf] f32.gguf Q4_K_M.gguf Q4_K_M
    mlx_lm.convert --hf-path STACKED -q --q-bits 4 --q-group-size 64 --mlx-path q4        # experts stacked before
    mlx_lm.convert --hf-path STACKED -q --quant-predicate mixed_3_6 --mlx-path mixed_3_6
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quality_peers_files import Stored, read
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH = 512
BATCH = 4
MAX_TOKENS = 120


@dataclass
class Text:
    """Windows [n, LENGTH] of a text, and the reference's last hidden states [n, LENGTH, H] for them."""

    name: str
    windows: torch.Tensor
    hidden: torch.Tensor


@dataclass
class Call:
    """A request, the tokens of its prompt, and what the reference says to it."""

    request: dict[str, Any]
    prompt: list[int]
    answer: list[int]


class Judge:
    """The reference, and the model that takes the weights to be judged."""

    def __init__(self, checkpoint: Path, texts: list[Path], tools: Path | None, count: int, half: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.original = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.head = self.model.get_output_embeddings().weight.detach().clone()
        chosen = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}[half]
        self.texts = [self._text(path, count, chosen) for path in texts]
        self.calls = self._calls(tools) if tools else []

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Put ``weights`` in the place of the reference's."""
        self.model.load_state_dict(self.original | weights)

    @torch.inference_mode()
    def divergence(self, text: Text) -> tuple[float, float, float, float]:
        """(mean KLD, its standard error over windows, 99th percentile, share of equal best tokens)."""
        losses, same = [], []
        for window, hidden in zip(text.windows.split(BATCH), text.hidden.split(BATCH), strict=True):
            p = (hidden @ self.head.T).log_softmax(-1)
            q = self.model(window).logits.log_softmax(-1)
            losses.append((p.exp() * (p - q)).sum(-1))
            same.append(p.argmax(-1) == q.argmax(-1))
        kld = torch.cat(losses)
        error = float(kld.mean(-1).std() / len(kld) ** 0.5)
        return float(kld.mean()), error, float(kld.quantile(0.99)), float(torch.cat(same).float().mean())

    @torch.inference_mode()
    def tool_calls(self) -> tuple[int, int]:
        """(calls that are valid JSON, calls that equal the right one)."""
        verdicts = [judge(call.request, self.tokenizer.decode(ids)) for call, ids in self._answers(self.calls)]
        return sum(valid for valid, _ in verdicts), sum(exact for _, exact in verdicts)

    def _text(self, path: Path, count: int, chosen: slice) -> Text:
        ids = self.tokenizer(path.read_text())["input_ids"]
        count = min(count, len(ids) // LENGTH)
        windows = torch.tensor(ids[: count * LENGTH]).reshape(count, LENGTH)[chosen]
        with torch.inference_mode():
            hidden = [self.model.model(part).last_hidden_state for part in windows.split(BATCH)]
        return Text(path.stem, windows, torch.cat(hidden))

    def _calls(self, tools: Path) -> list[Call]:
        """What the reference says: guessed from the right answer, then corrected by its own greedy decoding."""
        calls = []
        for request in map(json.loads, tools.read_text().splitlines()):
            right = json.dumps({"name": request["name"], "arguments": request["arguments"]}, ensure_ascii=False)
            messages = [{"role": "user", "content": request["user"]}]
            prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            guess = f"<tool_call>\n{right}\n</tool_call><|im_end|>"
            ids = [self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, guess)]
            calls.append(Call(request, *ids))
        with torch.inference_mode():
            for call, ids in self._answers(calls):
                call.answer = ids
        return calls

    def _answers(self, calls: list[Call]) -> Iterator[tuple[Call, list[int]]]:
        """Greedy answers. As long as the model agrees with ``call.answer``, all its tokens are computed at once."""
        ordered = sorted(calls, key=lambda call: len(call.prompt) + len(call.answer))
        for at in tqdm(range(0, len(ordered), 16), desc="tool calls", leave=False):
            part = ordered[at : at + 16]
            rows = [torch.tensor(call.prompt + call.answer) for call in part]
            best = self.model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits.argmax(-1)
            for call, found in zip(part, best, strict=True):
                first = len(call.prompt) - 1
                said = found[first : first + len(call.answer)].tolist()
                equal = next(
                    (i for i, pair in enumerate(zip(said, call.answer, strict=True)) if pair[0] != pair[1]), -1
                )
                yield call, call.answer if equal < 0 else self._generate(call.prompt, said[: equal + 1])

    def _generate(self, prompt: list[int], answer: list[int]) -> list[int]:
        """``answer`` continued to the end of the turn, or to MAX_TOKENS."""
        given, cache = prompt + answer, None
        while answer[-1] != self.tokenizer.eos_token_id and len(answer) < MAX_TOKENS:
            output = self.model(torch.tensor([given]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, given = output.past_key_values, [int(output.logits[0, -1].argmax())]
            answer = answer + given
        return answer


def judge(request: dict[str, Any], text: str) -> tuple[bool, bool]:
    """(valid JSON, equals the right call). `timeout` of `python` is random in the data."""
    try:
        call = json.loads(text.split("<tool_call>")[1].split("</tool_call>")[0])
    except (IndexError, ValueError):
        return False, False
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
        return True, False
    found, right = dict(call["arguments"]), dict(request["arguments"])
    if request["name"] == "python":
        found.pop("timeout", None)
        right.pop("timeout", None)
    return True, (call.get("name"), found) == (request["name"], right)


def bits(stored: dict[str, Stored]) -> float:
    """Bits per weight; tied embeddings count once."""
    return 8 * sum(s.nbytes for s in stored.values()) / sum(s.values.numel() for s in stored.values() if s.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help=".gguf, folder of mlx-lm, or pack")
    parser.add_argument("--text", type=Path, action="append", required=True, help="repeatable")
    parser.add_argument("--tools", type=Path, help='JSON lines: {"user", "name", "arguments"}')
    parser.add_argument("--windows", type=int, default=24, help="of each text")
    parser.add_argument("--half", choices=["all", "even", "odd"], default="all", help="of the windows")
    parser.add_argument("--whole", action="store_true", help="all of each file, not only its experts")
    args = parser.parse_intermixed_args()  # files may come after the options
    judged = Judge(args.checkpoint, args.text, args.tools, args.windows, args.half)
    columns = "".join(f" {t.name}: KLD ± SE | p99 | same best |" for t in judged.texts)
    print(f"| {'whole model' if args.whole else 'experts only'} | bits |{columns} JSON valid / exact |", flush=True)
    print("|---" * (3 + 3 * len(judged.texts)) + "|")
    for path in args.files:
        stored = read(path, judged.original)
        if not args.whole:
            stored = {name: s for name, s in stored.items() if re.search(r"\.experts\.", name)}
        judged.load({name: s.values for name, s in stored.items()})
        cells = ""
        for text in judged.texts:
            mean, error, tail, same = judged.divergence(text)
            cells += f" {mean:.4f} ± {error:.4f} | {tail:.3f} | {same:.3f} |"
        calls = " / ".join(map(str, judged.tool_calls())) if judged.calls else "-"
        print(f"| {path.name} | {bits(stored):.3f} |{cells} {calls} |", flush=True)


if __name__ == "__main__":
    main()
