"""Routing files: which experts each token of some text used, layer by layer, and how the store was asked for them.

A safetensors file, described in docs/tracing.md; tokens are in the order in which the model took them:

| tensor | type, shape | |
|---|---|---|
| ``record_bytes`` | U32 [layers, experts] | what each expert takes in memory; 0 behind the last one of a layer |
| ``tokens`` | I32 [tokens] | token ids |
| ``positions`` | I32 [tokens] | places in the context, which begins anew at 0 |
| ``steps`` | I32 [tokens] | number of the pass that took the token, from 0 on: one token, or a chunk of a prompt |
| ``weights`` | F16 [tokens, layers, top_k] | those of ``experts``, as the router gave them, descending |
| ``experts`` | U8 or U16 [tokens, layers, top_k] | numbers within the layer; the type's largest is none |
| ``prompt`` | BOOL [tokens] | whether the token was part of a prompt |

The metadata names the pack and its architecture, the layers (numbers in the model, in JSON), what was recorded, and
``run``, what the recorded run had and found; ``digest`` is the BLAKE3 digest of all bytes behind the header.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashpack.errors import FormatError, OutputError, SourceError, VersionError
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest, hexdigest_of
from flashpack.formats.dtypes import NUMPY
from flashpack.formats.files import chunks, make_folder, output_errors, pread, write_durably
from flashpack.formats.header import Header, TensorSpec, build_header, parse_json, read_header

KIND = "routing"
"""What the metadata's entry "flashpack" says."""

VERSION = 1

_MADE_BY = "flashpack trace PACK makes such a file"
_MAX_ARCHIVE_BYTES = 2**31
"""Of an array in an .npz file, which may say of itself that it is much larger than the file."""


@dataclass(frozen=True)
class RecordedRun:
    """What the run had that was recorded: ``slots`` of each record size, bytes of the process beside them (``beside``),
    and how many requests for an expert found it in memory (``hits``) or not (``misses``)."""

    slots: dict[int, int]
    beside: int
    hits: int
    misses: int

    def to_json(self) -> dict[str, Any]:
        slots = {str(stride): count for stride, count in self.slots.items()}
        return {"slots": slots, "beside": self.beside, "hits": self.hits, "misses": self.misses}


@dataclass(frozen=True)
class Routing:
    """Arrays as in the file (see above), ``layers`` the layers' numbers in the model.

    ``about``: what else the metadata says. ``run``: None where no run of ours was recorded. Raises ``FormatError`` if
    arrays do not fit each other or a token has an expert twice, or one that is not there.
    """

    layers: tuple[int, ...]
    record_bytes: NDArray[np.uint32]
    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    steps: NDArray[np.int32]
    weights: NDArray[np.float16]
    experts: NDArray[np.unsignedinteger[Any]]
    prompt: NDArray[np.bool_]
    run: RecordedRun | None = None
    about: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def none(self) -> int:
        """What stands in ``experts`` for no expert."""
        return int(np.iinfo(self.experts.dtype).max)

    @property
    def top_k(self) -> int:
        return int(self.experts.shape[2])

    @property
    def sized(self) -> bool:
        """Whether ``record_bytes`` are bytes; if not, they are 1, for experts of unknown size."""
        return int(self.record_bytes.max()) >= C.PAGE

    def stride_counts(self) -> dict[int, int]:
        """Number of experts by record size."""
        sizes, counts = np.unique(self.record_bytes[self.record_bytes > 0], return_counts=True)
        return dict(zip(sizes.tolist(), counts.tolist(), strict=True))


def _check(r: Routing) -> None:
    if r.experts.ndim != 3 or not all(r.experts.shape) or r.experts.dtype not in (np.uint8, np.uint16):
        raise FormatError(f"experts are {r.experts.dtype} {list(r.experts.shape)}, not uint8 [tokens, layers, top_k]")
    tokens, layers, _ = r.experts.shape
    expected: dict[str, tuple[NDArray[Any], str, tuple[int, ...]]] = {
        "record_bytes": (r.record_bytes, "u4", (layers, *r.record_bytes.shape[1:])),
        "tokens": (r.tokens, "i4", (tokens,)),
        "positions": (r.positions, "i4", (tokens,)),
        "steps": (r.steps, "i4", (tokens,)),
        "weights": (r.weights, "f2", r.experts.shape),
        "prompt": (r.prompt, "?", (tokens,)),
    }
    for name, (array, dtype, shape) in expected.items():
        if array.dtype != np.dtype(dtype) or array.shape != shape:
            raise FormatError(f"{name} are {array.dtype} {list(array.shape)}, not {np.dtype(dtype)} {list(shape)}")
    if r.record_bytes.ndim != 2 or not 0 < r.record_bytes.shape[1] <= r.none:
        raise FormatError(f"record_bytes are of shape {list(r.record_bytes.shape)}, not [layers, experts]")
    if len(r.layers) != layers or any(b <= a for a, b in zip((-1, *r.layers), r.layers, strict=False)):
        raise FormatError(f"{len(r.layers)} numbers of layers, ascending, for {layers} layers of experts")
    counts = (r.record_bytes > 0).sum(1)
    if not counts.all() or any(not row[:count].all() for row, count in zip(r.record_bytes, counts, strict=True)):
        raise FormatError("record_bytes has a layer without experts, or with a gap between them")
    _check_order(r)
    for at, count in enumerate(counts.tolist()):
        chosen = np.sort(r.experts[:, at], axis=1)
        there = chosen != r.none
        if (chosen[there] >= count).any():
            raise FormatError(f"layer {r.layers[at]} has {count} experts; a token uses expert {chosen[there].max()}")
        if ((chosen[:, 1:] == chosen[:, :-1]) & there[:, 1:]).any():
            raise FormatError(f"layer {r.layers[at]}: a token uses the same expert twice")
        if not np.isfinite(r.weights[:, at]).all():
            raise FormatError(f"layer {r.layers[at]}: a weight is not a number")


def _check_order(r: Routing) -> None:
    """Steps count up from 0, and a token that was decoded has one of its own."""
    same = np.diff(r.steps, prepend=np.int32(-1)) == 0
    next_ = np.diff(r.steps, prepend=np.int32(-1)) == 1
    if not (same | next_).all() or (same & ~(r.prompt & np.roll(r.prompt, 1))).any():
        raise FormatError("steps do not count up from 0, or a decoded token is not a step of its own")
    if (r.positions < 0).any() or (r.tokens < 0).any():
        raise FormatError("a position or a token is negative")


def _specs(r: Routing) -> dict[str, tuple[TensorSpec, NDArray[Any]]]:
    """The widest types first, so that each array starts at a multiple of its type's size."""
    kind = "U8" if r.experts.dtype == np.uint8 else "U16"
    types = {"record_bytes": "U32", "tokens": "I32", "positions": "I32", "steps": "I32", "weights": "F16",
             "experts": kind, "prompt": "BOOL"}  # fmt: skip
    return {name: (TensorSpec(name, dtype, getattr(r, name).shape), getattr(r, name)) for name, dtype in types.items()}


def check_new(path: Path, overwrite: bool) -> None:
    """Raise ``OutputError`` if there is something at ``path`` that must not be replaced."""
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{path}: exists already; use --overwrite, or another name")


def write_routing(path: Path, routing: Routing, overwrite: bool = False) -> str:
    """Write a routing file; returns the BLAKE3 digest of its header, which stands for the file.

    Raises ``OutputError`` if there is such a file, unless ``overwrite``, or if it cannot be written.
    """
    check_new(path, overwrite)
    specs = _specs(routing)
    data = b"".join(np.ascontiguousarray(array).tobytes() for _, array in specs.values())
    facts = {
        "flashpack": KIND,
        "version": str(VERSION),
        "layers": json.dumps(routing.layers),
        "digest": hexdigest(data),
    }
    if routing.run is not None:
        facts["run"] = json.dumps(routing.run.to_json())
    header, _ = build_header([spec for spec, _ in specs.values()], routing.about | facts, str(path))
    with output_errors(path):
        make_folder(path.parent)
    write_durably(path.parent, path.name, header + data, C.PARTIAL_SUFFIX)
    return hexdigest(header)


def read_routing(path: str | os.PathLike[str]) -> Routing:
    """Read a routing file, or an .npz file with ``experts`` and perhaps ``weights`` [tokens, layers, top_k].

    An .npz file does not say how many experts there are (the largest number is taken for the last one), how large they
    are, or where prompts were: every token is taken as decoded. Raises ``SourceError`` if there is no such file,
    ``FormatError`` if it is damaged or none of these, ``VersionError`` if it needs a newer flashpack.
    """
    what = str(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        raise SourceError(f"{what}: {e.strerror}; {_MADE_BY}") from e
    try:
        size = os.fstat(fd).st_size
        if pread(fd, min(size, 4), 0, what) == b"PK\x03\x04":
            return _read_archive(path, what)
        return _read(fd, size, what)
    except OSError as e:
        raise SourceError(f"{what}: {e.strerror}; {_MADE_BY}") from e
    finally:
        os.close(fd)


def _read(fd: int, size: int, what: str) -> Routing:
    try:
        header = read_header(lambda count, offset: pread(fd, count, offset, what), size, what)
    except FormatError as e:
        raise FormatError(f"{e}; {_MADE_BY}") from e
    facts = dict(header.metadata)
    if facts.pop("flashpack", None) != KIND:
        raise FormatError(f"{what}: not a routing file; {_MADE_BY}")
    version = facts.pop("version", "")
    if version != str(VERSION):
        raise VersionError(f"{what}: version {version[:20]!r} of routing files; this flashpack reads {VERSION}")
    arrays = _arrays(fd, header, what)
    run = parse_json(facts.pop("run", "null").encode(), f"{what}: run", floats=False)
    layers = parse_json(facts.pop("layers", "null").encode(), f"{what}: layers", floats=False)
    if not isinstance(layers, list) or not all(_is_count(n) for n in layers):
        raise FormatError(f"{what}: layers are not a list of numbers")
    digest = hexdigest_of(chunks(fd, header.data_start, size - header.data_start, what))
    if facts.pop("digest", "") != digest:
        raise FormatError(f"{what}: damaged; {_MADE_BY}")
    try:
        routing = Routing(tuple(layers), **arrays, run=_run(run), about=facts)
    except FormatError as e:
        raise FormatError(f"{what}: {e}") from e
    if routing.run and set(routing.run.slots) != set(routing.stride_counts()):
        raise FormatError(f"{what}: the recorded run has slots of other sizes than the experts")
    return routing


def _arrays(fd: int, header: Header, what: str) -> dict[str, Any]:
    """The arrays, mapped; their shapes are checked where they are put together."""
    types = {"record_bytes": ("U32",), "tokens": ("I32",), "positions": ("I32",), "steps": ("I32",),
             "weights": ("F16",), "experts": ("U8", "U16"), "prompt": ("BOOL",)}  # fmt: skip
    found = {t.name: t for t in header.tensors if not t.hidden}
    if set(found) != set(types) or any(t.dtype not in types[name] for name, t in found.items()):
        raise FormatError(f"{what}: its tensors are not those of a routing file; {_MADE_BY}")
    mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    arrays: dict[str, Any] = {name: np.ndarray(t.shape, NUMPY[t.dtype], mapped, t.offset) for name, t in found.items()}
    if (arrays["prompt"] > 1).any():
        raise FormatError(f"{what}: prompt holds other values than 0 and 1")
    arrays["prompt"] = arrays["prompt"].astype(np.bool_)
    return arrays


def _run(data: Any) -> RecordedRun | None:
    if data is None:
        return None
    if isinstance(data, dict) and set(data) == {"slots", "beside", "hits", "misses"}:
        slots, *numbers = (data[key] for key in ("slots", "beside", "hits", "misses"))
        if isinstance(slots, dict) and all(_is_count(n) for n in (*numbers, *slots.values())):
            strides = [int(stride) for stride in slots if stride.isascii() and stride.isdecimal() and len(stride) < 12]
            if len(strides) == len(slots):
                return RecordedRun(dict(zip(strides, slots.values(), strict=True)), *numbers)
    raise FormatError("run has other fields than slots, beside, hits and misses, or no numbers there")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < C.MAX_INTEGER


def _read_archive(path: str | os.PathLike[str], what: str) -> Routing:
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {name: _archived(archive, f"{name}.npy") for name in ("experts", "weights")}
    except OSError:
        raise
    except Exception as e:  # zipfile, zlib and numpy raise many kinds for damaged files
        raise FormatError(f"{what}: not a sound .npz file of arrays: {e or type(e).__name__}".splitlines()[0]) from e
    experts, weights = arrays["experts"], arrays["weights"]
    if experts is None or experts.dtype.kind not in "iu" or experts.ndim != 3 or not experts.size:
        raise FormatError(f"{what}: an .npz file of routing has integers `experts` [tokens, layers, top_k]")
    if weights is not None and (weights.dtype.kind != "f" or weights.shape != experts.shape):
        raise FormatError(f"{what}: `weights` are {weights.dtype} {list(weights.shape)}, not floats like `experts`")
    first, last = int(experts.min()), int(experts.max())
    if first < 0 or last >= C.MAX_EXPERTS - 1:
        raise FormatError(f"{what}: `experts` are from {first} to {last}; numbers of experts begin at 0")
    tokens, layers, _ = experts.shape
    count = np.arange(tokens, dtype=np.int32)
    try:
        return Routing(
            tuple(range(layers)),
            np.ones((layers, last + 1), np.uint32),
            np.zeros(tokens, np.int32),
            count,
            count,
            np.zeros(experts.shape, np.float16) if weights is None else weights.astype(np.float16),
            experts.astype(np.uint8 if last < 255 else np.uint16),
            np.zeros(tokens, np.bool_),
        )
    except FormatError as e:
        raise FormatError(f"{what}: {e}") from e


def _archived(archive: zipfile.ZipFile, name: str) -> NDArray[Any] | None:
    """An array of an .npz file, None if there is none of this name; numpy makes no objects of bytes.

    Raises ``ValueError`` before memory is taken for more than the archive has.
    """
    if name not in archive.namelist():
        return None
    size = archive.getinfo(name).file_size
    if size > _MAX_ARCHIVE_BYTES:
        raise ValueError(f"{name} has {size} bytes, more than {_MAX_ARCHIVE_BYTES}")
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} is of version {version}")
        formats = np.lib.format
        read = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
        shape, fortran, dtype = read(member)
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size:
            raise ValueError(f"{name} is {dtype} {list(shape)} in {size} bytes")
        data = member.read()
    return np.frombuffer(data, dtype, math.prod(shape)).reshape(shape, order="F" if fortran else "C")
