"""Checking a pack without its source: every byte of every file belongs to a checked region (SPEC.md section 8).

Positions come from the manifest, never from a damaged header, so one flipped bit does not hide another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashpack.errors import FlashpackError, FormatError, NotAPackError, UsageError
from flashpack.formats import constants as C
from flashpack.formats.checksums import hasher, hexdigest, hexdigest_of
from flashpack.formats.files import chunks, pread, pread_into
from flashpack.formats.header import parse_header
from flashpack.formats.manifest import FileEntry, Layer, Manifest, TensorEntry
from flashpack.formats.reader import read_manifest
from flashpack.formats.shard import ShardLayout

Progress = Callable[[int], object]
"""Called with the number of bytes checked since the last call; may come from several threads."""


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a pack. ``section`` is the region of the file: manifest, header, record, table,
    digests, tensor, padding or file; ``offset`` its first byte; ``expected`` and ``found`` are digests or sizes."""

    code: str
    file: str
    section: str
    message: str
    layer: int | None = None
    expert: int | None = None
    tensor: str | None = None
    offset: int | None = None
    expected: str | int | None = None
    found: str | int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        place = [self.file]
        if self.layer is not None:
            place.append(f"layer {self.layer}")
        if self.expert is not None:
            place.append(f"expert {self.expert}")
        if self.tensor is not None:
            place.append(f"tensor {self.tensor}")
        if self.offset is not None:
            place.append(f"{self.section} at byte {self.offset}")
        text = f"{', '.join(place)}: {self.message}"
        if self.expected is not None or self.found is not None:
            text += f" (expected {self.expected}, found {self.found})"
        return text


def verify(
    pack: str | os.PathLike[str],
    level: str = "full",
    progress: Progress | None = None,
    workers: int | None = None,
) -> list[Finding]:
    """Check a pack; an empty list means it is whole.

    ``level``: ``"quick"`` checks structure, sizes, headers and digest tables; ``"full"`` every byte.
    Raises ``NotAPackError`` if there is no manifest, ``VersionError`` if the pack is too new to judge.
    """
    if level not in ("quick", "full"):
        raise UsageError(f"level {level!r} is not quick or full")
    folder = Path(pack)
    report = progress or (lambda count: None)
    manifest, findings = _manifest(folder)
    if manifest is None:
        return findings
    findings += _unlisted(folder, manifest)
    layers = {layer.path: layer for layer in manifest.layers}
    dense: dict[str, list[TensorEntry]] = {}
    for t in manifest.tensors:
        dense.setdefault(t.path, []).append(t)

    def check(entry: FileEntry) -> list[Finding]:
        return list(_file(folder, entry, manifest, layers, dense, level == "full", report))

    # Twice the processors: while one thread waits for the drive, another hashes.
    with ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1)) as pool:
        for found in pool.map(check, manifest.files):
            findings += found
    return findings


def bytes_to_check(folder: str | os.PathLike[str]) -> int:
    """How many bytes a full check reads: the total for a progress bar. Raises as ``verify`` does."""
    manifest, _ = _manifest(Path(folder))
    return sum(f.size for f in manifest.files) if manifest else 0


def _manifest(folder: Path) -> tuple[Manifest | None, list[Finding]]:
    """The manifest, if it can be read at all, and what is wrong with it."""
    try:
        return read_manifest(folder)[0], []
    except NotAPackError:
        raise
    except FlashpackError as e:
        path = folder / C.MANIFEST
        raw = path.read_bytes() if path.stat().st_size <= C.MAX_MANIFEST_BYTES else b""
        digest_path = folder / C.MANIFEST_DIGEST
        expected = digest_path.read_bytes()[:65].decode("ascii", "replace").strip() if digest_path.is_file() else ""
        found = hexdigest(raw)
        # Bytes as written, but too new or made by a faulty writer: not damage.
        if found == expected and e.exit_code == FormatError.exit_code:
            raise
        finding = Finding(
            "manifest-digest", C.MANIFEST, "manifest", f"the manifest or its digest file is damaged: {e}",
            offset=0, expected=expected, found=found,
        )  # fmt: skip
        try:
            return Manifest.from_bytes(raw), [finding]
        except FlashpackError:
            return None, [finding]


def _unlisted(folder: Path, manifest: Manifest) -> list[Finding]:
    """Files that the manifest does not know: a pack is exactly what its manifest says."""
    known = {f.path for f in manifest.files} | {C.MANIFEST, C.MANIFEST_DIGEST, C.JOURNAL}
    there = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())
    return [
        Finding("unlisted-file", path, "file", "not listed in the manifest; remove it")
        for path in there
        if path not in known
    ]


def _file(
    folder: Path,
    entry: FileEntry,
    manifest: Manifest,
    layers: dict[str, Layer],
    dense: dict[str, list[TensorEntry]],
    full: bool,
    report: Progress,
) -> Iterator[Finding]:
    path = folder / entry.path
    layer = layers.get(entry.path)
    index = layer.index if layer else None
    if not path.is_file() or path.is_symlink():
        yield Finding("missing-file", entry.path, "file", "missing, or not a plain file", layer=index)
        return
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as e:
        yield Finding("unreadable-file", entry.path, "file", f"cannot be read: {e.strerror}", layer=index)
        return
    try:
        size = os.fstat(fd).st_size
        if size != entry.size:
            yield Finding("size", entry.path, "file", "wrong size", layer=index, expected=entry.size, found=size)
        if layer is not None:
            yield from _shard(fd, entry, ShardLayout(layer, manifest.record_kinds), min(size, entry.size), full, report)
        elif entry.role == "dense":
            yield from _dense(fd, entry, dense.get(entry.path, []), min(size, entry.size), full, report)
        else:
            found = hexdigest_of(chunks(fd, 0, size, entry.path))
            if found != entry.digests["file"]:
                yield Finding(
                    "file-digest", entry.path, "file", "the file is damaged",
                    offset=0, expected=entry.digests["file"], found=found,
                )  # fmt: skip
            report(entry.size)
    except (OSError, FlashpackError) as e:
        yield Finding("unreadable-file", entry.path, "file", f"reading failed: {e}", layer=index)
    finally:
        os.close(fd)


def _shard(
    fd: int, entry: FileEntry, layout: ShardLayout, size: int, full: bool, report: Progress
) -> Iterator[Finding]:
    index = layout.layer.index
    start = len(layout.header_bytes)
    if size >= start:
        header = bytes(pread(fd, start, 0, entry.path))
        if header != layout.header_bytes or hexdigest(header) != entry.digests["header"]:
            yield Finding(
                "header-digest", entry.path, "header", "the header is damaged", layer=index,
                offset=0, expected=entry.digests["header"], found=hexdigest(header),
            )  # fmt: skip
    report(min(start, size))
    if size < layout.size:
        return  # truncated: already reported; the digests at the end are gone
    tail = bytes(pread(fd, layout.size - layout.tail, layout.tail, entry.path))
    if hexdigest(tail) != entry.digests["tail"]:
        yield Finding(
            "tail-digest", entry.path, "digests", "the expert table or the digests are damaged", layer=index,
            offset=layout.tail, expected=entry.digests["tail"], found=hexdigest(tail),
        )  # fmt: skip
    report(len(tail))
    experts = layout.layer.experts
    stored = [tail[len(tail) - (experts - e) * C.DIGEST_BYTES :][: C.DIGEST_BYTES] for e in range(experts)]
    try:
        table = layout.table(tail)
    except FormatError as e:
        yield Finding("expert-table", entry.path, "table", str(e), layer=index, offset=layout.tail)
        return
    if not full:
        return
    buffer = memoryview(bytearray(max(layout.kinds[k].stride for k, _ in layout.layer.kinds)))
    for expert, (kind, row) in enumerate(table):
        offset, stride = layout.extent(int(kind), int(row))
        record = buffer[:stride]
        pread_into(fd, record, offset, entry.path)
        found = hexdigest(record)
        if found != stored[expert].hex():
            yield Finding(
                "record-digest", entry.path, "record", "the expert's record is damaged", layer=index,
                expert=expert, offset=offset, expected=stored[expert].hex(), found=found,
            )  # fmt: skip
        report(stride)


def _dense(
    fd: int, entry: FileEntry, tensors: list[TensorEntry], size: int, full: bool, report: Progress
) -> Iterator[Finding]:
    start = min((t.offset for t in tensors), default=entry.size)
    if size >= start:
        header = bytes(pread(fd, start, 0, entry.path))
        if hexdigest(header) != entry.digests["header"]:
            yield Finding(
                "header-digest", entry.path, "header", "the header is damaged",
                offset=0, expected=entry.digests["header"], found=hexdigest(header),
            )  # fmt: skip
        else:
            yield from _dense_structure(header, entry, tensors)
    report(min(start, size))
    end = start
    for t in sorted(tensors, key=lambda t: t.offset):
        yield from _padding(fd, entry, end, min(t.offset, size))
        report(max(0, min(t.offset, size) - end))
        end = t.offset + t.nbytes
        if end > size:
            yield Finding(
                "truncated-tensor", entry.path, "tensor", "the tensor is cut off", tensor=t.name, offset=t.offset
            )
            return
        if full:
            hashed = hasher()
            for piece in chunks(fd, t.offset, t.nbytes, entry.path):
                hashed.update(piece)
                report(len(piece))
            if hashed.hexdigest() != t.digest:
                yield Finding(
                    "tensor-digest", entry.path, "tensor", "the tensor is damaged", tensor=t.name,
                    offset=t.offset, expected=t.digest, found=hashed.hexdigest(),
                )  # fmt: skip


def _dense_structure(header: bytes, entry: FileEntry, tensors: list[TensorEntry]) -> Iterator[Finding]:
    """An undamaged header must still say what the manifest says."""
    try:
        parsed = parse_header(header[8:], entry.size, entry.path)
    except FormatError as e:
        yield Finding("header", entry.path, "header", str(e), offset=0)
        return
    listed = {(t.name, t.dtype, t.shape, t.offset) for t in tensors}
    there = {(t.name, t.dtype, t.shape, t.offset) for t in parsed.tensors if not t.hidden}
    for name, *_ in sorted(listed ^ there):
        yield Finding("header", entry.path, "header", "header and manifest disagree", tensor=name, offset=0)


def _padding(fd: int, entry: FileEntry, start: int, end: int) -> Iterator[Finding]:
    if end > start and any(pread(fd, end - start, start, entry.path)):
        yield Finding("padding", entry.path, "padding", "bytes that must be zero are not", offset=start)
