"""Measure convert, verify, decode and prompt speed of a pack, in memory and under memory limits.

    python bench/measure.py CHECKPOINT PACK --limit 2.5GB

Every part runs in a process of its own. Under a limit the process runs in a memory cgroup of that size where the
machine allows it (v1 or v2, as root), with the pack dropped from the page cache; the drive's own rate is taken by
reading the records that were read once more, without any computing. Tokens are random: routing is nearly even. Prints
Markdown tables. peer.py compares with llama.cpp.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import drop_cache, gb, head, machine, memory_cgroup, part, show

from flashpack.runtime.memory import parse_size


def passes(args: argparse.Namespace) -> None:
    """Converting, and verifying beside plain reads."""
    head("", "time", "rate", "peak memory (anonymous + shared; mapped files)")
    if not (args.pack / "flashpack.json").exists():
        r = part("convert", src=args.src, pack=args.pack, experts=args.experts, dense=args.dense)
        name = f"convert {gb(r['bytes'])} to {gb(r['pack'])}"
        show([name, f"{r['seconds']:.1f} s", f"{gb(r['bytes'] / r['seconds'])}/s of source", peak(r)])
    r = part("verify", pack=args.pack)
    for how in ("buffered", "direct"):
        show([f"read the pack, {how}, cold", f"{r[how]:.1f} s", f"{gb(r['bytes'] / r[how])}/s", ""])
    shares = f"{r['buffered'] / r['verify']:.2f}x the buffered read, {r['direct'] / r['verify']:.2f}x the direct one"
    show(["verify, cold", f"{r['verify']:.1f} s", f"{gb(r['bytes'] / r['verify'])}/s: {shares}", peak(r)])


def speeds(args: argparse.Namespace) -> None:
    """A row for every memory limit."""
    titles = "prompt of " + str(args.prompt_tokens), "decode", "hits", "read per token", "of the drive's rate"
    head("memory", *titles, "peak memory")
    how = {"pack": args.pack, "prompt": args.prompt_tokens, "tokens": args.decode_tokens, "replay": True}
    for limit in [None, *args.limit]:
        drop_cache(args.pack)
        if limit is None:
            row("all in memory", args.prompt_tokens, part("speed", **how))
            continue
        with memory_cgroup(parse_size(limit)) as procs:
            label = f"{limit} ({'cgroup' if procs else 'no cgroup allowed'})"
            row(label, args.prompt_tokens, part("speed", procs, memory=parse_size(limit), **how))


def row(label: str, tokens: int, r: dict[str, Any]) -> None:
    prompt, decode = r["prompt"], r["rounds"][0]
    share = "-"
    if decode["replay"]:
        alone, reached = decode["read"] / decode["replay"], decode["read"] / decode["seconds"]
        share = f"{gb(reached)}/s of {gb(alone)}/s, {r['io'].split(' (')[0]}"
    show(
        [
            label,
            f"{tokens / prompt['seconds']:.1f} tok/s, {prompt['records']} records",
            f"{1 / decode['seconds']:.2f} tok/s",
            f"{decode['hits']:.0%}",
            f"{decode['read'] / 1e6:.0f} MB",
            share,
            peak(r),
        ]
    )


def peak(r: dict[str, Any]) -> str:
    return f"{gb(r['peak'])}; {gb(r['mapped'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path, help="checkpoint, see make_checkpoint.py")
    parser.add_argument("pack", type=Path, help="pack; converted if it is not there")
    parser.add_argument("--experts", default="q4")
    parser.add_argument("--dense", default="q8")
    parser.add_argument("--limit", action="append", default=[], help="memory limit, for example 2.5GB; repeatable")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--decode-tokens", type=int, default=24)
    args = parser.parse_args()
    print(machine())
    passes(args)
    speeds(args)


if __name__ == "__main__":
    main()
