"""Fields of parsed JSON that nobody has vouched for: each accessor returns the type it promises or refuses."""

from __future__ import annotations

import re
from typing import Any

from flashpack.errors import FormatError
from flashpack.formats import constants as C

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def mapping(value: Any, what: str) -> dict[str, Any]:
    """``value`` if it is a JSON object."""
    if not isinstance(value, dict):
        raise FormatError(f"{C.MANIFEST}: {what} is not an object")
    return value


def items(data: dict[str, Any], key: str) -> list[Any]:
    """A field that is a list."""
    value = data.get(key)
    if not isinstance(value, list):
        raise FormatError(f"{C.MANIFEST}: {key} is missing or not a list")
    return value


def text(data: dict[str, Any], key: str) -> str:
    """A field that is a string of 1 to 1,024 bytes without control characters."""
    value = data.get(key)
    if not isinstance(value, str) or not 0 < len(value.encode()) <= C.MAX_NAME_BYTES or _CONTROL.search(value):
        raise FormatError(f"{C.MANIFEST}: {key} is missing or not a printable string")
    return value


def integer(data: dict[str, Any], key: str) -> int:
    """A field that is an integer from 0 to 2**62 - 1 (``true`` is none)."""
    return whole(data.get(key), key)


def whole(value: Any, what: str) -> int:
    """``value`` if it is an integer from 0 to 2**62 - 1."""
    if type(value) is not int or not 0 <= value < C.MAX_INTEGER:
        raise FormatError(f"{C.MANIFEST}: {what} is missing or not a size")
    return value


def pair(data: dict[str, Any], key: str) -> tuple[int, int]:
    """A field that is a list of two integers from 0 to 2**62 - 1."""
    numbers = [whole(n, key) for n in items(data, key)]
    if len(numbers) != 2:
        raise FormatError(f"{C.MANIFEST}: {key} is not a list of two numbers")
    return numbers[0], numbers[1]


def shape(data: dict[str, Any]) -> tuple[int, ...]:
    """The field ``shape``: at most ``MAX_DIMENSIONS`` sizes of at least 1."""
    sizes = tuple(whole(n, "shape") for n in items(data, "shape"))
    if len(sizes) > C.MAX_DIMENSIONS or 0 in sizes:
        raise FormatError(
            f"{C.MANIFEST}: shape {list(sizes[: C.MAX_DIMENSIONS + 1])} is empty or has too many dimensions"
        )
    return sizes


def matrix_shape(data: dict[str, Any]) -> tuple[int, int]:
    """The field ``shape`` of a matrix: [out, in]."""
    sizes = shape(data)
    if len(sizes) != 2:
        raise FormatError(f"{C.MANIFEST}: shape {list(sizes)} is not that of a matrix")
    return sizes[0], sizes[1]


def digest(data: dict[str, Any], key: str) -> str:
    """A field that is a digest: 64 lower-case hexadecimal digits."""
    value = data.get(key)
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise FormatError(f"{C.MANIFEST}: {key} is not a digest of 64 hexadecimal digits")
    return value


def path(data: dict[str, Any], key: str) -> str:
    """A field that is a path inside the pack, for no file that the format itself or a program would use.

    Relative, ``/`` between parts, no part empty or starting with a dot, no backslash, colon or control character.
    """
    value = text(data, key)
    parts = value.split("/")
    plain = all(part and not part.startswith(".") and len(part.encode()) <= 255 for part in parts)
    if not plain or "\\" in value or ":" in value or len(value.encode()) > C.MAX_PATH_BYTES:
        raise FormatError(f"{C.MANIFEST}: {value!r} is not a path inside the pack")
    lower = value.lower()
    if lower in (C.MANIFEST, C.MANIFEST_DIGEST, C.JOURNAL) or lower.endswith(C.PARTIAL_SUFFIX):
        raise FormatError(f"{C.MANIFEST}: {value!r} is a name of the format's own")
    if lower.endswith(C.REFUSED_SUFFIXES):
        raise FormatError(f"{C.MANIFEST}: {value!r} is a file that a program would run; a pack holds none")
    return value
