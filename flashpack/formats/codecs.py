"""How a record is stored: as it is, or as one zstd frame (SPEC.md section 5).

A frame is read only after its digest has been checked, and never decodes to another size than its record's.
"""

from __future__ import annotations

import zstandard

from flashpack.errors import FormatError
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
    """Fill ``record`` from its ``stored`` bytes (without their padding); raises ``FormatError`` if they do not fit.

    Memory is taken for the record's size only, whatever the frame claims.
    """
    if len(stored) == len(record):
        record[:] = stored
        return
    try:
        frame = zstandard.get_frame_parameters(stored)
        if frame.content_size != len(record) or frame.dict_id:
            raise FormatError(f"{what}: the frame holds {frame.content_size} bytes, the record {len(record)}")
        data = zstandard.ZstdDecompressor().decompress(stored, max_output_size=len(record), allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise FormatError(f"{what}: not a zstd frame: {e}") from e
    if len(data) != len(record):
        raise FormatError(f"{what}: the frame decodes to {len(data)} bytes, the record has {len(record)}")
    record[:] = data
