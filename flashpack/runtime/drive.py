"""How the files of a pack are read: past the page cache or through it."""

from __future__ import annotations

import fcntl
import os
import sys
from dataclasses import dataclass

from flashpack.formats import Pack
from flashpack.formats.files import open_inside

_DIRECT: int = getattr(os, "O_DIRECT", 0)  # macOS has none: F_NOCACHE does it there


@dataclass
class Drive:
    """Open shards by layer. ``io``: "direct" (past the page cache) or "buffered"; ``why``: in a few words."""

    fds: dict[int, int]
    io: str
    why: str

    def close(self) -> None:
        """Close the files; harmless if repeated."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds = {}


def open_for_reading(pack: Pack, arena: int) -> Drive:
    """Open the shards of ``pack`` for an arena of ``arena`` bytes."""
    if arena >= pack.expert_bytes:
        return Drive(_open_all(pack, direct=False), "buffered", "all experts fit into memory")
    try:
        return Drive(_open_all(pack, direct=True), "direct", "")
    except OSError:
        return Drive(_open_all(pack, direct=False), "buffered", "the file system has no direct reads")


def _open_all(pack: Pack, direct: bool) -> dict[int, int]:
    """Descriptors by layer; ``OSError`` where ``direct`` is not possible."""
    fds: dict[int, int] = {}
    try:
        for layer in pack.manifest.layers:
            fds[layer.index] = open_inside(pack.folder, layer.path, _DIRECT if direct else 0)
            if direct and sys.platform == "darwin":
                fcntl.fcntl(fds[layer.index], fcntl.F_NOCACHE, 1)
    except OSError:
        for fd in fds.values():
            os.close(fd)
        raise
    return fds
