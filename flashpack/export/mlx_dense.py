"""The dense tensors of a pack as mlx-lm stores them: its names, norms with 1 added, routers quantized as they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashpack.errors import UnsupportedError
from flashpack.export.content import Content
from flashpack.export.mlx_names import SHIFTED_NORMS, Family, source_config
from flashpack.export.regain import Parts, regain
from flashpack.formats import constants as C
from flashpack.formats.dtypes import from_float32, to_float32
from flashpack.formats.header import TensorSpec
from flashpack.formats.records import Encoding

Mode = tuple[str, int, int]
"""How MLX quantizes a module: mode, bits, group size."""


@dataclass(frozen=True)
class DenseTensor:
    """A tensor, or a quantized matrix, of the export. ``stem``: its name there without ``.weight``; ``source``: in the
    pack. ``read`` gives the arrays of ``specs``, in order; ``lossy``: whether they hold the pack's values rounded."""

    stem: str
    source: str
    shape: tuple[int, ...]
    encoding: Encoding
    specs: list[TensorSpec]
    read: Callable[[], list[NDArray[np.generic]]]
    lossy: bool = False


def mode_of(encoding: Encoding, what: str) -> Mode | None:
    """MLX's mode for an encoding, None for plain values. Raises ``UnsupportedError`` if it has none; ``what`` names
    the matrix."""
    match encoding:
        case Encoding("raw"):
            return None
        case Encoding("affine"):
            return "affine", encoding.bits, encoding.group_size
        case Encoding("mxfp4"):
            return "mxfp4", 4, 32
        case Encoding("nvfp4", global_scale="none"):
            return "nvfp4", 4, 16
        case Encoding("fp8_e4m3", "E8M0", block=(1, 32)):
            return "mxfp8", 8, 32
    more = " with a scale for the whole matrix" if "global" in encoding.part_names else ""
    raise UnsupportedError(
        f"{what} is stored as {encoding}{more}, for which MLX has no mode; make a pack of the checkpoint with "
        f"--experts q4 --dense q8 for it, or use --to hf"
    )


def part_specs(stem: str, encoding: Encoding, shape: tuple[int, ...]) -> list[TensorSpec]:
    """The tensors of a module ``stem`` whose weight is [..., out, in] of this ``shape``, part by part."""
    specs = []
    for part, (dtype, size) in encoding.parts(shape).items():
        if part == "weight" and encoding.name == "fp8_e4m3":  # MLX has words of four
            dtype, size = "U32", (*size[:-1], size[-1] // 4)
        specs.append(TensorSpec(f"{stem}.{part}", dtype, size))
    return specs


def dense_tensors(content: Content, family: Family) -> Iterator[DenseTensor]:
    """All dense tensors, in the order of the pack's files. Reads norms, and routers that may have been quantized."""
    declared = source_config(content).get("quantization")
    float_dtype = _float_dtype(content)
    for name, (shape, encoding) in content.dense.items():
        mode_of(encoding, f"{content.pack.folder}: {name}")
        stem, _, leaf = family.name(name).rpartition(".")
        if family.shifted and name.endswith(SHIFTED_NORMS):
            yield _shifted(content, stem, name, encoding, float_dtype)
        elif leaf == "weight" and encoding.quantized:
            yield _as_stored(content, stem, name, shape, encoding, part_specs(stem, encoding, shape))
        elif leaf == "weight" and (found := _regained(content, stem, name, encoding, declared, float_dtype)):
            yield found
        else:
            if name.endswith(".conv1d.weight"):  # one channel in; it comes last in MLX
                shape = (shape[0], *shape[2:], shape[1])
            yield _as_stored(
                content, stem, name, shape, encoding, [TensorSpec(f"{stem}.{leaf}", encoding.dtype, shape)]
            )


def _as_stored(
    content: Content, stem: str, name: str, shape: tuple[int, ...], encoding: Encoding, specs: list[TensorSpec]
) -> DenseTensor:
    def read() -> list[NDArray[np.generic]]:
        parts = content.tensor(name).parts
        return [parts[part] for part in encoding.part_names]

    return DenseTensor(stem, name, shape, encoding, specs, read)


def _shifted(content: Content, stem: str, name: str, encoding: Encoding, float_dtype: str) -> DenseTensor:
    """1 added, in float32, and rounded to the type of the model. Of an MLX checkpoint the pack has 1 subtracted in
    float32: the sum is what was there, rounded or not."""
    stored = content.pack.map_tensor(name)
    values = to_float32(stored, encoding.dtype) + np.float32(1)
    dtype = encoding.dtype
    rounded = from_float32(values, float_dtype)
    if dtype == "F32" and np.array_equal(to_float32(rounded, float_dtype) - np.float32(1), stored):
        dtype = float_dtype
    lossy = not np.array_equal(to_float32(from_float32(values, dtype), dtype) - np.float32(1), values - np.float32(1))

    def read() -> list[NDArray[np.generic]]:
        return [from_float32(content.tensor(name).values() + np.float32(1), dtype)]

    spec = TensorSpec(f"{stem}.weight", dtype, stored.shape)
    return DenseTensor(stem, name, stored.shape, Encoding("raw", dtype), [spec], read, lossy)


def _regained(
    content: Content, stem: str, name: str, encoding: Encoding, declared: Any, float_dtype: str
) -> DenseTensor | None:
    """A matrix that the source's config.json says was quantized, as it was; None if it was not."""
    shape, _ = content.dense[name]
    own = declared.get(stem, declared) if isinstance(declared, dict) else None
    if encoding.dtype != "F32" or len(shape) != 2 or not isinstance(own, dict) or own.get("mode", "affine") != "affine":
        return None
    bits, group_size = own.get("bits"), own.get("group_size")
    if bits not in C.AFFINE_BITS or group_size not in C.GROUP_SIZES:
        return None
    quantized = Encoding("affine", float_dtype, bits, group_size)
    parts: Parts | None = regain(content.pack.map_tensor(name).astype(np.float32), quantized)
    if parts is None:
        return None

    def read() -> list[NDArray[np.generic]]:
        content.tensor(name)  # proves what the parts were made of
        return list(parts.values())

    return DenseTensor(stem, name, shape, quantized, part_specs(stem, quantized, shape), read)


def _float_dtype(content: Content) -> str:
    """The type of the model's numbers: that of most tensors and scales of 16 bits, float32 if there are none."""
    types = Counter(encoding.dtype for _, encoding in content.dense.values() if encoding.dtype in ("BF16", "F16"))
    return types.most_common(1)[0][0] if types else "F32"
