"""How much memory this process uses and may use. Linux: /proc and cgroups v1 and v2; macOS: what the system tells."""

from __future__ import annotations

import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from flashpack.errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_size(text: str | int) -> int:
    """Bytes of "2GB" (10^9), "2GiB" (2^30), "500MB" or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS:
        raise UsageError(f"{text!r} is not a size; write for example 6GB, 6GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True)
class Usage:
    """Memory of this process in bytes: ``anonymous`` includes shared memory, ``file`` is mapped files in memory."""

    anonymous: int
    file: int


def usage() -> Usage:
    """Memory of this process now. On macOS, the largest resident size so far, all as anonymous."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return Usage(peak if sys.platform == "darwin" else peak * 1024, 0)
    found = dict(re.findall(r"^(Rss\w+):\s+(\d+) kB$", status.read_text(), re.MULTILINE))
    kib = {k: int(v) * 1024 for k, v in found.items()}
    return Usage(kib.get("RssAnon", 0) + kib.get("RssShmem", 0), kib.get("RssFile", 0))


def available() -> int:
    """Bytes this process could still take: of the machine and of its cgroup, whichever is less."""
    amounts = [_system_available()]
    amounts += [limit for limit in map(_cgroup_available, _cgroup_folders()) if limit is not None]
    return max(0, min(amounts))


def _system_available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    # No honest figure for free memory here: half of what is installed.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_folders() -> list[Path]:
    """The process's own memory cgroup and all its ancestors."""
    listing = Path("/proc/self/cgroup")
    if not listing.exists():
        return []
    folders = []
    for line in listing.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = Path("/sys/fs/cgroup")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
        else:
            continue
        own = root / path.lstrip("/")
        folders += [f for f in (own, *own.parents) if f.is_relative_to(root)]
    return folders


def _cgroup_available(folder: Path) -> int | None:
    """Limit minus what is in use and cannot be dropped; None without a limit."""
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit = (folder / limit_name).read_text().strip()
            used = int((folder / used_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit == "max" or int(limit) >= 2**60:
            return None
        cache = sum(int(stat.get(f"total_{k}", stat.get(k, 0))) for k in ("active_file", "inactive_file"))
        return int(limit) - max(0, used - cache)
    return None
