"""Headers of safetensors files: a strict parser for reading, and a builder whose data starts on a page.

Stricter than the safetensors library in what it must never accept (duplicate keys, unknown fields, gaps), so it
runs before any other parser sees a file, on writing as on reading. The format: 8 bytes little-endian header
length N, N bytes JSON, data; https://github.com/huggingface/safetensors describes it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashpack.errors import FormatError
from flashpack.formats import constants as C
from flashpack.formats.dtypes import ITEMSIZE
from flashpack.formats.records import align


@dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file; ``offset`` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def hidden(self) -> bool:
        """A gap filler of a pack file, not a tensor of the model."""
        return self.name.startswith(C.PAD_PREFIX)


@dataclass(frozen=True)
class Header:
    """A parsed header: ``data_start`` is the size of length field and JSON, ``size`` that of the whole file."""

    metadata: dict[str, str]
    tensors: tuple[Tensor, ...]
    data_start: int
    size: int


def parse_json(data: bytes | bytearray, what: str, floats: bool = True) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or infinity, no half surrogate pairs; on demand no fractions."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise FormatError(f"{what}: a JSON object has a key twice")
        return keys

    def constant(name: str) -> Any:
        raise FormatError(f"{what}: JSON holds {name}")

    def fraction(text: str) -> float:
        if not floats:
            raise FormatError(f"{what}: {text[:40]} is not an integer")
        value = float(text)
        return value if math.isfinite(value) else constant(text[:40])

    try:
        text = bytes(data).decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_float=fraction)
        if "\\ud" in text or "\\uD" in text:  # half a pair cannot be written as UTF-8: not a name, not printable
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{what}: not valid JSON: {e}") from e
    return value


def read_header(read: Callable[[int, int], bytes | bytearray], size: int, what: str) -> Header:
    """Parse and check the header of a safetensors file of ``size`` bytes, of which ``read(count, offset)`` gives
    some; ``what`` names the file in errors."""
    if size < 8:
        raise FormatError(f"{what}: {size} bytes are too few for a safetensors file")
    length = int.from_bytes(read(8, 0), "little")
    if length > min(size - 8, C.MAX_HEADER_BYTES):
        start = bytes(read(min(size, 40), 0))
        if start.startswith(b"version https://git-lfs"):
            raise FormatError(f"{what}: a Git LFS pointer, not the file itself; run 'git lfs pull'")
        raise FormatError(f"{what}: truncated or not a safetensors file (header of {length} bytes, file of {size})")
    return parse_header(read(length, 8), size, what)


def parse_header(text: bytes | bytearray, size: int, what: str) -> Header:
    """Check a header's JSON against the size of its file: every byte of data belongs to exactly one tensor."""
    if not text.startswith(b"{"):
        raise FormatError(f"{what}: the header is not a JSON object; not a safetensors file")
    fields = parse_json(text, what)
    data_start = 8 + len(text)
    metadata = fields.pop("__metadata__", {})
    if metadata is None:  # as MLX writes it where there is none
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{what}: __metadata__ is not a map of strings")
    tensors = sorted(
        (_tensor(name, field, data_start, what) for name, field in fields.items()),
        key=lambda t: (t.offset, t.nbytes),
    )
    end = data_start
    for t in tensors:
        if t.offset != end:
            raise FormatError(f"{what}: tensor {t.name} starts at {t.offset}, the one before ends at {end}")
        end += t.nbytes
    if end != size:
        kind = "truncated" if end > size else "too long"
        raise FormatError(f"{what}: {kind}: the header describes {end} bytes, the file has {size}")
    return Header(metadata, tuple(tensors), data_start, size)


def _tensor(name: str, field: Any, data_start: int, what: str) -> Tensor:
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{what}: tensor {name}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise FormatError(f"{what}: tensor {name}: type {dtype!r} is unknown")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not all(type(n) is int and 0 <= n < 2**62 for n in numbers) or len(offsets) != 2:
        raise FormatError(f"{what}: tensor {name}: shape or data_offsets are not lists of sizes")
    if len(shape) > C.MAX_DIMENSIONS:  # before they are multiplied: the product of a million sizes takes minutes
        raise FormatError(f"{what}: tensor {name}: {len(shape)} dimensions are more than {C.MAX_DIMENSIONS}")
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    begin, end = offsets
    if end - begin != nbytes:
        raise FormatError(f"{what}: tensor {name}: {end - begin} bytes for shape {shape} of {dtype}")
    return Tensor(name, dtype, tuple(shape), data_start + begin, nbytes)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its alignment says on which multiple of bytes its data must start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    alignment: int = 1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def build_header(specs: list[TensorSpec], metadata: dict[str, str], what: str) -> tuple[bytes, Header]:
    """Lay tensors out in the given order and return the header's bytes and its parsed form.

    Gaps before aligned tensors become zeroed U8 tensors ``__pad__.N``; the JSON is padded with spaces so that
    data starts on a page.
    """
    fields: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for spec in specs:
        start = align(offset, spec.alignment)
        if start > offset:
            pad = f"{C.PAD_PREFIX}{len(fields)}"
            fields[pad] = {"dtype": "U8", "shape": [start - offset], "data_offsets": [offset, start]}
        offset = start + spec.nbytes
        if spec.name in fields or re.match(re.escape(C.PAD_PREFIX), spec.name):
            raise FormatError(f"{what}: tensor name {spec.name!r} is taken")
        fields[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, offset]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=True).encode()
    text = text.ljust(align(8 + len(text), C.PAGE) - 8)
    header = parse_header(text, 8 + len(text) + offset, what)
    return len(text).to_bytes(8, "little") + text, header
