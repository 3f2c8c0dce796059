"""Going through all of a pack once: converting and verifying, beside plainly reading it."""

from __future__ import annotations

import mmap
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import drop_cache

_TURNS = 5


def convert(src: str, pack: str, experts: str, dense: str) -> dict[str, Any]:
    import flashpack

    report = flashpack.convert(src, pack, experts, dense)
    return {"seconds": report.seconds, "bytes": report.source_bytes, "pack": report.pack_bytes}


def verify(pack: str) -> dict[str, Any]:
    """Full verification against reading the same files without checking, buffered and direct; cold, in turns."""
    import flashpack

    folder = Path(pack)
    files = [p for p in folder.rglob("*") if p.is_file()]
    times: dict[str, list[float]] = {"buffered": [], "direct": [], "verify": []}

    def read_all(flags: int) -> None:
        with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
            list(pool.map(lambda path: _read_whole(path, flags), files))

    for _ in range(_TURNS):
        for name, seconds in times.items():
            drop_cache(folder)
            begun = time.perf_counter()
            if name == "verify":
                findings = flashpack.verify(folder)
                if findings:
                    sys.exit(str(findings[0]))
            else:
                read_all(getattr(os, "O_DIRECT", 0) if name == "direct" else 0)
            seconds.append(time.perf_counter() - begun)
    size = sum(p.stat().st_size for p in files)
    return {"bytes": size} | {name: statistics.median(seconds) for name, seconds in times.items()}


def _read_whole(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY | flags)
    buffer, offset = mmap.mmap(-1, 4 * 2**20), 0
    while got := os.preadv(fd, [buffer], offset):
        offset += got
        if got < len(buffer):
            break  # the end; a direct read could not go on from there
    os.close(fd)
