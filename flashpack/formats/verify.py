"""Checking a pack without its source: every byte of every file belongs to a checked region (SPEC.md section 8).

Positions come from the manifest, never from a damaged header, so one flipped bit does not hide another. First the
structure of each file, then the regions that have a digest of their own: records and dense tensors.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flashpack.errors import FlashpackError, FormatError, UsageError
from flashpack.formats import codecs
from flashpack.formats import constants as C
from flashpack.formats.checksums import hasher, hexdigest, hexdigest_of
from flashpack.formats.entries import FileEntry, Layer
from flashpack.formats.files import chunks, open_direct, open_inside, pread
from flashpack.formats.findings import Finding, Region
from flashpack.formats.manifest import Manifest
from flashpack.formats.reader import check_identity, digest_file_bytes, manifest_bytes, unlisted

Progress = Callable[[int], object]
"""Called with the number of bytes checked since the last call; may come from several threads."""

_MEMORY = 128 * 2**20  # for all workers together

LEVELS = ("quick", "sample", "full")


def verify(
    pack: str | os.PathLike[str],
    level: str = "full",
    share: float = 0.05,
    expect: str | None = None,
    on_start: Callable[[int], object] | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> list[Finding]:
    """Check a pack; an empty list means it is whole. All findings are returned, not only the first.

    ``level``: ``"quick"`` checks structure, sizes, headers, digest tables and copied files; ``"sample"`` also a
    random ``share`` of records and tensors, others each time; ``"full"`` every byte. ``expect``: the identity
    the pack must have. ``on_start`` is called with the bytes of records and tensors that will be read.

    Raises ``NotAPackError`` if there is no manifest, ``VersionError`` if the pack is too new to judge,
    ``FormatError`` if it was written wrong, ``IdentityError`` if it is sound but not the expected one.
    """
    if level not in LEVELS:
        raise UsageError(f"level {level!r} is not one of {', '.join(LEVELS)}")
    if not 0 < share <= 1:
        raise UsageError(f"a sample of {share:.0%} is not more than 0 and at most 100 %")
    folder = Path(pack)
    manifest, findings = _manifest(folder, expect)
    if manifest is None:
        return findings
    findings += unlisted_files(folder, manifest)
    return findings + check_files(folder, manifest, manifest.files, level, share, on_start, progress, workers)


def check_files(
    folder: Path,
    manifest: Manifest,
    entries: Sequence[FileEntry],
    level: str = "full",
    share: float = 1.0,
    on_start: Callable[[int], object] | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> list[Finding]:
    """``verify`` for some files of a pack whose manifest is known."""
    findings: list[Finding] = []
    regions: list[Region] = []
    with ThreadPoolExecutor(workers or _workers(manifest)) as pool:
        for found in pool.map(lambda f: _file(folder, f, manifest), entries):
            findings += (item for item in found if isinstance(item, Finding))
            regions += (item for item in found if isinstance(item, Region))
        regions = _chosen(regions, level, share)
        if on_start:
            on_start(sum(r.size for r in regions))
        report = progress or (lambda count: None)
        for problem in pool.map(lambda r: _region(folder, r, report), regions):
            findings += problem
    return findings


def _workers(manifest: Manifest) -> int:
    """Twice the processors: while one thread waits for the drive, another hashes. Fewer where each must hold a large
    compressed record, stored and decoded."""
    most = 2 * (os.cpu_count() or 1)
    strides = [manifest.record_kinds[k].stride for x in manifest.layers if x.codec != "raw" for k, _ in x.kinds]
    return max(1, min(most, _MEMORY // (2 * max(strides, default=1))))


def unlisted_files(folder: Path, manifest: Manifest) -> list[Finding]:
    """Files that the manifest does not know: a pack is exactly what its manifest says."""
    return [
        Finding("unlisted-file", path, "file", "not listed in the manifest; remove it")
        for path in unlisted(folder, manifest)
    ]


def regions_of(manifest: Manifest, entry: FileEntry, tail: bytes = b"") -> list[Region]:
    """The records of a shard whose ``tail`` this is, or the tensors of a dense file, in order."""
    if entry.role == "dense":
        tensors = manifest.dense_tensors[entry.path]
        return [Region(entry.path, t.offset, t.nbytes, t.digest, tensor=t.name) for t in tensors]
    layer = manifest.layer_of(entry.path)
    layout = manifest.shard_layout(layer)
    parsed = layout.parse_tail(tail)
    regions = []
    for expert in range(layer.experts):
        stride = layout.stride(int(parsed.table[expert, 0]))
        frame = None if layer.codec == "raw" else (parsed.sizes[expert], stride, parsed.contents[expert].hex())
        offset, span, expected = parsed.offsets[expert], parsed.spans[expert], parsed.digests[expert].hex()
        regions.append(Region(entry.path, offset, span, expected, layer.index, expert, frame=frame))
    return regions


def _chosen(regions: list[Region], level: str, share: float) -> list[Region]:
    """All regions, none, or random ones that make up ``share`` of the bytes."""
    if level != "sample":
        return regions if level == "full" else []
    wanted = share * sum(r.size for r in regions)
    chosen, size = [], 0
    for i in random.SystemRandom().sample(range(len(regions)), len(regions)):
        if size >= wanted:
            break
        chosen.append(i)
        size += regions[i].size
    return [regions[i] for i in sorted(chosen)]


def _manifest(folder: Path, expect: str | None) -> tuple[Manifest | None, list[Finding]]:
    """The manifest, with a finding if it is damaged; None if it cannot be used at all."""
    raw = manifest_bytes(folder)
    found = hexdigest(raw)
    expected = digest_file_bytes(folder)
    if expected == f"{found}\n".encode():
        check_identity(folder, found, expect)
        return Manifest.from_bytes(raw), []
    finding = Finding(
        "manifest-digest", C.MANIFEST, "manifest", "the manifest or its digest file is damaged",
        offset=0, expected=expected.decode("ascii", "replace").strip(), found=found,
    )  # fmt: skip
    try:
        return Manifest.from_bytes(raw), [finding]
    except FlashpackError:
        return None, [finding]


def _file(folder: Path, entry: FileEntry, manifest: Manifest) -> list[Finding | Region]:
    """Check the structure of one file; what has digests of its own comes back as regions."""
    layer = manifest.layer_of(entry.path) if entry.role == "experts" else None
    index = layer.index if layer else None
    try:
        fd = open_inside(folder, entry.path)
    except FileNotFoundError:
        return [Finding("missing-file", entry.path, "file", "missing", layer=index)]
    except OSError as e:
        message = f"cannot be opened as a plain file: {e.strerror}"
        return [Finding("unreadable-file", entry.path, "file", message, layer=index)]
    found: list[Finding | Region] = []
    try:
        size = os.fstat(fd).st_size
        if size != entry.size:
            found.append(Finding("size", entry.path, "file", "wrong size", index, expected=entry.size, found=size))
        if layer is not None:
            found += _shard(fd, entry, manifest, layer, min(size, entry.size))
        elif entry.role == "dense":
            found += _dense(fd, entry, manifest, min(size, entry.size))
        elif size == entry.size:
            copy = hexdigest_of(chunks(fd, 0, size, entry.path))
            if copy != entry.digests["file"]:
                expected = entry.digests["file"]
                found.append(
                    Finding("file-digest", entry.path, "file", "damaged", offset=0, expected=expected, found=copy)
                )
    except (OSError, FlashpackError) as e:
        found.append(Finding("unreadable-file", entry.path, "file", f"reading failed: {e}", layer=index))
    finally:
        os.close(fd)
    return found


def _header(fd: int, entry: FileEntry, expected: bytes, size: int, layer: int | None) -> Iterator[Finding]:
    header = bytes(pread(fd, min(len(expected), size), 0, entry.path))
    if header != expected:
        yield Finding(
            "header-digest", entry.path, "header", "the header is damaged", layer,
            offset=0, expected=entry.digests["header"], found=hexdigest(header),
        )  # fmt: skip


def _shard(fd: int, entry: FileEntry, manifest: Manifest, layer: Layer, size: int) -> Iterator[Finding | Region]:
    layout = manifest.shard_layout(layer)
    yield from _header(fd, entry, layout.header_bytes, size, layer.index)
    if size < layout.size:
        return  # truncated: already reported; the digests at the end are gone
    tail = bytes(pread(fd, layout.tail_bytes, layout.tail, entry.path))
    if hexdigest(tail) != entry.digests["tail"]:
        yield Finding(
            "tail-digest", entry.path, "digests", "the digests, sizes or expert table are damaged", layer.index,
            offset=layout.tail, expected=entry.digests["tail"], found=hexdigest(tail),
        )  # fmt: skip
    try:
        yield from regions_of(manifest, entry, tail)
    except FormatError as e:
        yield Finding("expert-table", entry.path, "table", str(e), layer.index, offset=layout.tail)


def _dense(fd: int, entry: FileEntry, manifest: Manifest, size: int) -> Iterator[Finding | Region]:
    header = manifest.dense_layout(entry.path)[0]
    yield from _header(fd, entry, header, size, None)
    end = len(header)
    for region in regions_of(manifest, entry):
        if region.offset <= size and any(pread(fd, region.offset - end, end, entry.path)):
            yield Finding("padding", entry.path, "padding", "bytes that must be zero are not", offset=end)
        end = region.offset + region.size
        if end <= size:
            yield region
        else:
            yield region.finding("truncated-tensor", "tensor", "cut off")


def _region(folder: Path, region: Region, report: Progress) -> list[Finding]:
    """Read one region and compare it with its digest."""
    try:
        fd = open_direct(folder, region.path)
        try:
            if region.frame is not None:
                return _frame(fd, region, *region.frame, report)
            hashed = hasher()
            for piece in chunks(fd, region.offset, region.size, region.path):
                hashed.update(piece)
                report(len(piece))
        finally:
            os.close(fd)
    except (OSError, FlashpackError) as e:
        return [region.finding("unreadable-file", "file", f"reading failed: {e}")]
    found = hashed.hexdigest()
    if found == region.expected:
        return []
    if region.tensor is not None:
        return [region.finding("tensor-digest", "tensor", "the tensor is damaged", region.expected, found)]
    return [region.finding("record-digest", "record", "the expert's record is damaged", region.expected, found)]


def _frame(fd: int, region: Region, size: int, stride: int, content: str, report: Progress) -> list[Finding]:
    """A compressed record: first the stored bytes, and only if they are whole what they decode to."""
    stored = memoryview(bytearray(region.size))
    at = 0
    for piece in chunks(fd, region.offset, region.size, region.path):
        stored[at : at + len(piece)] = piece
        at += len(piece)
        report(len(piece))
    found = hexdigest(stored)
    if found != region.expected:
        return [region.finding("record-digest", "record", "the expert's record is damaged", region.expected, found)]
    if any(stored[size:]):
        return [region.finding("padding", "padding", "bytes behind a frame are not zero")]
    try:
        record = codecs.content(stored[:size], stride, region.path)
    except FormatError as e:
        return [region.finding("frame", "record", str(e))]
    if hexdigest(record) != content:
        return [region.finding("content-digest", "record", "the frame holds other bytes", content, hexdigest(record))]
    return []
