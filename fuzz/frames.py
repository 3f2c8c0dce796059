"""Frames that zstandard makes, and some that it would not."""

from __future__ import annotations

import zstandard

_MAGIC = b"\x28\xb5\x2f\xfd"
_LARGEST_BLOCK = 128 * 1024
RECORD = bytes(range(256)) * 64
SHORT = bytes(3) + b"expert" * 20 + bytes(16384)


def zeros(count: int, stated: int | None = None, window_log: int | None = None, dictionary: int = 0) -> bytes:
    """A frame of 4 bytes for each 128 KiB of zeros, whose header states ``stated`` bytes, a window, a dictionary."""
    single = window_log is None
    head = bytes([3 << 6 | single << 5 | (3 if dictionary else 0)])
    if window_log is not None:
        head += bytes([window_log - 10 << 3])
    if dictionary:
        head += dictionary.to_bytes(4, "little")
    head += (count if stated is None else stated).to_bytes(8, "little")
    sizes = [_LARGEST_BLOCK] * (count // _LARGEST_BLOCK) + [count % _LARGEST_BLOCK]
    blocks = [(n << 3 | 1 << 1 | (i == len(sizes) - 1)).to_bytes(3, "little") + b"\0" for i, n in enumerate(sizes)]
    return _MAGIC + head + b"".join(blocks)


def _compressed(data: bytes, size: bool = True, checksum: bool = False) -> bytes:
    return zstandard.ZstdCompressor(level=3, write_content_size=size, write_checksum=checksum).compress(data)


GOOD: dict[str, tuple[bytes, bytes]] = {
    "plain": (RECORD, _compressed(RECORD)),
    "short": (SHORT, _compressed(SHORT)),
    "uncompressed": (RECORD, RECORD),
    "zeros": (bytes(65536), _compressed(bytes(65536))),
    "checksum": (RECORD, _compressed(RECORD, checksum=True)),
    "huge-window": (bytes(16384), zeros(16384, window_log=27)),
}
"""A record and a stored form of it."""

_SIZE = len(RECORD)
_HALVES = _compressed(RECORD[: _SIZE // 2]) + _compressed(RECORD[_SIZE // 2 :])
_DICTIONARY = zstandard.ZstdCompressionDict(RECORD[:512], dict_type=zstandard.DICT_TYPE_RAWCONTENT)

BAD: dict[str, bytes] = {
    "no-size": _compressed(RECORD, size=False),
    "states-more": _compressed(RECORD + b"x"),
    "states-less": _compressed(RECORD[1:]),
    "states-an-exabyte": zeros(_SIZE, stated=2**60),
    "holds-more": zeros(_SIZE + 1, stated=_SIZE),
    "holds-a-gigabyte": zeros(2**30, stated=_SIZE),
    "holds-less": zeros(_SIZE - 1, stated=_SIZE),
    "holds-nothing": zeros(0, stated=_SIZE),
    "two-frames": _HALVES,
    "empty-frame-behind": _compressed(RECORD) + zeros(0),
    "trailer": _compressed(RECORD) + b"x",
    "truncated": _compressed(RECORD)[:-3],
    "names-a-dictionary": zeros(_SIZE, dictionary=7),
    "needs-a-dictionary": zstandard.ZstdCompressor(dict_data=_DICTIONARY).compress(RECORD),
    "skippable-before": b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + _compressed(RECORD),
    "skippable-behind": _compressed(RECORD) + b"\x50\x2a\x4d\x18\x04\0\0\0abcd",
    "skippable-of-the-size": b"\x50\x2a\x4d\x18" + _SIZE.to_bytes(4, "little") + bytes(99),
    "huge-window-truncated": zeros(_SIZE, window_log=27)[:-1],
    "enormous-window": zeros(_SIZE - 1, stated=_SIZE, window_log=41),
    "old-version": b"\x27\xb5\x2f\xfd" + _compressed(RECORD)[4:],
    "no-checksum-where-one-is-stated": _compressed(RECORD, checksum=True)[:-4],
    "wrong-checksum": _compressed(RECORD, checksum=True)[:-4] + b"abcd",
}
"""Stored bytes that are no form of ``RECORD`` (nor of any record of its size)."""
