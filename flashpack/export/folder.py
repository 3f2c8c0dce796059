"""The folder of an export: written beside its place under a temporary name, renamed when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashpack.errors import OutputError, UsageError
from flashpack.formats import constants as C
from flashpack.formats.files import locked, make_folder, output_errors, sync_folder, write_durably
from flashpack.formats.manifest import canonical
from flashpack.sizes import gb
from flashpack.version import __version__

NOTE = "flashpack-export.json"
"""In every export: what it was made of, and what it lost. ``--overwrite`` replaces no other folders."""

_SPARE = 16 * 2**20
"""For blocks of the file system and small files, beside what a target counts. Bytes."""


class OutputFolder:
    """``path`` must be absent or empty; with ``overwrite`` it may also be an export. Raises ``OutputError``."""

    def __init__(self, path: Path, pack: Path, overwrite: bool) -> None:
        self.path = path
        with output_errors(path):
            if not path.name or path.resolve().is_relative_to(pack.resolve()):
                raise UsageError(f"{path}: an export needs a folder of its own outside the pack")
            self._partial = path.with_name(path.name + C.PARTIAL_SUFFIX)
            if os.path.lexists(path):
                _check(path, overwrite)
            if os.path.lexists(self._partial) and not (self._partial / NOTE).is_file():
                raise OutputError(f"{self._partial}: is in the way; remove it, or choose another folder")

    def check_space(self, nbytes: int) -> None:
        """Refuse before the first byte what cannot fit. An unfinished export of before makes room."""
        with output_errors(self.path):
            existing = next(p for p in self.path.absolute().parents if p.exists())
            free = shutil.disk_usage(existing).free
            free += sum(p.lstat().st_blocks * 512 for p in self._partial.rglob("*") if p.is_file())
        needed = nbytes + _SPARE
        if needed > free:
            raise OutputError(
                f"{self.path}: {gb(needed)} needed, {gb(free)} free; free some space or choose another disk"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """The folder to write to. It is gone if that fails."""
        with output_errors(self.path):
            make_folder(self._partial)
        with locked(self._partial):
            try:
                with output_errors(self.path):
                    for old in self._partial.iterdir():
                        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
                write_durably(self._partial, NOTE, canonical({"unfinished": True}), C.PARTIAL_SUFFIX)
                yield self._partial
            except BaseException:
                shutil.rmtree(self._partial, ignore_errors=True)
                raise

    def finish(self, note: dict[str, Any]) -> dict[str, int]:
        """Give the folder its name; returns its files and their sizes in bytes. Inside ``writing``."""
        write_durably(self._partial, NOTE, canonical({"flashpack": __version__, **note}), C.PARTIAL_SUFFIX)
        found = sorted(p for p in self._partial.rglob("*") if p.is_file())
        sizes = {p.relative_to(self._partial).as_posix(): p.stat().st_size for p in found}
        replaced = self.path.with_name(f"{self.path.name}.replaced{C.PARTIAL_SUFFIX}")
        with output_errors(self.path):
            if self.path.is_dir() and any(self.path.iterdir()):
                os.replace(self.path, replaced)
            os.replace(self._partial, self.path)
            sync_folder(self.path.absolute().parent)
        shutil.rmtree(replaced, ignore_errors=True)
        return sizes


def _check(path: Path, overwrite: bool) -> None:
    if path.is_symlink() or not path.is_dir():
        raise OutputError(f"{path}: exists and is not a folder")
    names = {p.name for p in path.iterdir()}
    if NOTE in names and not overwrite:
        raise OutputError(f"{path}: holds an export; use --overwrite to replace it")
    if names and NOTE not in names:
        why = "--overwrite replaces exports only, and this folder is none" if overwrite else "the folder is not empty"
        raise OutputError(f"{path}: {why}; choose another or empty it")
