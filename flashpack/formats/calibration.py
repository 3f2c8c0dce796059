"""Calibration files: what a model's experts were given on some text, layer by layer.

A safetensors file. Layer 3 has ``layer-0003.inputs`` BF16 [tokens, hidden], ``layer-0003.experts`` I32 [tokens, top_k],
``layer-0003.weights`` F32 [tokens, top_k] as the router applied them, and ``layer-0003.residual`` F32 [tokens, 1], the
mean square of a token's values behind the layer (0: not known). The metadata names the architecture, the pack that ran
and the texts, and has the BLAKE3 digest of each layer's bytes; so the header's own digest stands for the file.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import shutil
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from flashpack.errors import FormatError, OutputError, SourceError
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest, hexdigest_of
from flashpack.formats.dtypes import NUMPY
from flashpack.formats.files import chunks, create, make_folder, output_errors, pread, publish, pwrite, resize, sync
from flashpack.formats.header import Header, TensorSpec, build_header, read_header

KIND = "calibration"
"""What the metadata's entry "flashpack" says."""

PARTS = {"inputs": "BF16", "experts": "I32", "weights": "F32", "residual": "F32"}
"""Arrays of a layer, in order, and their types."""

_NO_DIGEST = "0" * 2 * C.DIGEST_BYTES
_LAYER = "layer-{:04}"


@dataclass(frozen=True)
class LayerTokens:
    """One layer's tokens: inputs uint16 [tokens, hidden] (the bits of bfloat16), experts int32 and weights float32
    [tokens, top_k], ``residual`` float32 [tokens, 1] as in the file. The arrays are mapped."""

    inputs: NDArray[np.uint16]
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]
    residual: NDArray[np.float32]


def _specs(layers: Mapping[int, tuple[int, int]], tokens: int) -> list[TensorSpec]:
    """``layers``: number -> (hidden, top_k)."""
    specs = []
    for number, (hidden, top_k) in sorted(layers.items()):
        widths = {"inputs": hidden, "experts": top_k, "weights": top_k, "residual": 1}
        for part, dtype in PARTS.items():
            alignment = C.PAGE if part == "inputs" else C.SECTION_ALIGNMENT
            specs.append(TensorSpec(f"{_LAYER.format(number)}.{part}", dtype, (tokens, widths[part]), alignment))
    return specs


def _regions(header: Header) -> dict[int, tuple[int, int]]:
    """Layer -> first byte and number of bytes of its arrays."""
    found: dict[int, tuple[int, int]] = {}
    for t in header.tensors:
        match = re.fullmatch(r"layer-(\d{4,5})\.(\w+)", t.name)
        if match:
            start, _ = found.get(int(match[1]), (t.offset, 0))
            found[int(match[1])] = start, t.offset + t.nbytes - start
    return found


class CalibrationWriter:
    """Writes a calibration file at ``path``; nothing has that name before ``finish``.

    ``layers``: number -> (hidden, top_k). ``about``: what the metadata says beside the digests. To be used in a
    ``with`` statement; raises ``OutputError``.
    """

    def __init__(
        self, path: Path, architecture: str, layers: Mapping[int, tuple[int, int]], tokens: int, about: dict[str, str]
    ) -> None:
        self.path = path
        self._partial = path.with_name(path.name + C.PARTIAL_SUFFIX)
        self._specs = _specs(layers, tokens)
        self._about = {"flashpack": KIND, "architecture": architecture, "tokens": str(tokens)} | about
        digests = {_LAYER.format(n): _NO_DIGEST for n in layers}
        self._header = build_header(self._specs, self._about | digests, str(path))[1]
        self._places = {t.name: t for t in self._header.tensors}
        with output_errors(path):
            make_folder(path.parent)
            free = shutil.disk_usage(path.parent).free
            if self._header.size > free:
                raise OutputError(
                    f"{path}: {self._header.size / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
                    f"take fewer --tokens, or another disk"
                )
            self._fd = create(self._partial, self._partial.parent)
            resize(self._fd, self._header.size)

    def __enter__(self) -> CalibrationWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._partial.unlink(missing_ok=True)

    def write(self, first: int, layer: int, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Some arrays of a layer, by part, for its tokens from number ``first`` on."""
        for part, array in arrays.items():
            place = self._places[f"{_LAYER.format(layer)}.{part}"]
            rows, width = place.shape
            data = np.ascontiguousarray(array)
            if data.dtype != NUMPY[place.dtype] or data.shape[1:] != (width,) or first + len(data) > rows:
                raise ValueError(f"{place.name}: {data.dtype} {data.shape} at {first} in {place.shape}")
            with output_errors(self.path):
                pwrite(self._fd, data.data.cast("B"), place.offset + first * width * data.itemsize)

    def finish(self) -> str:
        """Write the header with the digests, make all durable and give it its name; returns the file's digest."""
        what = str(self.path)
        digests = {
            _LAYER.format(n): hexdigest_of(chunks(self._fd, start, size, what))
            for n, (start, size) in _regions(self._header).items()
        }
        raw, _ = build_header(self._specs, self._about | digests, what)
        with output_errors(self.path):
            pwrite(self._fd, raw, 0)
            sync(self._fd)
            os.close(self._fd)
            self._fd = -1
            publish(self._partial, self.path)
        return hexdigest(raw)


class Calibration:
    """An open calibration file. ``layers``: their numbers; ``metadata`` as in the file.

    Raises ``SourceError`` if there is no such file, ``FormatError`` if it is damaged or none of these.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        what = str(self.path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise SourceError(f"{what}: {e.strerror}; flashpack calibrate makes such a file") from e
        try:
            size = os.fstat(self._fd).st_size
            try:
                header = read_header(lambda count, offset: pread(self._fd, count, offset, what), size, what)
            except FormatError as e:
                raise FormatError(f"{e}; flashpack calibrate makes such a file") from e
            if header.metadata.get("flashpack") != KIND:
                raise FormatError(f"{what}: not a calibration file; flashpack calibrate makes one")
            self.metadata = header.metadata
            self._check(header)
            self.digest = hexdigest(pread(self._fd, header.data_start, 0, what))
        except OSError as e:
            os.close(self._fd)
            raise SourceError(f"{what}: {e.strerror}; flashpack calibrate makes such a file") from e
        except BaseException:
            os.close(self._fd)
            raise
        self._close = weakref.finalize(self, os.close, self._fd)
        self._tensors = {t.name: t for t in header.tensors}
        self._sound: set[int] = set()

    def _check(self, header: Header) -> None:
        """The arrays must be those of ``_specs``, for the layers that have any."""
        tensors = {t.name: t for t in header.tensors if not t.hidden}
        self._places = _regions(header)
        self.layers = sorted(self._places)
        shapes: dict[int, tuple[int, int]] = {}
        with contextlib.suppress(KeyError, ValueError):
            self.tokens = int(self.metadata["tokens"])
            for n in self.layers:
                (_, hidden), (_, top_k) = (
                    tensors[f"{_LAYER.format(n)}.{part}"].shape for part in ("inputs", "experts")
                )
                shapes[n] = hidden, top_k
            specs = {s.name: (s.dtype, s.shape) for s in _specs(shapes, self.tokens)}
            digests = all(re.fullmatch("[0-9a-f]{64}", self.metadata[_LAYER.format(n)]) for n in self.layers)
            if specs == {t.name: (t.dtype, t.shape) for t in tensors.values()} and digests and self.tokens > 0:
                return
        raise FormatError(f"{self.path}: no calibration file of this version; make it again with flashpack calibrate")

    def layer(self, number: int) -> LayerTokens:
        """A layer's tokens; its bytes are compared with their digest the first time."""
        start, size = self._places[number]
        if number not in self._sound:
            if hexdigest_of(chunks(self._fd, start, size, str(self.path))) != self.metadata[_LAYER.format(number)]:
                raise FormatError(f"{self.path}: layer {number} is damaged; make the file again")
            self._sound.add(number)
        mapped = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        arrays = {}
        for part, dtype in PARTS.items():
            t = self._tensors[f"{_LAYER.format(number)}.{part}"]
            arrays[part] = np.ndarray(t.shape, NUMPY[dtype], mapped, t.offset)
        return LayerTokens(arrays["inputs"], arrays["experts"], arrays["weights"], arrays["residual"])

    def width(self, number: int) -> int:
        """Values of a layer's input."""
        return self._tensors[f"{_LAYER.format(number)}.inputs"].shape[1]

    def close(self) -> None:
        """Close the file, as is done when nobody uses it any more; arrays that were given stay valid."""
        self._close()


def open_calibration(path: str | os.PathLike[str], architecture: str, layers: Mapping[int, int]) -> Calibration:
    """The calibration of a model with these MoE ``layers`` (number -> width of the experts' inputs).

    Raises ``SourceError`` if it is another model's.
    """
    opened = Calibration(path)
    widths = {n: opened.width(n) for n in opened.layers}
    if opened.metadata.get("architecture") != architecture or widths != dict(layers):
        raise SourceError(
            f"{path}: of a {opened.metadata.get('architecture')} with {len(widths)} layers of experts, "
            f"not of this {architecture} with {len(layers)}; flashpack calibrate makes one from a pack of this model"
        )
    return opened
