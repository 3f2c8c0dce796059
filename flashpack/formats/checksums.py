"""One place for the checksum: BLAKE3, 32 bytes, written as lower-case hexadecimal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from blake3 import blake3


class Hasher(Protocol):
    """What flashpack uses of a BLAKE3 object."""

    def update(self, data: bytes | bytearray | memoryview, /) -> object: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...


def hasher() -> Hasher:
    """A fresh BLAKE3 hash that takes data piece by piece."""
    return blake3()


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """BLAKE3 of ``data``: 32 bytes."""
    return blake3(data).digest()


def hexdigest(data: bytes | bytearray | memoryview) -> str:
    """BLAKE3 of ``data`` as 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def hexdigest_of(chunks: Iterable[bytes | memoryview]) -> str:
    """BLAKE3 of a stream of chunks as 64 hexadecimal digits."""
    h = hasher()
    for chunk in chunks:
        h.update(chunk)
    return h.hexdigest()
