"""What the bench scripts share: processes of their own, memory limits, cold page caches, Markdown."""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import watch

GROUPS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
)
"""Where memory cgroups are made, and the file of their limit: versions 1 and 2."""


class Failed(Exception):
    """A measured process ended with an error; the message says which."""


@dataclass(frozen=True)
class Finished:
    """A process that ran to its end: what it printed, its peak memory in bytes (anonymous + shared; mapped files)."""

    output: str
    peak: int
    mapped: int


def run(command: list[str], procs: Path | None = None) -> Finished:
    """Run ``command`` to its end, in the cgroup of ``procs`` if there is one, with the user's history left alone.

    Raises ``Failed`` with the end of what the process wrote to standard error.
    """

    def enter() -> None:
        if procs is not None:
            procs.write_text(str(os.getpid()))

    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=enter,
        env=os.environ | {"FLASHPACK_WARM": "0"},
    )
    peak = watch.Peak(process.pid)
    output, errors = process.communicate()
    anonymous, mapped = peak.stop()
    if process.returncode:
        reason = "killed, as the system does for memory" if process.returncode == -signal.SIGKILL else errors[-2000:]
        raise Failed(f"{' '.join(command[:3])} ... ended with {process.returncode}: {reason}")
    return Finished(output, anonymous, mapped)


def part(name: str, procs: Path | None = None, **arguments: Any) -> dict[str, Any]:
    """The answer of a function of parts.py, run in a process of its own, with its peak memory."""
    script = str(Path(__file__).with_name("parts.py"))
    done = run([sys.executable, script, name, json.dumps(arguments, default=str)], procs)
    answer: dict[str, Any] = json.loads(done.output)
    return answer | {"peak": done.peak, "mapped": done.mapped}


@contextmanager
def memory_cgroup(limit: int) -> Iterator[Path | None]:
    """A memory cgroup of ``limit`` bytes: the file to write a process id to; None where that is not allowed."""
    name = f"flashpack-bench-{os.getpid()}"
    for root, limit_file in GROUPS:
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


def drop_cache(path: Path) -> None:
    """Forget the pages of a file, or of all files of a folder; they are clean, so this needs no special right."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def machine() -> str:
    """What this was measured on, in a line."""
    load = os.getloadavg()[0]
    system = f"{platform.system()} {platform.release()}"
    return f"{watch.processor()}, {os.cpu_count()} cores, {system}, load average at the start {load:.1f}"


def gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


def show(*rows: Iterable[object]) -> None:
    """Print rows of a Markdown table at once: they are what there is if the rest fails."""
    for cells in rows:
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(*titles: object) -> None:
    """Print the head of a Markdown table."""
    print()
    show(titles, ["---"] * len(titles))
