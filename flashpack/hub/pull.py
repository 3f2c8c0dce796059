"""A pack from a hub: only what its manifest lists, proven against it, and in its place when it is whole.

The files come by ranges, as those of checkpoints do (huggingface_hub's own downloads begin a file anew after a stop,
and files of packs have gigabytes). They wait in a folder beside the pack's, whose name has the identity in it: what is
there belongs to this pack and no other.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashpack.converter.convert import check_space
from flashpack.converter.hub import HubFolder, open_hub
from flashpack.converter.transfer import CONNECTIONS
from flashpack.errors import IdentityError, IntegrityError, OutputError, SourceError
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.files import (
    locked,
    make_folder,
    open_inside,
    output_errors,
    pwrite,
    resize,
    sync,
    sync_folder,
    write_behind,
    write_durably,
)
from flashpack.formats.manifest import Manifest
from flashpack.formats.verify import check_files
from flashpack.hub.card import SUFFIX

PIECE = 8 * 2**20
"""Bytes that are asked for at once, of each of as many files as there are connections."""

_SHOWN = 3


@dataclass(frozen=True)
class Pulled:
    """``pack``: its folder. ``bytes``: of its files. ``commit``: of the repository, at which it was read."""

    pack: str
    identity: str
    commit: str
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Wanted:
    """A pack in a repository. ``sizes`` in bytes by path, without the manifest and its digest."""

    folder: HubFolder
    manifest: Manifest
    raw: bytes
    identity: str

    @property
    def sizes(self) -> dict[str, int]:
        return {entry.path: entry.size for entry in self.manifest.files}


def pull(
    source: str,
    out: Path | None = None,
    expect: str | None = None,
    begin: Callable[[str, int], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Pulled:
    """Get the pack ``org/name[@revision]`` (with or without ``hf://``); by default to ``./name.flashpack``.

    Run again after an interruption to continue. ``expect``: the identity that it must have. ``begin`` is called with
    what is done next and how many bytes that is; ``progress`` with bytes, from several threads.

    Raises ``SourceError`` for what the hub refuses, or what is no pack; ``IdentityError`` and ``IntegrityError`` if it
    is another pack, or a damaged one; ``OutputError`` if ``out`` is there already or the disk is too small.
    """
    begin, progress = begin or (lambda text, total: None), progress or (lambda count: None)
    folder = open_hub(source if source.lower().startswith("hf://") else f"hf://{source}")
    assert isinstance(folder, HubFolder)
    try:
        wanted = _look(folder, expect)
        name = folder.origin["hub"].rpartition("/")[2]
        out = out or Path(name if name.endswith(SUFFIX) else name + SUFFIX)
        if out.exists() or out.is_symlink():
            raise OutputError(f"{out}: is there already; remove it, or name another folder")
        staging = out.with_name(f"{out.name}.{wanted.identity[:8]}{C.PARTIAL_SUFFIX}")
        check_space(staging, wanted.sizes, overwrite=False)
        with output_errors(staging):
            make_folder(staging)
        with locked(staging):
            begin("downloading", sum(wanted.sizes.values()))
            _download(wanted, staging, progress)
            _prove(wanted, staging, lambda total: begin("verifying", total), progress)
            with output_errors(out):
                _finish(wanted, staging, out)
    finally:
        folder.close()
    size = sum(wanted.sizes.values()) + len(wanted.raw)
    return Pulled(str(out), wanted.identity, folder.origin["commit"], size)


def _look(folder: HubFolder, expect: str | None) -> _Wanted:
    """Read the manifest, and see whether all that it lists is there."""
    if C.MANIFEST not in folder.files() or C.MANIFEST_DIGEST not in folder.files():
        raise SourceError(
            f"{folder.name}: not a pack: no {C.MANIFEST}; if it is a checkpoint: flashpack convert {folder.name}"
        )
    raw = folder.read(C.MANIFEST)
    identity = hexdigest(raw)
    if folder.read(C.MANIFEST_DIGEST) != f"{identity}\n".encode():
        raise IntegrityError(f"{folder.where(C.MANIFEST)}: its digest is not the one in {C.MANIFEST_DIGEST}")
    if expect is not None and identity != expect.strip().lower():
        raise IdentityError(f"{folder.name}: its identity is {identity}, not the expected {expect}: another pack")
    manifest = Manifest.from_bytes(raw)
    for entry in manifest.files:
        if (size := folder.size(entry.path)) != entry.size:
            raise IntegrityError(f"{folder.where(entry.path)}: has {size} bytes there, not {entry.size}")
    return _Wanted(folder, manifest, raw, identity)


def _download(wanted: _Wanted, staging: Path, progress: Callable[[int], object]) -> None:
    """Every file that is not there yet, or the rest of it."""
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        with suppress(queue.Empty):
            while not stop.is_set():
                path = todo.get_nowait()
                try:
                    _fetch(wanted, path, staging, progress, stop)
                    done.put(None)
                except BaseException as e:
                    done.put(e)

    for path in wanted.sizes:
        todo.put(path)
    # No pool of the library: its threads would keep an interrupted process until the last answer.
    for _ in range(CONNECTIONS):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in wanted.sizes:
            failure = done.get()
            if failure is not None:
                raise failure
    finally:
        stop.set()


def _fetch(wanted: _Wanted, path: str, staging: Path, progress: Callable[[int], object], stop: threading.Event) -> None:
    size, final = wanted.sizes[path], staging / path
    if final.exists():
        progress(size)
        return
    partial = final.with_name(final.name + C.PARTIAL_SUFFIX)
    with output_errors(partial):
        make_folder(partial.parent)
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            there = min(os.fstat(fd).st_size, size)
            progress(there)
            buffer = memoryview(bytearray(min(PIECE, size - there)))
            for at in range(there, size, PIECE):
                piece = buffer[: min(PIECE, size - at)]
                wanted.folder.read_into(path, at, piece)
                if stop.is_set():
                    return
                pwrite(fd, piece, at)
                write_behind(fd, at, len(piece))
                progress(len(piece))
            resize(fd, size)
        finally:
            os.close(fd)
        os.rename(partial, final)


def _prove(wanted: _Wanted, staging: Path, begin: Callable[[int], object], progress: Callable[[int], object]) -> None:
    """Compare every byte with the manifest's digests. What is damaged goes, so that it is fetched anew."""
    findings = check_files(staging, wanted.manifest, wanted.manifest.files, on_start=begin, progress=progress)
    if not findings:
        return
    damaged = sorted({finding.file for finding in findings})
    theirs = [path for path in damaged if _as_the_hub_says(wanted.folder, path, staging)]
    for path in damaged:
        (staging / path).unlink(missing_ok=True)
    if theirs:
        raise IntegrityError(
            f"{wanted.folder.name}: {_names(theirs)}: damaged in the repository itself: what came is what the hub has, "
            f"and not what the manifest says; tell who made it, or take another copy"
        )
    raise IntegrityError(
        f"{wanted.folder.name}: {_names(damaged)}: damaged on the way; run the same command again, which fetches "
        f"{'it' if len(damaged) == 1 else 'them'} anew"
    )


def _as_the_hub_says(folder: HubFolder, path: str, staging: Path) -> bool:
    """Whether the file that came is the one in the repository."""
    state = folder.state(path)
    try:
        data = open_inside(staging, path)
    except OSError:
        return False
    with open(data, "rb") as f:
        if "sha256" in state:
            return bool(hashlib.file_digest(f, "sha256").hexdigest() == state["sha256"])
        return bool(git_hash(f.read()) == state["git-sha1"])


def git_hash(content: bytes) -> str:
    """What git calls a file of this content; hubs know small files by it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _names(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more


def _finish(wanted: _Wanted, staging: Path, out: Path) -> None:
    """All files on the drive, the manifest last, then the folder's name."""
    for path in wanted.sizes:
        fd = open_inside(staging, path)
        try:
            sync(fd)
        finally:
            os.close(fd)
    for folder in {(staging / path).parent for path in wanted.sizes}:
        sync_folder(folder)
    write_durably(staging, C.MANIFEST_DIGEST, f"{wanted.identity}\n".encode(), C.PARTIAL_SUFFIX)
    write_durably(staging, C.MANIFEST, wanted.raw, C.PARTIAL_SUFFIX)
    os.rename(staging, out)
    sync_folder(out.absolute().parent)
