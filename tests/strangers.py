"""Packs as a stranger makes them: any copied file changed, every checksum right."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashpack.formats.checksums import hexdigest
from flashpack.formats.manifest import FileEntry, Manifest

ROOM = 3 * 2**30
"""Address space that reading a tiny pack may take; what the mutations ask for is thousands of times more."""


def rewrite(pack: Path, name: str, data: bytes) -> None:
    """Replace or add a copied file and make the manifest agree."""
    (pack / name).write_bytes(data)
    manifest = Manifest.from_bytes((pack / "flashpack.json").read_bytes())
    files = [f for f in manifest.files if f.path != name]
    files.append(FileEntry(name, "copy", len(data), {"file": hexdigest(data)}))
    raw = replace(manifest, files=tuple(files)).to_bytes()
    (pack / "flashpack.json").write_bytes(raw)
    (pack / "flashpack.json.b3").write_text(f"{hexdigest(raw)}\n")


def change_json(pack: Path, name: str, **changes: Any) -> None:
    """Set top-level fields of a JSON file of the pack; ``...`` removes one."""
    data = json.loads((pack / name).read_text()) if (pack / name).exists() else {}
    data.update(changes)
    rewrite(pack, name, json.dumps({k: v for k, v in data.items() if v is not ...}).encode())


@contextmanager
def bounded(seconds: float = 10.0) -> Iterator[None]:
    """The block may take so much processor time and, on Linux, ``ROOM`` more address space."""
    begun = time.process_time()
    before = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.process_time() - begun < seconds
