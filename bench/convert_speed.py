"""How fast checkpoints are converted: against llama.cpp, against a plain copy, and over the number of layers.

    python bench/convert_speed.py quantize CHECKPOINT SCRATCH --llama SOURCE_TREE --llama-bin FOLDER_OF_LLAMA_QUANTIZE
    python bench/convert_speed.py copy MLX_CHECKPOINT SCRATCH
    python bench/convert_speed.py layers SCRATCH CHECKPOINT_1 CHECKPOINT_4 CHECKPOINT_12

Checkpoints are those of make_checkpoint.py. Everything that is compared runs in turns, as a whole process from start to
exit, from a cold page cache, and ends when what it wrote is on the drive (fsync). Prints Markdown tables of medians:
seconds, source bytes per second, peak memory (anonymous + shared), load average of the machine at the start.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import watch

# The peer looks up how a tokenizer splits text by a hash, and does not know the small one of the bench checkpoint.
TO_GGUF = """
import runpy, sys
tree = sys.argv.pop(1)
sys.path[:0] = [tree, tree + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path(tree + "/convert_hf_to_gguf.py", run_name="__main__")
"""


@dataclass
class Run:
    """One measured process: seconds until its output is on the drive, peak memory, load average when it began."""

    seconds: float
    peak: int
    load: float


def measure(command: list[str], source: Path, output: Path) -> Run:
    """Run ``command``, which reads ``source`` and makes ``output``, with the source out of the page cache."""
    remove(output)
    os.sync()
    for path in files_of(source):
        forget(path)
    load = os.getloadavg()[0]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = watch.Peak(process.pid)
    _, errors = process.communicate()
    for path in files_of(output):
        sync(path)
    seconds = time.perf_counter() - begun
    memory, _ = peak.stop()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nfailed with exit code {process.returncode}:\n{errors[-2000:]}")
    return Run(seconds, memory, load)


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files of a folder."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def forget(path: Path) -> None:
    """Drop a clean file from the page cache, where the system lets one."""
    if not hasattr(os, "posix_fadvise"):
        return
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def size_of(path: Path) -> int:
    return sum(p.stat().st_size for p in files_of(path))


def convert(source: Path, output: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "flashpack", "convert", str(source), str(output), *options]


def in_turns(turns: int, parts: dict[str, Callable[[], Run]]) -> dict[str, list[Run]]:
    """Run every part ``turns`` times, one after the other."""
    runs: dict[str, list[Run]] = {name: [] for name in parts}
    for _ in range(turns):
        for name, part in parts.items():
            runs[name].append(part())
            print(f"{name}: {runs[name][-1].seconds:.1f} s", file=sys.stderr, flush=True)
    return runs


def row(name: str, runs: list[Run], source: int) -> str:
    seconds = statistics.median(r.seconds for r in runs)
    times = ", ".join(f"{r.seconds:.1f}" for r in runs)
    loads = ", ".join(f"{r.load:.1f}" for r in runs)
    peak = max(r.peak for r in runs) / 1e9
    return f"| {name} | {seconds:.1f} s ({times}) | {source / seconds / 1e9:.2f} GB/s | {peak:.2f} GB | {loads} |"


HEADER = "| | median (each) | of source | peak memory | load average |\n|---|---|---|---|---|"


def quantize(args: argparse.Namespace) -> None:
    """To 4 bits by both calibration-free quantizers, beside llama.cpp's two passes."""
    pack, big, small = args.scratch / "pack", args.scratch / "bf16.gguf", args.scratch / "q4_0.gguf"

    def packing(quality: str) -> Run:
        options = ("--experts", "q4", "--dense", "q8", "--quality", quality)
        return measure(convert(args.checkpoint, pack, *options), args.checkpoint, pack)

    parts = {"fast": lambda: packing("fast"), "default": lambda: packing("default")}
    if args.llama:
        to_gguf = [sys.executable, "-c", TO_GGUF, str(args.llama), str(args.checkpoint), "--outtype", "bf16"]
        quantizer = [str(args.llama_bin / "llama-quantize"), str(big), str(small), "Q4_0", str(os.cpu_count())]
        parts["convert_hf_to_gguf, bf16"] = lambda: measure([*to_gguf, "--outfile", str(big)], args.checkpoint, big)
        parts["llama-quantize, Q4_0"] = lambda: measure(quantizer, big, small)
    runs = in_turns(args.turns, parts)
    source = size_of(args.checkpoint)
    print(HEADER)
    for name, each in runs.items():
        print(row(name, each, source))
    fast, default, *theirs = runs.values()
    ratio = statistics.median(b.seconds / a.seconds for a, b in zip(fast, default, strict=True))
    print(f"\n--quality default takes {ratio:.2f} times as long as fast (median over the turns)")
    if args.llama:
        both = [Run(a.seconds + b.seconds, max(a.peak, b.peak), a.load) for a, b in zip(*theirs, strict=True)]
        for name, ours in (("fast", fast), ("default", default)):
            ratio = statistics.median(b.seconds / a.seconds for a, b in zip(ours, both, strict=True))
            print(f"{name} is {ratio:.2f} times as fast as llama.cpp's both passes")
    for path in (pack, big, small):
        remove(path)


def copy(args: argparse.Namespace) -> None:
    """Packing what needs no quantizing, beside copying the same bytes."""
    pack, twin = args.scratch / "pack", args.scratch / "copy"
    plain = [sys.executable, __file__, "plain-copy", str(args.checkpoint), str(twin)]
    nothing = [*convert(args.checkpoint, pack), "--dry-run"]
    parts = {
        "plain copy": lambda: measure(plain, args.checkpoint, twin),
        "flashpack convert": lambda: measure(convert(args.checkpoint, pack), args.checkpoint, pack),
        "of that, until the first byte (--dry-run)": lambda: measure(nothing, args.checkpoint, pack),
    }
    runs = in_turns(args.turns, parts)
    source = size_of(args.checkpoint)
    print(HEADER)
    for name, each in runs.items():
        print(row(name, each, source))
    copied, packed, started = runs.values()
    whole = statistics.median(b.seconds / a.seconds for a, b in zip(copied, packed, strict=True))
    work = statistics.median(
        (b.seconds - c.seconds) / a.seconds for a, b, c in zip(copied, packed, started, strict=True)
    )
    print(f"\nconvert takes {whole:.2f} of the copy's time, {work:.2f} without its start (medians over the turns)")
    remove(twin)
    remove(pack)


def plain_copy(args: argparse.Namespace) -> None:
    """Copy a folder's files through a buffer of 8 MiB, each with fsync."""
    args.scratch.mkdir(parents=True)
    buffer = memoryview(bytearray(8 * 2**20))
    for path in files_of(args.checkpoint):
        with open(path, "rb", buffering=0) as source, open(args.scratch / path.name, "wb", buffering=0) as target:
            while got := source.readinto(buffer):
                target.write(buffer[:got])
            os.fsync(target.fileno())


def layers(args: argparse.Namespace) -> None:
    """The same model with more and more layers."""
    pack = args.scratch / "pack"
    print(HEADER)
    for checkpoint in args.checkpoints:
        runs = [measure(convert(checkpoint, pack, "--experts", "q4"), checkpoint, pack) for _ in range(args.turns)]
        size = size_of(checkpoint)
        print(row(f"{checkpoint.name}: {size / 1e9:.1f} GB to {size_of(pack) / 1e9:.2f} GB", runs, size), flush=True)
    remove(pack)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in {"quantize": quantize, "copy": copy, "plain-copy": plain_copy, "layers": layers}.items():
        command = commands.add_parser(name, help=function.__doc__)
        command.set_defaults(function=function)
        if name != "layers":
            command.add_argument("checkpoint", type=Path)
        command.add_argument("scratch", type=Path, help="folder for what is written; it is removed again")
        if name == "layers":
            command.add_argument("checkpoints", type=Path, nargs="+")
        if name == "quantize":
            command.add_argument("--llama", type=Path, help="llama.cpp's source tree")
            command.add_argument("--llama-bin", type=Path, help="folder with llama-quantize")
        command.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    if args.function is not plain_copy:
        args.scratch.mkdir(parents=True, exist_ok=True)
    args.function(args)


if __name__ == "__main__":
    main()
