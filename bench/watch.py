"""Watching a process from outside: peak memory, and what machine this is."""

from __future__ import annotations

import platform
import re
import threading
from pathlib import Path


class Peak:
    """Samples /proc/PID/status every 50 ms until ``stop``: peaks of anonymous + shared, and of mapped file memory."""

    def __init__(self, pid: int) -> None:
        self._path = Path(f"/proc/{pid}/status")
        self._stop = threading.Event()
        self._peaks = [0, 0]
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            try:
                found = dict(re.findall(r"^(Rss\w+):\s+(\d+) kB$", self._path.read_text(), re.MULTILINE))
            except OSError:
                return
            kib = {k: int(v) * 1024 for k, v in found.items()}
            now = [kib.get("RssAnon", 0) + kib.get("RssShmem", 0), kib.get("RssFile", 0)]
            self._peaks = [max(a, b) for a, b in zip(self._peaks, now, strict=True)]

    def stop(self) -> tuple[int, int]:
        """(anonymous + shared, mapped files) at their highest, in bytes."""
        self._stop.set()
        self._thread.join()
        return self._peaks[0], self._peaks[1]


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return match[1] if match else platform.processor() or platform.machine()
