"""A pack's quality report in a few lines. A stranger may have written it: only numbers and known words are taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flashpack.errors import FormatError
from flashpack.formats import Pack
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.header import parse_json


def quality_lines(pack: Pack) -> Iterator[str]:
    """Bits, errors, and where the page lies; nothing for a pack without a report."""
    entry = pack.files.get(C.QUALITY)
    if entry is None or entry.role != "copy":
        return
    try:
        if entry.size > C.MAX_MANIFEST_BYTES:
            raise FormatError(f"{C.QUALITY}: larger than {C.MAX_MANIFEST_BYTES} bytes")
        with open(pack.open(entry.path), "rb") as f:
            data = f.read()
        if hexdigest(data) != entry.digests["file"]:
            raise FormatError(f"{C.QUALITY}: damaged")
        lines = list(_told(parse_json(data, C.QUALITY)))
    except FormatError as e:
        lines = [str(e)]
    yield f"quality    {lines[0]}"
    yield from (f"  {line}" for line in lines[1:])
    if C.QUALITY_PAGE in pack.files:
        yield f"  page: {pack.folder / C.QUALITY_PAGE}"


def _told(report: Any) -> Iterator[str]:
    """What a report says, line by line; raises ``FormatError`` if it is none."""
    match report:
        case {
            "sizes": {
                "experts": {"bits": float(experts), "padded_bits": float(padded)},
                "dense": {"bits": float(dense), "padded_bits": float(padded_dense)},
            },
            "summary": list(rows),
            "layers": list(layers),
        }:
            yield f"{experts:.4g} bits per weight of the experts, {padded:.4g} with padding"
            yield f"{dense:.4g} bits per weight of the dense part, {padded_dense:.4g} with padding"
        case _:
            raise FormatError(f"{C.QUALITY}: not a report that this version reads")
    rounded = False
    for row in rows:
        match row:
            case {"part": "gate" | "up" | "down" | "dense" as part, "mean": float(mean), "max": float(largest)}:
                rounded = True
                weighted = row.get("weighted")
                given = f"; of what it gives {_percent(weighted)}" if isinstance(weighted, float) else ""
                yield f"{part:<5} mean error {_percent(mean)}, largest {_percent(largest)}{given}"
    if not rounded:
        yield "nothing was rounded: every value is the source's own"
    worst = [(mean, index) for layer in layers for mean, index in _mean(layer)]
    if worst:
        mean, index = max(worst)
        yield f"worst layer {index}: mean error {_percent(mean)}"


def _mean(layer: Any) -> Iterator[tuple[float, int]]:
    match layer:
        case {"index": int(index), "mean": float(mean)} if 0 <= index < C.MAX_LAYERS:
            yield mean, index


def _percent(error: float) -> str:
    return f"{100 * error:.3g} %"
