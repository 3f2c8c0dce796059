"""System, packages, processor, memory, limits and settings. What a system does not tell is left out."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from flashpack import user_cache
from flashpack.doctor.remark import Remark
from flashpack.runtime import memory as sizes
from flashpack.runtime.profile import usable_cores
from flashpack.sizes import gb
from flashpack.version import __version__

CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")

_DISTRIBUTION = "flashpack-moe"
_SHOWN = ("torch", "transformers", "numpy")

_SETS = ("avx2", "fma", "avx512dq", "avx512bw", "avx512vl", "avx512vbmi", "avx512_vnni", "avx512_bf16", "amx_int8",
         "asimd", "asimddp", "i8mm", "sve")  # fmt: skip
"""Instruction sets by Linux's names, of x86 and then of ARM."""

_LITTLE = 10**9
_FEW_FILES = 1024

_VARIABLES = {
    "FLASHPACK_WARM": "0: experts that earlier runs used most are neither remembered nor read first",
    "FLASHPACK_PROFILE": "0: what tune found best is not used",
    "OMP_NUM_THREADS": "compute threads",
    "MKL_NUM_THREADS": "compute threads",
    "CUDA_VISIBLE_DEVICES": "GPUs that are seen",
    "PYTORCH_MPS_FAST_MATH": "Metal computes less exactly",
    "PYTORCH_ENABLE_MPS_FALLBACK": "what Metal lacks, the processor computes",
    "XDG_CACHE_HOME": "where flashpack remembers things",
}
"""What they change, of those that matter here."""


def system() -> Iterator[Remark]:
    """The operating system."""
    name = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.system()
    with contextlib.suppress(OSError):
        name = platform.freedesktop_os_release().get("PRETTY_NAME", name)
    text = f"{name}, {platform.system()} {platform.release()}, {platform.machine()}"
    if sys.platform not in ("linux", "darwin"):
        yield Remark("problem", "machine", "system", text, "flashpack is for Linux and macOS; on Windows, use WSL 2")
    else:
        yield Remark("ok", "machine", "system", text, data={"system": name, "machine": platform.machine()})


def software() -> Iterator[Remark]:
    """Versions, and whether they are those that flashpack asks for."""
    versions = {"flashpack": __version__, "Python": platform.python_version()}
    for name in _SHOWN:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield Remark("ok", "machine", "software", text, data=versions)
    wrong = wrong_packages()
    if wrong:
        todo = f"pip install {' '.join(repr(need) for need in wrong)}"
        yield Remark("problem", "machine", "packages", "; ".join(wrong.values()), todo, {"wrong": wrong})


def wrong_packages() -> dict[str, str]:
    """Packages that flashpack needs and that are missing or of another version: requirement -> what is there."""
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(line) for line in metadata.requires(_DISTRIBUTION) or ()]
    except metadata.PackageNotFoundError:  # run from its source
        return {}
    wrong = {}
    for need in needed:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        what = f"{need.name}{need.specifier}"
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong[what] = f"{need.name} is missing"
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong[what] = f"{need.name} {version} is installed, flashpack needs {need.specifier}"
    return wrong


def processor() -> Iterator[Remark]:
    """Its name, instruction sets, and how much of it this process may use."""
    sets = instruction_sets()
    name = _processor_name()
    text = f"{name} ({', '.join(sets)})" if sets else name
    yield Remark("ok", "machine", "processor", text, data={"name": name, "instruction_sets": sets})
    yield _cores()
    load = os.getloadavg()[0]
    if load > max(1.0, 0.75 * usable_cores()):
        yield Remark(
            "note", "machine", "load", f"other programs are at work: load {load:.1f} in the last minute",
            "all rates and speeds are lower now; look again when the machine is at rest", {"load": load},
        )  # fmt: skip


def summary() -> str:
    """Processor, cores, memory, system and load in a line, for a report."""
    system = (
        f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else f"{platform.system()} {platform.release()}"
    )
    load = os.getloadavg()[0]
    return f"{_processor_name()}, {usable_cores()} cores, {gb(sizes.installed())}, {system}, load {load:.1f}"


def quota() -> float | None:
    """Processors' worth of time that the cgroups allow; None without a limit."""
    least = math.inf
    for folder in sizes.cgroup_folders("cpu"):
        with contextlib.suppress(OSError, ValueError):
            if (folder / "cpu.max").exists():
                part, period = (folder / "cpu.max").read_text().split()
            else:
                part, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(part) > 0:  # "max", or -1: no limit
                least = min(least, int(part) / int(period))
    return None if math.isinf(least) else least


def _cores() -> Remark:
    import torch

    threads, usable, there, allowed = torch.get_num_threads(), usable_cores(), os.cpu_count() or 1, quota()
    data = {"cores": there, "usable": usable, "quota": allowed, "threads": threads}
    text = f"{usable} of {there} usable" if usable < there else f"{there}, all usable"
    text += f"; the cgroup allows the time of {allowed:g}" if allowed is not None else ""
    text += f"; `run` computes with {threads} threads"
    best = max(1, min(usable, math.floor(allowed or usable)))
    if threads > best:
        todo = f"flashpack run --threads {best}: more threads than processors wait for each other"
        return Remark("note", "machine", "cores", text, todo, data)
    if threads < best and "OMP_NUM_THREADS" in os.environ:
        todo = f"flashpack run --threads {best}, or unset OMP_NUM_THREADS"
        return Remark("note", "machine", "cores", text, todo, data)
    return Remark("ok", "machine", "cores", text, data=data)


def instruction_sets() -> list[str]:
    """Those that matter to the kernels, where the system tells them."""
    with contextlib.suppress(OSError):
        line = re.search(r"^(?:flags|Features)\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
        if line:
            return [name for name in _SETS if name in line[1].split()]
    return ["asimd"] if platform.machine() in ("arm64", "aarch64") else []


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        line = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE)
        if line:
            return line[1].strip()
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError):
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


def memory() -> Iterator[Remark]:
    """What is installed, what may be used, and what ends it."""
    installed, limit, free, unasked = sizes.installed(), sizes.limit(), sizes.available(), sizes.spare()
    swap = _meminfo("SwapTotal")
    data = {"installed": installed, "limit": limit, "available": free, "spare": unasked, "swap": swap}
    text = f"{gb(installed)} installed, {gb(free)} available; `run` takes up to {gb(unasked)} without --memory"
    if limit is not None and limit < installed:
        text += f"; the cgroup allows {gb(limit)}"
    if swap is not None:
        text += f"; swap {gb(swap)}" if swap else "; no swap"
    if unasked < _LITTLE:
        todo = "close other programs, or raise the cgroup's limit; small packs run with --memory smallest"
        yield Remark("note", "machine", "memory", text, todo, data)
    else:
        yield Remark("ok", "machine", "memory", text, data=data)


def _meminfo(name: str) -> int | None:
    """Bytes; None where the system does not tell."""
    with contextlib.suppress(OSError):
        line = re.search(rf"^{name}:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
        return int(line[1]) * 1024 if line else None
    return None


def settings() -> Iterator[Remark]:
    """Open files, environment variables, and the folder for what is remembered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = soft == resource.RLIM_INFINITY
    text = "no limit" if many else f"{soft} at once (ulimit -n)"
    data = {"soft": None if many else soft, "hard": None if hard == resource.RLIM_INFINITY else hard}
    if not many and soft < _FEW_FILES:
        todo = f"ulimit -n {_FEW_FILES}: a pack of many layers opens three files for each"
        yield Remark("note", "machine", "open files", text, todo, data)
    else:
        yield Remark("ok", "machine", "open files", text, data=data)
    yield from _environment()
    folder = user_cache.folder()
    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        todo = "make it writable, or set XDG_CACHE_HOME to a folder that is"
        text = f"{folder}: cannot be written; hot experts and the answer of Metal's self-test are not remembered"
        yield Remark("note", "machine", "cache folder", text, todo)


def _environment() -> Iterator[Remark]:
    known = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    if known:
        text = "; ".join(f"{name}={value} ({_VARIABLES[name]})" for name, value in known.items())
        yield Remark("ok", "machine", "environment", text, data=known)
    unknown = sorted(name for name in os.environ if name.startswith("FLASHPACK_") and name not in _VARIABLES)
    if unknown:
        text = f"{', '.join(unknown)}: not known to flashpack {__version__}"
        yield Remark("note", "machine", "variables", text, "look for a typing error, or unset it", {"unknown": unknown})
