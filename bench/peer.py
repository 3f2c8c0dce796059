"""flashpack beside llama.cpp, in turns in one run: in memory and under memory limits; and what the limits are.

    python bench/make_checkpoint.py CHECKPOINT
    flashpack convert CHECKPOINT PACK --experts q4 --dense q4
    # in llama.cpp's tree, the same checkpoint: convert_hf_to_gguf.py, then llama-quantize --pure ... Q4_0
    python bench/peer.py PACK --peer LLAMA_BENCH --gguf FILE --limit 2.5GB --trace routing_docs.npz

Every measurement is a process of its own. Under a limit it runs in a memory cgroup of that size (as root), with its
files out of the page cache when it begins. Without --peer, flashpack alone. Prints Markdown: medians over the turns,
each turn's value in brackets, ratios turn by turn.

The drive's share: the records that were read are read again in the same bursts, layer by layer, by as many threads,
without computing, after every round of decoding; the share is that time over the time of the round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import Failed, drop_cache, gb, head, machine, median, memory_cgroup, ms, part, run, show

from flashpack.formats import Pack
from flashpack.runtime.memory import parse_size

PROMPT, DECODE, LIMITED_DECODE = 256, 64, 16

SETTLE = 64
"""Tokens before decoding under a limit is timed: reading ahead is tried first, then on or off."""

SECTIONS = ("memory", "limits", "traces", "start", "split")
START_SECONDS = 1.5


class Peer:
    """llama.cpp's llama-bench with a model."""

    def __init__(self, binary: Path, gguf: Path, threads: int) -> None:
        self._command = [str(binary), "-m", str(gguf), "-t", str(threads), "-r", "1", "-o", "json"]
        self.gguf = gguf
        usage = subprocess.run([str(binary), "--help"], capture_output=True, text=True, check=False).stdout
        self._mapped = ["-lm", "mmap"] if "--load-mode" in usage else ["--mmap", "1"]
        if "--repack" in usage:
            self._mapped += ["--repack", "0"]

    def rates(self, decode: int, procs: Path | None = None, mapped: bool = False) -> tuple[float, float]:
        """Tokens per second: prompt, decode; ``mapped``: weights stay in the mapped file, for less memory than that."""
        command = [*self._command, "-p", str(PROMPT), "-n", str(decode), *(self._mapped if mapped else [])]
        tests = json.loads(run(command, procs).output)
        prompt, generated = ([t["avg_ts"] for t in tests if t[field]] for field in ("n_prompt", "n_gen"))
        return prompt[0], generated[0]

    def token_bytes(self) -> int:
        """Bytes of weights that a token needs: all but the embedding, and the share of experts that is chosen."""
        try:
            from gguf import GGUFReader
        except ImportError:
            sys.exit("the size of GGUF tensors needs the package gguf: pip install gguf")
        reader = GGUFReader(self.gguf)
        fields: dict[str, Any] = {name.split(".")[-1]: field.contents() for name, field in reader.fields.items()}
        share: float = fields["expert_used_count"] / fields["expert_count"]
        sizes = {t.name: int(t.n_bytes) for t in reader.tensors}
        total: float = sum(n * (share if "_exps" in k else 1) for k, n in sizes.items() if k != "token_embd.weight")
        return int(total)


def token_bytes(folder: Path) -> int:
    """Bytes of a pack that a token needs: all but the embedding, and its experts."""
    pack = Pack(folder)
    config = json.loads((folder / "config.json").read_text())
    kinds = pack.manifest.record_kinds
    experts: int = sum(
        config["num_experts_per_tok"] * kinds[layer.kinds[0][0]].nbytes for layer in pack.manifest.layers
    )
    embedding = sum(t.nbytes for t in pack.manifest.tensors if "embed_tokens" in t.name)
    return experts + pack.dense_bytes - embedding


def values(numbers: Iterable[float], digits: int = 1) -> str:
    """The median, and what it is of."""
    each = list(numbers)
    return f"{median(each):.{digits}f} ({', '.join(f'{x:.{digits}f}' for x in each)})"


def ratio(ours: list[float], theirs: list[float]) -> str:
    return f"{median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}x" if theirs else "-"


def in_memory(args: argparse.Namespace, peer: Peer | None) -> None:
    """Decode, prompt and plain reads."""
    ours: dict[str, list[float]] = {"decode": [], "prompt": []}
    theirs: dict[str, list[float]] = {"decode": [], "prompt": []}
    reads: dict[int, list[float]] = {1: [], args.threads: []}
    for _ in range(args.turns):
        for threads, rates in reads.items():
            rates.append(part("bandwidth", threads=threads)["best"] / 1e9)
        if peer:
            prompt, decode = peer.rates(DECODE)
            theirs["prompt"].append(prompt)
            theirs["decode"].append(decode)
        found = part("speed", pack=args.pack, prompt=PROMPT, tokens=DECODE)
        ours["prompt"].append(PROMPT / found["prompt"]["seconds"])
        ours["decode"].append(1 / found["rounds"][0]["seconds"])
    print(f"\nIn memory: {found['kernels']} kernels, {found['decoding']}")
    head("", "llama.cpp", "flashpack", "ratio")
    for name in ("decode", "prompt"):
        label = "decode, tok/s" if name == "decode" else f"prompt of {PROMPT}, tok/s"
        show([label, values(theirs[name]) if peer else "-", values(ours[name]), ratio(ours[name], theirs[name])])
    sizes = peer.token_bytes() if peer else 0, token_bytes(args.pack)
    show(["weights per token", *(f"{x / 1e6:.0f} MB" if x else "-" for x in sizes), ""])
    speeds = (median(each["decode"] or [0]) for each in (theirs, ours))
    rates = [speed * size / 1e9 for speed, size in zip(speeds, sizes, strict=True)]
    show(["weights per second", *(f"{x:.1f} GB/s" if x else "-" for x in rates), ""])
    for threads, found_rates in reads.items():
        show([f"plain reads, {threads} thread{'s' * (threads > 1)}, GB/s", "", values(found_rates), ""])


def limited(args: argparse.Namespace, limit: str, name: str, **arguments: Any) -> dict[str, Any]:
    """A part under a limit, its files out of the page cache."""
    drop_cache(args.pack)
    with memory_cgroup(parse_size(limit)) as procs:
        if procs is None:
            sys.exit("memory cgroups are not allowed here; run as root on Linux")
        return part(name, procs, pack=args.pack, memory=parse_size(limit), **arguments)


def under_limits(args: argparse.Namespace, peer: Peer | None) -> None:
    """Decode and prompt in memory cgroups; what of the drive's rate is reached."""
    for limit in args.limit:
        found: list[dict[str, Any]] = []
        theirs: list[tuple[float, float]] = []
        failed = ""
        for _ in range(args.turns):
            if peer and not failed:
                drop_cache(peer.gguf)
                try:
                    with memory_cgroup(parse_size(limit)) as procs:
                        theirs.append(peer.rates(LIMITED_DECODE, procs, mapped=True))
                except Failed as e:
                    failed = str(e)
            how: dict[str, Any] = {"tokens": LIMITED_DECODE, "rounds": 5, "warm": SETTLE, "replay": True}
            found.append(limited(args, limit, "speed", prompt=PROMPT, **how))
        if failed:
            theirs = []
            print(f"\nllama.cpp under {limit}: {failed}")
        print(f"\nUnder {limit}: {found[0]['io']}, arena {gb(found[0]['budget']['arena'])}")
        head("", "llama.cpp", "flashpack", "ratio")
        prompts = [PROMPT / f["prompt"]["seconds"] for f in found]
        decodes = [1 / median(r["seconds"] for r in f["rounds"]) for f in found]
        for label, mine, other in (
            ("decode, tok/s", decodes, [t[1] for t in theirs]),
            (f"prompt of {PROMPT}, tok/s", prompts, [t[0] for t in theirs]),
        ):
            show([label, values(other, 2) if other else "-", values(mine, 2), ratio(mine, other)])
        against_drive(found)


def against_drive(found: list[dict[str, Any]]) -> None:
    """Rows of a table of four columns: where the time of decoding and of a prompt goes, beside the drive alone."""
    rounds = [r for f in found for r in f["rounds"] if r["replay"]]
    show(["experts that were there", "", values((100 * r["hits"] for r in rounds), 0) + " %", ""])
    peaks = "; ".join(gb(max(f[kind] for f in found)) for kind in ("peak", "mapped"))
    show(["peak memory: anonymous + shared; mapped", "", peaks, ""])
    if not rounds:
        return
    show(["read per token", "", f"{median(r['read'] for r in rounds) / 1e6:.0f} MB", ""])
    show(["the drive alone, per token", "", ms(median(r["replay"] for r in rounds)), ""])
    rate = median(r["read"] / r["replay"] for r in rounds)
    show(["its rate in these bursts", "", f"{gb(rate)}/s", ""])
    show(["share of the drive's limit", "", values((100 * r["replay"] / r["seconds"] for r in rounds), 0) + " %", ""])
    beyond = sum(r["replay"] > r["seconds"] for r in rounds)
    if beyond:  # decoding cannot be faster than its own reads: the drive, or the machine, was not the same both times
        show([f"NOT A LIMIT: the drive alone was slower in {beyond} of {len(rounds)} rounds", "", "", ""])
    show(["serial remainder per token", "", ms(median(r["seconds"] - r["replay"] for r in rounds)), ""])
    prompts = [f["prompt"] for f in found]
    records, most = prompts[0]["records"], prompts[0]["most_reads"]
    show(
        [
            "records read for the prompt; most reads of one",
            "",
            f"{records}; {most}",
            "",
        ]
    )
    shares = [100 * p["replay"] / p["seconds"] for p in prompts if p["replay"]]
    if shares:
        show(["share of the drive's limit, prompt", "", values(shares, 0) + " %", ""])


def traces(args: argparse.Namespace) -> None:
    """Decoding with recorded routing, and with even routing, under the first limit."""
    for trace in ("even", *map(str, args.trace)):
        how: dict[str, Any] = {"tokens": 64, "rounds": 5, "warm": 256, "replay": True, "trace": trace}
        runs = [limited(args, args.limit[0], "speed", prompt=PROMPT, **how) for _ in range(args.turns)]
        print(f"\nRouting of {Path(trace).stem}, {args.limit[0]}")
        head("", "", "flashpack", "")
        show(["decode, tok/s", "", values((1 / median(r["seconds"] for r in f["rounds"]) for f in runs), 2), ""])
        against_drive(runs)


def start(args: argparse.Namespace) -> None:
    """From imports done to the first token."""
    runs = [limited(args, args.limit[0], "start") for _ in range(args.turns)]
    print(f"\nStart to the first token of 8, cold, {args.limit[0]}, after imports")
    head("", "seconds")
    bounds = [(f["dense"] + f["first"]) * f["replay"] / f["first"] for f in runs]
    show(["start", values((f["seconds"] for f in runs), 2)], ["of that, load", values((f["load"] for f in runs), 2)])
    size = f"{gb(runs[0]['dense'])} dense + {gb(runs[0]['first'])} of experts"
    show([f"{size} at the drive's rate (same bursts)", values(bounds, 2)])
    show([f"that and {START_SECONDS} s", values((b + START_SECONDS for b in bounds), 2)])


def split(args: argparse.Namespace) -> None:
    """Where the time of a token goes."""
    columns = {"in memory": part("split", pack=args.pack)}
    columns |= {limit: limited(args, limit, "split") for limit in args.limit[:1]}
    print("\nTime per token of sampled text, ms")
    head("", *columns)
    names = [name for name in columns["in memory"] if name not in ("hits", "peak", "mapped")]
    for name in names:
        show([name, *(f"{1e3 * c[name]:.2f}" for c in columns.values())])
    show(["experts that were there", *(f"{c['hits']:.0%}" for c in columns.values())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--peer", type=Path, help="llama-bench")
    parser.add_argument("--gguf", type=Path, help="the same model for it")
    parser.add_argument("--limit", action="append", help="memory limit, for example 2.5GB; repeatable")
    parser.add_argument("--trace", type=Path, action="append", default=[], help="recorded routing (.npz); repeatable")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", action="append", choices=SECTIONS, help="part of it; repeatable")
    args = parser.parse_args()
    args.limit = args.limit or ["2.5GB"]
    if bool(args.peer) != bool(args.gguf):
        parser.error("--peer and --gguf belong together")
    for path in (args.pack / "flashpack.json", args.peer, args.gguf, *args.trace):
        if path is not None and not path.is_file():
            parser.error(f"{path}: not a file")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # torch's count in the measured processes, and so flashpack's
    peer = Peer(args.peer, args.gguf, args.threads) if args.peer else None
    sections = args.only or SECTIONS
    print(machine())
    if "memory" in sections:
        in_memory(args, peer)
    if "limits" in sections:
        under_limits(args, peer)
    if "traces" in sections:
        traces(args)
    if "start" in sections:
        start(args)
    if "split" in sections:
        split(args)


if __name__ == "__main__":
    main()
