"""MXFP4 weights: 4-bit floats, two in a byte, the even column in the low half; a power of two for each 32.

gpt-oss stores experts as ``X_blocks`` and ``X_scales``, rows before columns although the parameter of the model has
them the other way round. DeepSeek-V4 has ``X.weight`` (I8) and ``X.scale``, compressed-tensors ``X.weight_packed`` and
``X.weight_scale``.
"""

from __future__ import annotations

from flashpack.converter.tensor import Extent, SourceTensor
from flashpack.converter.weights.parts import Parts, check_dtype, check_shape, packed
from flashpack.errors import UnsupportedError
from flashpack.formats.records import MXFP4

LABEL = "mxfp4"


def read_blocks(name: str, blocks: Extent, parts: Parts) -> SourceTensor:
    """The parameter ``name`` [E, columns, rows] of ``name_blocks`` [E, rows, columns / 32, 16]."""
    check_dtype(f"{name}_blocks", blocks, "U8")
    if len(blocks.shape) != 4 or blocks.shape[-1] != 16:
        raise UnsupportedError(f"tensor {name}_blocks has shape {list(blocks.shape)}, not [experts, rows, groups, 16]")
    scales = parts.need(f"{name}_scales", f"{name}_blocks", "U8", "F8_E8M0")
    check_shape(f"{name}_scales", scales, blocks.shape[:3], f"{name}_blocks")
    experts, rows, groups, _ = blocks.shape
    found = {"weight": (f"{name}_blocks", blocks), "scales": (f"{name}_scales", scales)}
    return packed(name, LABEL, MXFP4, (experts, rows, groups * 32), found).transpose()


def read_pairs(name: str, stored: str, weight: Extent, scale: str, parts: Parts) -> SourceTensor:
    """The matrix ``name`` of ``stored`` [.., rows, columns / 2] with scales in ``scale`` [.., rows, columns / 32]."""
    shape = (*weight.shape[:-1], weight.shape[-1] * 2)
    scales = parts.need(scale, stored, "U8", "F8_E8M0")
    check_shape(scale, scales, (*shape[:-1], shape[-1] // 32), f"{stored} in groups of 32")
    return packed(name, LABEL, MXFP4, shape, {"weight": (stored, weight), "scales": (scale, scales)})
