"""How much memory this process uses and may use. Linux: /proc and cgroups v1 and v2; macOS: what the system tells."""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from flashpack.errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip

_LISTING = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")

_RESERVE = 0.1
_RESERVE_SYSTEM = 10**9


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
    return max(0, int(min(_system_available(), *_cgroups_available())))


def spare() -> int:
    """Bytes this process may take unasked, so that the machine stays usable.

    A tenth is left alone, and of the machine's own memory 1 GB, if that is not more than a quarter: other programs
    are at work there, while a cgroup is for us.
    """
    system = _system_available()
    left = max(system * _RESERVE, min(_RESERVE_SYSTEM, system / 4))
    return max(0, int(min(system - left, *(c * (1 - _RESERVE) for c in _cgroups_available()))))


def _system_available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    # No honest figure for free memory here: half of what is installed.
    return installed() // 2


def installed() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def limit() -> int | None:
    """Bytes that the cgroups of this process allow all that is in them; None without a limit."""
    least = min(map(_cgroup_limit, cgroup_folders()), default=math.inf)
    return None if math.isinf(least) else int(least)


def cgroup_folders(controller: str = "memory") -> list[Path]:
    """The process's own cgroup and all its ancestors, in which ``controller`` ("memory", "cpu") has its files."""
    if not _LISTING.exists():
        return []
    folders = []
    for line in _LISTING.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = _CGROUPS
        elif controller in controllers.split(","):
            root = _CGROUPS / controller
        else:
            continue
        own = root / path.lstrip("/")
        folders += [f for f in (own, *own.parents) if f.is_relative_to(root)]
    return folders


def _cgroups_available() -> list[float]:
    """What the cgroups that this process is in have left; infinity stands for no limit."""
    return [math.inf, *map(_cgroup_available, cgroup_folders())]


def _cgroup_limit(folder: Path) -> float:
    """The least limit of one cgroup; infinity without one."""
    least = math.inf
    # Beyond memory.high nothing is killed, but everything crawls.
    for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            number = int((folder / name).read_text())  # "max" is none
            least = min(least, number if number < 2**60 else math.inf)
    return least


def _cgroup_available(folder: Path) -> float:
    """The least limit minus what is in use and cannot be dropped; infinity without a limit."""
    for name in ("memory.current", "memory.usage_in_bytes"):
        try:
            used = int((folder / name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        cache = sum(int(stat.get(f"total_{k}", stat.get(k, 0))) for k in ("active_file", "inactive_file"))
        return _cgroup_limit(folder) - max(0, used - cache)
    return math.inf
