"""Mending a pack from whatever the user has: another copy of it, or the checkpoint it was made from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from flashpack.converter.folder import Source, is_remote, shown
from flashpack.converter.remake import Remake
from flashpack.converter.units import Progress
from flashpack.errors import NotAPackError, UsageError
from flashpack.formats import Manifest
from flashpack.formats import constants as C
from flashpack.formats.donor import PackDonor
from flashpack.formats.reader import manifest_bytes, require_folder
from flashpack.formats.repair import Repaired
from flashpack.formats.repair import repair as repair_from


def repair(
    pack: str | os.PathLike[str],
    source: Source,
    expect: str | None = None,
    on_start: Callable[[int], object] | None = None,
    progress: Progress | None = None,
) -> Repaired:
    """Mend what is damaged or missing in ``pack``; every part is proven against the pack's own digests.

    ``source``: another copy, or the checkpoint, each a folder, a URL or ``hf://...`` (the pack's recipe must be
    reproducible). ``expect``: the pack's identity, where its manifest is damaged, too. ``on_start`` and ``progress``
    count the bytes of the check that comes first.

    Raises ``SourceError`` if nothing can be had from ``source``, ``UnsupportedError`` for a recipe that cannot be
    followed again, ``IntegrityError`` if the manifest cannot be restored, ``OutputError`` if it cannot be written.
    """
    folder = Path(pack)
    require_folder(folder)
    donor = _donor(folder, source)
    try:
        return repair_from(folder, donor, expect, on_start, progress)
    finally:
        donor.close()


def _donor(folder: Path, source: Source) -> Remake | PackDonor:
    """A pack, or what can be made of a checkpoint."""
    if is_remote(source):
        with contextlib.suppress(NotAPackError):
            return PackDonor(os.fspath(source), shown(source))
        return Remake(source, Manifest.from_bytes(manifest_bytes(folder)))
    local = Path(source)
    if local.exists() and local.resolve() == folder.resolve():
        raise UsageError(f"--from {source}: is the damaged pack itself; name another copy, or the checkpoint")
    if local.is_dir() and not (local / C.MANIFEST).exists():
        return Remake(local, Manifest.from_bytes(manifest_bytes(folder)))
    return PackDonor(os.fspath(source))
