"""How a record is stored: as it is, or as one zstd frame (SPEC.md section 5).

A frame is read only after its digest has been checked, and never decodes to another size than its record's.
"""

from __future__ import annotations

import zstandard

from flashpack.errors import FormatError, LimitError
from flashpack.formats import constants as C
from flashpack.formats.records import align

ZSTD_LEVEL = 3
"""Measured on 4-bit experts: higher levels cost several times the time and save next to nothing."""


def compress(record: memoryview) -> bytes | memoryview:
    """One frame for ``record``, or the record itself where a frame would not save a page.

    The stored size tells them apart: a record stored as it is has its own size.
    """
    frame = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True, write_checksum=False).compress(record)
    return frame if align(len(frame), C.PAGE) < len(record) else record


def decode(stored: memoryview, record: memoryview, what: str) -> None:
    """Fill ``record`` from its ``stored`` bytes (without their padding); raises ``FormatError`` if they do not fit."""
    record[:] = content(stored, len(record), what)


def content(stored: memoryview, size: int, what: str) -> memoryview | bytes:
    """The record of ``size`` bytes that ``stored`` holds; raises ``FormatError`` if it holds another.

    Memory is taken for ``size`` only, whatever the frame claims, and only if its header claims this. The record may
    still be too large for this machine: ``LimitError``.
    """
    if len(stored) == size:
        return stored
    try:
        frame = zstandard.get_frame_parameters(stored)
        if frame.dict_id:
            raise FormatError(f"{what}: the frame needs a dictionary")
        if frame.content_size != size:
            raise FormatError(f"{what}: the frame holds {frame.content_size} bytes, the record {size}")
        data = zstandard.ZstdDecompressor().decompress(stored, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise FormatError(f"{what}: not a zstd frame: {e}") from e
    except MemoryError as e:
        raise LimitError(f"{what}: not enough memory for a record of {size} bytes") from e
    if len(data) != size:
        raise FormatError(f"{what}: the frame decodes to {len(data)} bytes, the record has {size}")
    return data
