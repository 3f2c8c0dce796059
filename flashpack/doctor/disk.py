"""Where a folder lies, how much room there is, and how fast random parts of files are read there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flashpack.doctor.remark import Remark
from flashpack.formats.files import sync
from flashpack.sizes import gb

if TYPE_CHECKING:
    from flashpack.runtime.rates import Rate

MOUNTS = Path("/proc/self/mountinfo")

TRIAL_BYTES = 2**28
"""Of the temporary file."""

READING = "the disk: random reads"

_BLOCK = 2**24
_LITTLE = 5 * 10**9
_SLOW = 5e8
_CLEARLY = 1.25

_NETWORK = ("nfs", "cifs", "smb", "9p", "fuse.sshfs", "ceph", "glusterfs", "lustre", "afs", "webdav")
_ADVICE = {
    "tmpfs": "it is memory: a pack there takes what experts could have; put it on a drive",
    "overlay": "a container's own layer is slow on some systems; put packs on a volume (docker run -v)",
}


def existing(path: Path) -> Path:
    """The nearest folder on the way to ``path``, which may not be there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def place(folder: Path) -> Iterator[Remark]:
    """Room and file system."""
    space = shutil.disk_usage(folder)
    kind, mount = file_system(folder)
    text = f"{gb(space.free)} of {gb(space.total)} free"
    data = {"folder": str(folder), "free": space.free, "total": space.total, "file_system": kind, "mount": mount}
    if space.free < _LITTLE:
        todo = "a conversion needs room for the whole pack (flashpack plan says how much); free some"
        yield Remark("note", "disk", "space", f"{folder}: {text}", todo, data)
    else:
        yield Remark("ok", "disk", "space", f"{folder}: {text}", data=data)
    if kind is None:
        return
    text = f"{kind} at {mount}"
    if any(kind == name or kind.startswith(name) for name in _NETWORK):
        todo = "copy the pack to a drive of this machine: each expert that is read waits for the network"
        yield Remark("note", "disk", "file system", f"{text}, on the network", todo, data)
    elif kind in _ADVICE:
        yield Remark("note", "disk", "file system", text, _ADVICE[kind], data)
    else:
        yield Remark("ok", "disk", "file system", text, data=data)


def file_system(folder: Path) -> tuple[str | None, str | None]:
    """Its kind and where it is mounted; None where the system does not tell (macOS)."""
    best: tuple[str | None, str | None] = (None, None)
    with contextlib.suppress(OSError, ValueError):
        real = folder.resolve()
        for line in MOUNTS.read_text().splitlines():
            before, after = line.split(" - ", 1)
            mount = before.split()[4].encode().decode("unicode_escape")  # a space is \040
            # Of two at the same place, the later one is on top.
            if real.is_relative_to(mount) and len(mount) >= len(best[1] or ""):
                best = after.split()[0], mount
    return best


def temporary(folder: Path, begin: Callable[[str], object]) -> Iterator[Remark]:
    """Measure a file that is made in ``folder`` and removed again."""
    from flashpack.runtime.rates import SIZES, measure

    if not folder.is_dir():
        yield Remark("problem", "disk", "speed", f"{folder}: no such folder", "name one that is there, or make it")
        return
    if shutil.disk_usage(folder).free < 4 * TRIAL_BYTES:
        todo = f"free some: measuring takes a file of {gb(TRIAL_BYTES)}"
        yield Remark("note", "disk", "speed", f"{folder}: not measured, the disk is nearly full", todo)
        return
    begin(f"the disk: writing {gb(TRIAL_BYTES)}")
    with tempfile.NamedTemporaryFile(prefix=".flashpack-doctor-", dir=folder) as file:
        numbers = np.random.default_rng()
        for _ in range(TRIAL_BYTES // _BLOCK):  # random, because some file systems compress or share
            file.write(numbers.bytes(_BLOCK))
        file.flush()
        sync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin(READING)
        rates = measure(folder, [Path(file.name).name], SIZES)
    yield from told(rates, "a file that was just written: a cache of the drive may have helped")


def told(rates: Sequence[Rate], of: str, record: int | None = None) -> Iterator[Remark]:
    """Remarks about measured rates. ``of``: what was read; ``record``: the size that counts, an expert's."""
    from flashpack.runtime.rates import SIZES
    from flashpack.runtime.reads import READ_THREADS

    how = f"{READ_THREADS} random reads at once, as `run` does, of {of}"
    if not rates:
        yield Remark("ok", "disk", "speed", f"not measured: {of} is too small for {how.partition(',')[0]}")
        return
    yield Remark("ok", "disk", "speed", how, data={"threads": READ_THREADS})
    for r in rates:
        ways = [f"{gb(r.buffered)}/s buffered"]
        ways.insert(0, "no direct reads" if r.direct is None else f"{gb(r.direct)}/s direct")
        cached = f" ({r.cached:.0%} of that from the page cache)" if r.cached else ""
        name = f"{_binary(r.size)}, expert" if r.size == record else _binary(r.size)
        data = {"size": r.size, "direct": r.direct, "buffered": r.buffered, "cached": r.cached}
        yield Remark("ok", "disk", name, ", ".join(ways) + cached, data=data)
    fastest = max((r.drive for r in rates if r.drive), default=None)
    if fastest is None:
        todo = "look again when other programs have filled the page cache, or restart the machine"
        yield Remark("note", "disk", "page cache", "only memory was measured, not the drive", todo)
    elif fastest < _SLOW and rates[-1].size >= SIZES[0]:  # no drive is fast at small reads
        text = f"at most {gb(fastest)}/s: slow for experts that are not in memory (an NVMe drive gives 2 to 7 GB/s)"
        todo = "put packs on the fastest drive, and give `run` more --memory"
        yield Remark("note", "disk", "drive", text, todo, {"fastest": fastest})
    slower = [r for r in rates if r.direct and not r.cached and r.buffered > _CLEARLY * r.direct]
    if len(slower) == len(rates):
        text = "reads past the page cache are clearly slower than through it"
        yield Remark("ok", "disk", "way", f"{text}; `run` tries both when it starts, and takes the faster one")


def _binary(size: int) -> str:
    return f"{size / 2**20:.3g} MiB" if size >= 2**20 else f"{size / 2**10:.3g} KiB"
