"""What the speed of flashpack depends on: memory, context, number of layers, number of experts.

    python bench/scaling.py memory PACK --trace routing_docs.npz --svg speed.svg
    python bench/scaling.py context PACK
    python bench/scaling.py layers SCRATCH
    python bench/scaling.py experts SCRATCH

``memory`` runs in memory cgroups where that is allowed (as root), else within --memory alone, and says which.
``layers`` and ``experts`` make checkpoints of bench-model layers (make_checkpoint.py --mlx: 4 bits, so that little is
written) and remove them. Every measurement is a process of its own. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import drop_cache, gb, head, machine, median, memory_cgroup, ms, part, run, show

from flashpack.performance.plots import Chart, Line, draw
from flashpack.runtime.memory import parse_size

BUDGETS = ("1GB", "1.5GB", "2GB", "2.5GB", "3GB", "3.5GB", "4GB", "5GB")
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
LAYERS = (4, 8, 12)
EXPERTS = (64, 128, 256, 512)
EXPERT_LAYERS = 2
PROMPT, TOKENS = 256, 32


def speed(pack: Path, limit: str | None = None, **arguments: Any) -> dict[str, Any]:
    """``parts.speed`` of a pack out of the page cache, under a limit if there is one."""
    drop_cache(pack)
    if limit is None:
        return part("speed", pack=pack, **arguments)
    with memory_cgroup(parse_size(limit)) as procs:
        found = part("speed", procs, pack=pack, memory=parse_size(limit), **arguments)
        return found | {"cgroup": procs is not None}


def over_memory(args: argparse.Namespace) -> None:
    """Decoding and prompts from little memory to enough for everything."""
    routings = {"even routing": "even"} | {f"routing of {path.stem}": str(path) for path in args.trace}
    lines: dict[str, list[tuple[float, float]]] = {}
    head("memory", "routing", "experts in memory", "hits", "decode", "prompt of 256", "read per token", "peak memory")
    for name, trace in routings.items():
        for limit in BUDGETS:
            how = {"prompt": PROMPT, "tokens": TOKENS, "rounds": 3, "warm": 128, "trace": trace}
            r = speed(args.pack, limit, **how)
            rate = 1 / median(x["seconds"] for x in r["rounds"])
            lines.setdefault(name, []).append((parse_size(limit) / 1e9, rate))
            show(
                [
                    limit if r["cgroup"] else f"{limit} (no cgroup)",
                    name,
                    f"{min(1, r['budget']['arena'] / r['experts']):.0%}",
                    f"{median(x['hits'] for x in r['rounds']):.0%}",
                    f"{rate:.2f} tok/s",
                    f"{PROMPT / r['prompt']['seconds']:.1f} tok/s",
                    f"{median(x['read'] for x in r['rounds']) / 1e6:.0f} MB",
                    f"{gb(r['peak'])}; {gb(r['mapped'])}",
                ]
            )
    if args.svg:
        drawn = {name: Line(points) for name, points in lines.items()}
        draw(args.svg, Chart("Decoding under a memory limit", "memory, GB", "tokens per second", drawn))


def over_context(args: argparse.Namespace) -> None:
    """A prompt, and decoding after it; all experts in memory."""
    head("context", "prompt", "prompt, tok/s", "decode after it", "KV cache")
    for tokens in CONTEXTS:
        r = speed(args.pack, prompt=tokens, tokens=TOKENS, at=tokens)
        seconds = r["prompt"]["seconds"]
        show(
            [
                tokens,
                f"{seconds:.2f} s",
                f"{tokens / seconds:.1f}",
                ms(r["rounds"][0]["median"]),
                f"{r['budget']['kv'] / 1e6:.0f} MB",
            ]
        )


def over_models(args: argparse.Namespace, what: str, sizes: tuple[int, ...], shape: Callable[[int], list[int]]) -> None:
    """In memory, and with half of the experts in memory; ``shape``: layers and experts of a size."""
    head(what, "experts, bytes", "start", "decode, in memory", "the same per layer", "prompt of 256, in memory",
         "decode, half in memory", "of that, waiting", "hits", "the store itself")  # fmt: skip
    for size in sizes:
        layers, experts = shape(size)
        pack = make(args.scratch, layers, experts)
        whole = speed(pack, prompt=PROMPT, tokens=TOKENS, rounds=3)
        fixed = whole["budget"]["total"] - whole["budget"]["arena"]
        half = speed(pack, str(fixed + whole["experts"] // 2), prompt=PROMPT, tokens=TOKENS, rounds=3)
        first = part("start", pack=pack)
        seconds, halved = (median(x["seconds"] for x in r["rounds"]) for r in (whole, half))
        show(
            [
                size,
                gb(whole["experts"]),
                f"{first['seconds']:.2f} s, {first['load']:.2f} of it load",
                ms(seconds),
                ms(seconds / layers),
                f"{whole['prompt']['seconds']:.2f} s",
                ms(halved),
                ms(median(x["wait"] for x in half["rounds"])),
                f"{median(x['hits'] for x in half['rounds']):.0%}",
                ms(median(x["own"] for x in half["rounds"])),
            ]
        )
        shutil.rmtree(pack)


def make(scratch: Path, layers: int, experts: int) -> Path:
    """A pack of bench-model layers at 4 bits."""
    checkpoint, pack = scratch / "checkpoint", scratch / f"{layers}x{experts}.flashpack"
    script = str(Path(__file__).with_name("make_checkpoint.py"))
    shape = ["--layers", str(layers), "--experts", str(experts), "--mlx"]
    run([sys.executable, script, str(checkpoint), *shape])
    run([sys.executable, "-m", "flashpack", "convert", str(checkpoint), str(pack), "--dense", "q4"])
    shutil.rmtree(checkpoint)
    return pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("memory", over_memory.__doc__), ("context", over_context.__doc__)):
        command = commands.add_parser(name, help=text)
        command.add_argument("pack", type=Path)
        if name == "memory":
            command.add_argument("--trace", type=Path, action="append", default=[], help="recorded routing (.npz)")
            command.add_argument("--svg", type=Path, help="file for a chart")
    for name in ("layers", "experts"):
        command = commands.add_parser(name, help=over_models.__doc__)
        command.add_argument("scratch", type=Path, help="folder for checkpoints and packs; they are removed again")
    args = parser.parse_args()
    print(machine())
    if args.command == "memory":
        over_memory(args)
    elif args.command == "context":
        over_context(args)
    else:
        args.scratch.mkdir(parents=True, exist_ok=True)
        if args.command == "layers":
            over_models(args, "layers of 128 experts", LAYERS, lambda size: [size, 128])
        else:
            over_models(args, f"experts in each of {EXPERT_LAYERS} layers", EXPERTS, lambda size: [EXPERT_LAYERS, size])


if __name__ == "__main__":
    main()
