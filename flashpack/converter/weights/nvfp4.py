"""NVFP4 weights: 4-bit floats, two in a byte, the even column in the low half; an FP8 scale for each 16 values, and
one for the matrix, by which compressed-tensors divides and ModelOpt multiplies.
"""

from __future__ import annotations

from flashpack.converter.tensor import Extent, SourceTensor
from flashpack.converter.weights.parts import Parts, check_dtype, check_shape, packed
from flashpack.formats.records import nvfp4

LABEL = "nvfp4"


def read_compressed(stem: str, weight: Extent, parts: Parts) -> SourceTensor:
    """compressed-tensors: ``stem.weight_packed``, ``.weight_scale`` and ``.weight_global_scale``."""
    names = tuple(f"{stem}.{leaf}" for leaf in ("weight_packed", "weight_scale", "weight_global_scale"))
    return _read(f"{stem}.weight", names, weight, parts, "divide")


def read_modelopt(name: str, weight: Extent, parts: Parts) -> SourceTensor:
    """ModelOpt: ``X.weight``, ``X.weight_scale`` and ``X.weight_scale_2``."""
    stem = name.removesuffix("weight")
    return _read(name, (name, f"{stem}weight_scale", f"{stem}weight_scale_2"), weight, parts, "multiply")


def _read(name: str, names: tuple[str, ...], weight: Extent, parts: Parts, use: str) -> SourceTensor:
    check_dtype(names[0], weight, "U8")
    shape = (*weight.shape[:-1], weight.shape[-1] * 2)
    scales = parts.need(names[1], names[0], "F8_E4M3")
    check_shape(names[1], scales, (*shape[:-1], shape[-1] // 16), f"{names[0]} in groups of 16")
    whole = parts.need(names[2], names[0], "F32")
    found = dict(zip(("weight", "scales", "global"), zip(names, (weight, scales, whole), strict=True), strict=True))
    return packed(name, LABEL, nvfp4(use), shape, found)
