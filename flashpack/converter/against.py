"""``verify --against``: is this pack what its source and recipe give? Nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from flashpack.converter.execute import default_workers
from flashpack.converter.folder import Source
from flashpack.converter.plan import DensePlan
from flashpack.converter.remake import Remake
from flashpack.converter.units import Progress
from flashpack.formats import Finding, Pack
from flashpack.formats import constants as C
from flashpack.formats.checksums import digest, hasher, hexdigest
from flashpack.formats.entries import Layer


def against(
    pack: str | os.PathLike[str],
    src: Source,
    on_start: Callable[[int], object] | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> list[Finding]:
    """Make every record, tensor and copied file again from ``src`` and compare digests; empty: the pack is proven.

    The pack's bytes are not read here: ``formats.verify`` compares them with the same digests. The page of the quality
    report is left out: another version may draw the same numbers otherwise. ``on_start`` is called with the source
    bytes to read, ``progress`` with those that are done.

    Raises ``UnsupportedError`` for a recipe that is not reproducible, ``SourceError`` for another model's source.
    """
    opened = Pack(pack)
    remake = Remake(src, opened.manifest)
    report = progress or (lambda count: None)
    if on_start:
        on_start(sum(remake.plan.source_bytes().values()))
    entries = {t.name: t for t in opened.manifest.tensors}

    def layer(entry: Layer) -> Iterator[Finding]:
        with opened.open_shard(entry) as shard:
            contents, offsets = shard.tail.contents, shard.tail.offsets
        for expert, expected in enumerate(contents):
            found = digest(remake.record(entry, expert, report))
            if found != expected:
                yield Finding(
                    "source-record", entry.path, "record", "the source gives another record", entry.index,
                    expert, offset=offsets[expert], expected=expected.hex(), found=found.hex(),
                )  # fmt: skip

    def dense(work: DensePlan) -> Iterator[Finding]:
        hashes = {name: hasher() for name in work.tensor_names().values()}
        for name, data in remake.dense(work):
            hashes[name].update(data)
        report(work.source.nbytes)
        for name, hashed in hashes.items():
            entry, found = entries[name], hashed.hexdigest()
            if found != entry.digest:
                yield Finding(
                    "source-tensor", entry.path, "tensor", "the source gives another tensor", tensor=name,
                    offset=entry.offset, expected=entry.digest, found=found,
                )  # fmt: skip

    try:
        with ThreadPoolExecutor(workers or default_workers()) as pool:
            jobs = [pool.submit(lambda x: list(layer(x)), entry) for entry in opened.manifest.layers]
            jobs += [pool.submit(lambda x: list(dense(x)), work) for work in remake.plan.dense()]
            try:
                findings = [finding for job in jobs for finding in job.result()]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return findings + list(_copies(opened, remake))
    finally:
        remake.close()


def _copies(pack: Pack, remake: Remake) -> Iterator[Finding]:
    listed = {f.path: f.digests["file"] for f in pack.manifest.files if f.role == "copy"}
    for name in sorted({*listed, *remake.plan.copies} - {C.QUALITY_PAGE}):
        data, expected = remake.copied(name), listed.get(name)
        found = None if data is None else hexdigest(data)
        if found != expected:
            what = "the source gives another report" if name == C.QUALITY else "the source has another file"
            yield Finding("source-copy", name, "file", what, offset=0, expected=expected, found=found)
