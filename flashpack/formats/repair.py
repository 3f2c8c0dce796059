"""Mending a pack from another copy, piece by piece, each proven against the manifest's digests (SPEC.md section 9).

A damaged file is built anew beside the old one, from what is whole of it and what the donor has; it is read back and
checked, and only then takes its name. So a repair that fails, or is killed, leaves everything as it was.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from flashpack.errors import FlashpackError, IntegrityError, NotAPackError, OutputError, SourceError
from flashpack.formats import codecs
from flashpack.formats import constants as C
from flashpack.formats.checksums import digest, hasher, hexdigest
from flashpack.formats.entries import FileEntry, Layer, TensorEntry
from flashpack.formats.files import (
    chunks,
    create,
    locked,
    open_direct,
    open_inside,
    output_errors,
    pread,
    publish,
    pwrite,
    resize,
    sync,
    write_durably,
)
from flashpack.formats.findings import Finding, Region
from flashpack.formats.manifest import Manifest
from flashpack.formats.reader import check_identity, digest_file_bytes, manifest_bytes, require_folder
from flashpack.formats.records import align
from flashpack.formats.verify import Progress, check_files, regions_of, unlisted_files
from flashpack.formats.writer import commit_bytes

Bytes = bytes | bytearray | memoryview

_STRUCTURE = {"size", "missing-file", "unreadable-file", "header-digest", "tail-digest", "expert-table", "padding"}
"""Findings that a file built anew no longer has, even if the donor gave nothing."""


class Donor(Protocol):
    """Where good bytes may come from. Nothing it gives is trusted: every piece is compared with its digest."""

    name: str

    def manifest_bytes(self) -> bytes | None:
        """The manifest of another copy."""
        ...

    def tail(self, layer: Layer) -> bytes | None:
        """What stands behind the records of a layer's shard."""
        ...

    def stored(self, region: Region, layer: Layer) -> Iterator[Bytes]:
        """What may be the stored record of an expert, padding included."""
        ...

    def tensor(self, entry: TensorEntry) -> Iterator[Bytes] | None:
        """The bytes of a dense tensor, in pieces."""
        ...

    def copy(self, entry: FileEntry) -> bytes | None:
        """A copied file."""
        ...


@dataclass
class Repaired:
    """What was mended: files by path; how many pieces came from the donor; and what is still wrong."""

    files: list[str] = field(default_factory=list)
    pieces: int = 0
    findings: list[Finding] = field(default_factory=list)


def repair(
    pack: str | os.PathLike[str],
    donor: Donor,
    expect: str | None = None,
    on_start: Callable[[int], object] | None = None,
    progress: Progress | None = None,
) -> Repaired:
    """Check ``pack`` fully, mend what is damaged from ``donor``, and check the mended files again.

    ``expect``: the identity of the pack, needed only where manifest and digest file contradict each other and the
    donor cannot tell which is right. Files that the manifest does not list are reported and left alone.

    Raises ``SourceError`` if the donor has nothing of what is missing, ``IntegrityError`` if the manifest is
    damaged and cannot be restored, ``OutputError`` if there is no space or somebody else is at work.
    """
    folder = Path(pack)
    require_folder(folder)
    result = Repaired()
    with locked(folder):
        manifest = _restore_manifest(folder, donor, expect, result)
        findings = check_files(folder, manifest, manifest.files, on_start=on_start, progress=progress)
        damaged = {f.file for f in findings}
        for entry in (f for f in manifest.files if f.path in damaged):
            codes = {f.code for f in findings if f.file == entry.path}
            if entry.role == "copy":
                mended = _mend_copy(folder, entry, donor, result)
            else:
                mended = _mend_large(folder, entry, codes, manifest, donor, result)
            if mended:
                result.files.append(entry.path)
        result.findings = check_files(folder, manifest, [f for f in manifest.files if f.path in damaged])
    if result.findings and not result.files:
        raise SourceError(
            f"{donor.name}: nothing of {folder} can be mended from it; is it a copy or the source of this pack? "
            f"The first of {len(result.findings)} findings: {result.findings[0]}"
        )
    result.findings += unlisted_files(folder, manifest)
    return result


def encode_stored(record: memoryview, codec: str) -> Bytes:
    """A record as a shard of ``codec`` stores it, padding included."""
    if codec == "raw":
        return record
    frame = codecs.compress(record)
    return bytes(frame).ljust(align(len(frame), C.PAGE), b"\0")


def _restore_manifest(folder: Path, donor: Donor, expect: str | None, result: Repaired) -> Manifest:
    """The manifest. Where it and its digest file contradict each other, a third witness decides: ``expect``, or the
    donor's manifest if it confirms one of the two."""
    try:
        own = manifest_bytes(folder)
    except NotAPackError:
        if (folder / C.JOURNAL).exists():
            raise
        own = b""
    listed = digest_file_bytes(folder).decode("ascii", "replace").strip()
    if own and listed == hexdigest(own):
        check_identity(folder, hexdigest(own), expect)
        return Manifest.from_bytes(own)
    other = donor.manifest_bytes() or b""
    confirmed = hexdigest(other) if other and hexdigest(other) in (listed, hexdigest(own)) else None
    for raw in (own, other):
        if raw and hexdigest(raw) == (expect or confirmed):
            manifest = Manifest.from_bytes(raw)
            commit_bytes(folder, raw)
            result.files.append(C.MANIFEST)
            return manifest
    raise IntegrityError(
        f"{folder}: manifest and {C.MANIFEST_DIGEST} contradict each other, and {donor.name} does not tell which is "
        f"right; repair from another copy of this very pack, or give its identity with --expect"
    )


def _mend_copy(folder: Path, entry: FileEntry, donor: Donor, result: Repaired) -> bool:
    data = donor.copy(entry)
    if data is None or hexdigest(data) != entry.digests["file"] or not _free_way(folder, entry.path):
        return False
    write_durably(folder, entry.path, data, C.PARTIAL_SUFFIX)
    result.pieces += 1
    return True


def _mend_large(
    folder: Path, entry: FileEntry, codes: set[str], manifest: Manifest, donor: Donor, result: Repaired
) -> bool:
    """Build a shard or dense file anew; False leaves the old one as it is."""
    if not _free_way(folder, entry.path):
        return False
    old, size = _open_old(folder, entry.path)
    try:
        layer = manifest.layer_of(entry.path) if entry.role == "experts" else None
        header, tail = (manifest.dense_layout(entry.path)[0], b"")
        if layer is not None:
            found = _find_tail(manifest, layer, entry, old, size, donor)
            if found is None:
                return False
            header, tail = manifest.shard_layout(layer).header_bytes, found
        regions = regions_of(manifest, entry, tail)
        _check_space(folder, entry)
        partial = entry.path + C.PARTIAL_SUFFIX
        with output_errors(folder / entry.path):
            fd = create(folder / partial, folder)
        try:
            with output_errors(folder / entry.path):
                resize(fd, entry.size)
                pwrite(fd, header, 0)
                pwrite(fd, tail, entry.size - len(tail))
            fates = [_fill(fd, folder, region, manifest, old, size, donor) for region in regions]
            with output_errors(folder / entry.path):
                sync(fd)
        finally:
            os.close(fd)
        whole = [replace(r, path=partial) for r, fate in zip(regions, fates, strict=True) if fate != "lost"]
        better = "taken" in fates or codes & _STRUCTURE
        # A file of the right size with a hole in it would open, so one of another size must become complete.
        if not better or (size != entry.size and "lost" in fates) or _wrong(folder, whole):
            os.unlink(folder / partial)
            return False
    finally:
        if old is not None:
            os.close(old)
    with output_errors(folder / entry.path):
        publish(folder / partial, folder / entry.path)
    result.pieces += fates.count("taken")
    return True


def _fill(
    fd: int,
    folder: Path,
    region: Region,
    manifest: Manifest,
    old: int | None,
    size: int,
    donor: Donor,
) -> str:
    """Write one record or tensor: "kept" from the old file if it is whole there, else "taken" from the donor if it
    is there, else "lost"."""
    end = region.offset + region.size
    if old is not None and end <= size:
        with contextlib.suppress(OSError):  # a part of the drive that cannot be read is a damaged part
            if _copy(fd, region, chunks(old, region.offset, region.size, region.path), folder):
                return "kept"
    if region.tensor is None:
        layer = manifest.layer_of(region.path)
        offers: Iterable[Iterator[Bytes] | None] = (iter([data]) for data in donor.stored(region, layer))
    else:
        offers = [donor.tensor(next(t for t in manifest.tensors if t.name == region.tensor))]
    for offer in offers:
        if offer is not None and _copy(fd, region, offer, folder):
            return "taken"
    if old is not None and end <= size:
        with contextlib.suppress(OSError):  # nobody has it: what is there stays
            _copy(fd, region, chunks(old, region.offset, region.size, region.path), folder)
    return "lost"


def _copy(fd: int, region: Region, pieces: Iterator[Bytes], folder: Path) -> bool:
    """Write ``pieces`` over the region; whether they are the region's bytes."""
    hashed, at = hasher(), region.offset
    for piece in pieces:
        view = memoryview(piece).cast("B")
        if at + len(view) > region.offset + region.size:
            return False
        hashed.update(view)
        with output_errors(folder / region.path):
            pwrite(fd, view, at)
        at += len(view)
    return at == region.offset + region.size and hashed.hexdigest() == region.expected


def _find_tail(
    manifest: Manifest, layer: Layer, entry: FileEntry, old: int | None, size: int, donor: Donor
) -> bytes | None:
    """Table, sizes and digests of a shard: the old ones, those of its records if they are whole, the donor's."""
    layout = manifest.shard_layout(layer)

    def kept() -> bytes | None:
        if old is None or size < layout.size:
            return None
        return bytes(pread(old, layout.tail_bytes, layout.tail, entry.path))

    def from_records() -> bytes | None:
        if old is None or size < layout.tail or layer.mixed or layer.codec != "raw":
            return None
        blank = layout.parse_tail(bytes(layout.tail_bytes))
        spans = zip(blank.offsets, blank.spans, strict=True)
        return b"".join(digest(pread(old, span, offset, entry.path)) for offset, span in spans)

    for candidate in (kept, from_records, lambda: donor.tail(layer)):
        try:
            tail = candidate()
        except (OSError, FlashpackError):
            continue
        if tail is not None and hexdigest(tail) == entry.digests["tail"]:
            return tail
    return None


def _wrong(folder: Path, regions: list[Region]) -> bool:
    """Read back what has been written."""
    for region in regions:
        fd = open_direct(folder, region.path)
        try:
            hashed = hasher()
            for piece in chunks(fd, region.offset, region.size, region.path):
                hashed.update(piece)
        finally:
            os.close(fd)
        if hashed.hexdigest() != region.expected:
            return True
    return False


def _open_old(folder: Path, path: str) -> tuple[int | None, int]:
    """The damaged file and its size; None if it is missing or no plain file."""
    try:
        fd = open_inside(folder, path)
    except OSError:
        return None, 0
    return fd, os.fstat(fd).st_size


def _free_way(folder: Path, path: str) -> bool:
    """Whether a file can be put there: not below a link, which would lead out of the pack, nor over a folder."""
    below = folder / path
    parents = [p for p in below.parents if p != folder and p.is_relative_to(folder)]
    return not below.is_dir() and not any(p.is_symlink() for p in parents)


def _check_space(folder: Path, entry: FileEntry) -> None:
    free = shutil.disk_usage(folder).free
    if entry.size + 2**24 > free:
        raise OutputError(
            f"{folder / entry.path}: a repair needs {entry.size / 1e9:.2f} GB beside it, {free / 1e9:.2f} GB are free"
        )
