"""Measure convert, verify, decode and prompt speed of a pack, in memory and under memory limits.

    python bench/measure.py CHECKPOINT PACK --limit 2.5GB

Every part runs in a process of its own. Under a limit the process runs in a memory cgroup of that size where the
machine allows it (v1 or v2, as root), with the pack dropped from the page cache; the drive's own rate is taken in the
same run by replaying record-sized reads without any computing. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import watch

from flashpack.formats import Pack
from flashpack.runtime.memory import parse_size


def part_convert(args: argparse.Namespace) -> dict[str, Any]:
    import flashpack

    report = flashpack.convert(args.src, args.pack, args.experts, args.dense)
    return {"seconds": report.seconds, "bytes": report.source_bytes, "pack": report.pack_bytes}


def part_verify(args: argparse.Namespace) -> dict[str, Any]:
    """Full verification against reading the same files without checking, buffered and direct; cold, in turns."""
    from flashpack import verify

    files = [p for p in args.pack.rglob("*") if p.is_file()]
    times: dict[str, list[float]] = {"buffered": [], "direct": [], "verify": []}

    def read_all(flags: int) -> None:
        with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
            list(pool.map(lambda path: read_whole(path, flags), files))

    for _ in range(5):
        for name, seconds in times.items():
            drop_cache(args.pack)
            begun = time.perf_counter()
            if name == "verify":
                findings = verify(args.pack)
                assert not findings, findings[0]
            else:
                read_all(getattr(os, "O_DIRECT", 0) if name == "direct" else 0)
            seconds.append(time.perf_counter() - begun)
    size = sum(p.stat().st_size for p in files)
    return {"bytes": size} | {name: statistics.median(seconds) for name, seconds in times.items()}


def part_run(args: argparse.Namespace) -> dict[str, Any]:
    """Decode and prompt speed with random tokens (uniform routing: no cache policy can do better than chance)."""
    import torch

    import flashpack

    model = flashpack.load(args.pack, memory=args.memory, context=args.prompt_tokens + args.decode_tokens + 32)
    store, budget = model.flashpack.store, model.flashpack.budget
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    result: dict[str, Any] = {"budget": budget.to_json(), "expert_bytes": model.flashpack.pack.expert_bytes}
    with torch.inference_mode():
        prompt = torch.randint(0, vocabulary, (1, args.prompt_tokens), generator=generator)
        if args.memory is None:
            model(prompt)  # in memory means: all experts are there
        store.stats.reset()
        begun = time.perf_counter()
        cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        seconds = time.perf_counter() - begun
        result["prompt"] = {"rate": args.prompt_tokens / seconds, "read": store.stats.total().bytes_read}
        times = []
        for step in range(args.decode_tokens + 4):
            if step == 4:  # the first tokens fill the arena
                store.stats.reset()
                times.clear()
            token = torch.randint(0, vocabulary, (1, 1), generator=generator)
            begun = time.perf_counter()
            cache = model(token, past_key_values=cache, use_cache=True).past_key_values
            times.append(time.perf_counter() - begun)
    total = store.stats.total()
    result["decode"] = {
        "rate": len(times) / sum(times),
        "median": statistics.median(times),
        "hits": store.stats.hit_rate,
        "read": total.bytes_read / len(times),
        "misses": total.misses / len(times),
        "wait": total.wait_seconds / len(times),
        "io": store.stats.io,
    }
    return result


def read_whole(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY | flags)
    buffer, offset = mmap.mmap(-1, 4 * 2**20), 0
    while got := os.preadv(fd, [buffer], offset):
        offset += got
        if got < len(buffer):
            break  # the end; a direct read could not go on from there
    os.close(fd)


def drop_cache(pack: Path) -> None:
    """Forget the pack's pages; its files are clean, so this needs no special right."""
    if hasattr(os, "posix_fadvise"):
        for path in pack.rglob("*"):
            if path.is_file():
                with open(path, "rb") as f:
                    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drive_rate(folder: Path, burst: int, bursts: int = 60) -> float:
    """Bytes per second of random record reads in bursts of ``burst`` (one layer's misses), eight at a time."""
    pack = Pack(folder)
    rng = random.Random(1)
    flags = os.O_RDONLY | getattr(os, "O_DIRECT", 0)
    shards = [pack.open_shard(layer) for layer in pack.manifest.layers]
    fds = [os.open(s.path, flags) for s in shards]
    stride = pack.manifest.record_kinds[0].stride
    buffers = [mmap.mmap(-1, stride) for _ in range(burst)]

    def read(task: tuple[int, int, mmap.mmap]) -> None:
        os.preadv(fds[task[0]], [task[2]], task[1])

    begun = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        for i in range(bursts):
            shard = i % len(shards)
            experts = rng.sample(range(shards[shard].layout.layer.experts), burst)
            list(
                pool.map(read, [(shard, shards[shard].extent(e)[0], b) for e, b in zip(experts, buffers, strict=True)])
            )
    return bursts * burst * stride / (time.perf_counter() - begun)


@contextmanager
def memory_cgroup(limit: int) -> Iterator[Path | None]:
    """A memory cgroup of ``limit`` bytes: the file to write a process id to; None where that is not allowed."""
    name = f"flashpack-bench-{os.getpid()}"
    for root, limit_file in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = root / name
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit_file).exists():
                (group / limit_file).write_text(str(limit))
                yield group / "cgroup.procs"
                return
        finally:
            group.rmdir()
    yield None


def child(args: argparse.Namespace, part: str, memory: str | None = None, procs: Path | None = None) -> dict[str, Any]:
    """Run one part in a process of its own; its result with its peak memory."""
    command = [sys.executable, __file__, str(args.src), str(args.pack), "--part", part]
    for name in ("experts", "dense", "prompt_tokens", "decode_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    if memory:
        command += ["--memory", memory]

    def enter() -> None:
        if procs is not None:
            procs.write_text(str(os.getpid()))

    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
    peak = watch.Peak(process.pid)
    output, _ = process.communicate()
    anonymous, mapped = peak.stop()
    if process.returncode:
        sys.exit(f"{part} failed with exit code {process.returncode} (137: killed for memory)")
    return json.loads(output) | {"peak": anonymous, "mapped": mapped}


def gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def measure(args: argparse.Namespace) -> None:
    import torch

    model = watch.processor()
    print(f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, torch {torch.__version__}\n")
    print("| | time | rate | peak memory (anonymous + shared; mapped files) |\n|---|---|---|---|")
    if not (args.pack / "flashpack.json").exists():
        r = child(args, "convert")
        rate = r["bytes"] / r["seconds"]
        print(f"| convert {gb(r['bytes'])} to {gb(r['pack'])} | {r['seconds']:.1f} s | {gb(rate)}/s of source ", end="")
        print(f"| {gb(r['peak'])}; {gb(r['mapped'])} |", flush=True)
    r = child(args, "verify")
    for how in ("buffered", "direct"):
        print(f"| read the pack, {how}, cold | {r[how]:.1f} s | {gb(r['bytes'] / r[how])}/s | |")
    print(f"| verify, cold | {r['verify']:.1f} s | {gb(r['bytes'] / r['verify'])}/s: ", end="")
    print(
        f"{r['buffered'] / r['verify']:.2f}x the buffered read, {r['direct'] / r['verify']:.2f}x the direct one ",
        end="",
    )
    print(f"| {gb(r['peak'])}; {gb(r['mapped'])} |\n", flush=True)
    print(
        "| memory | prompt of "
        f"{args.prompt_tokens} | decode | hits | read per token | reads, of the drive's rate | peak memory |"
    )
    print("|---|---|---|---|---|---|---|")
    for limit in [None, *args.limit]:
        drop_cache(args.pack)
        if limit is None:
            show(args, "all in memory", child(args, "run"))
            continue
        with memory_cgroup(parse_size(limit)) as procs:
            label = f"{limit}{' (cgroup)' if procs else ' (no cgroup allowed)'}"
            show(args, label, child(args, "run", limit, procs))


def show(args: argparse.Namespace, label: str, r: dict[str, Any]) -> None:
    d, p = r["decode"], r["prompt"]
    layers = len(Pack(args.pack).manifest.layers)
    share = "-"
    if d["misses"] >= 1:
        drive = drive_rate(args.pack, max(1, round(d["misses"] / layers)))
        share = f"{gb(d['read'] * d['rate'])}/s of {gb(drive)}/s"
    print(
        f"| {label} | {p['rate']:.1f} tok/s, {gb(p['read'])} read | {d['rate']:.2f} tok/s | {d['hits']:.0%} "
        f"| {d['read'] / 1e6:.0f} MB ({d['io']}) | {share} | {gb(r['peak'])}; {gb(r['mapped'])} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path, help="checkpoint, see make_checkpoint.py")
    parser.add_argument("pack", type=Path, help="pack; converted if it is not there")
    parser.add_argument("--experts", default="q4")
    parser.add_argument("--dense", default="q8")
    parser.add_argument("--limit", action="append", default=[], help="memory limit, for example 2.5GB; repeatable")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--decode-tokens", type=int, default=24)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=["convert", "verify", "run"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        parts = {"convert": part_convert, "verify": part_verify, "run": part_run}
        print(json.dumps(parts[args.part](args)))
    else:
        measure(args)


if __name__ == "__main__":
    main()
