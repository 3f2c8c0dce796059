"""FP8 (E4M3) weights with scales for blocks, rows, groups or the whole matrix: DeepSeek, Qwen, ModelOpt and others.

``X.weight`` has its scales beside it under one of several names. Whatever the name (``weight_scale_inv``), values are
the product of both. What shares a scale follows from the shape; the configuration gives the size of blocks.
"""

from __future__ import annotations

import math

from flashpack.converter.tensor import Extent, SourceTensor
from flashpack.converter.weights.declared import Declared
from flashpack.converter.weights.parts import Parts, check_dtype, packed
from flashpack.errors import SourceError, UnsupportedError
from flashpack.formats.records import fp8

_DEFAULT_BLOCK = (128, 128)
_GROUPS = (16, 32, 64, 128, 256)
"""Values of a row that may share a scale."""

_SCALE_DTYPES = {"F32": "F32", "BF16": "BF16", "F16": "F16", "F8_E8M0": "E8M0", "U8": "E8M0"}


def scale_names(name: str) -> list[str]:
    """Where the scales of a tensor may stand: beside ``X.weight``, or beside a parameter of a fused experts module."""
    stem = name.removesuffix(".weight")
    if stem != name:
        return [f"{stem}.{leaf}" for leaf in ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")]
    return [f"{name}{suffix}" for suffix in ("_scale_inv", "_weight_scale", "_scale")]


def read_fp8(name: str, weight: Extent, parts: Parts, declared: Declared) -> SourceTensor:
    """The tensor stored as F8_E4M3 under ``name``."""
    names = scale_names(name)
    scale_name = parts.find(*names)
    if scale_name is None:
        raise SourceError(f"tensor {name} is stored as {weight.dtype} without scales (such as {names[0]})")
    if len(weight.shape) not in (2, 3):
        raise UnsupportedError(f"tensor {name} is stored as {weight.dtype} in shape {list(weight.shape)}: no matrix")
    scale = parts.need(scale_name, name, *_SCALE_DTYPES)
    block = _block(scale_name, weight.shape, scale, declared)
    encoding = fp8(_SCALE_DTYPES[scale.dtype], block)
    if block == (1, 32) and encoding.dtype == "E8M0":
        label = "mxfp8"
    else:
        label = {(0, 0): "fp8-tensor", (1, 0): "fp8-channel"}.get(block, "fp8-block")
    check_dtype(name, weight, "F8_E4M3")
    return packed(name, label, encoding, weight.shape, {"weight": (name, weight), "scales": (scale_name, scale)})


def _block(name: str, shape: tuple[int, ...], scale: Extent, declared: Declared) -> tuple[int, int]:
    """What of a matrix [.., rows, columns] shares a scale; 0: all rows, or all columns."""
    rows, columns = shape[-2:]
    dims = scale.shape[1:] if len(shape) == 3 and scale.shape[:1] == shape[:1] else scale.shape
    if len(dims) > 2:
        dims = tuple(n for n in dims if n != 1)  # ModelOpt: [rows / 128, 1, columns / 128, 1]
    said = declared.block()
    block = said or _DEFAULT_BLOCK
    expected = (-(-rows // block[0]), -(-columns // block[1]))
    if said and dims == expected:
        return block
    if math.prod(dims) == 1:
        return 0, 0
    if dims in ((rows,), (rows, 1)):
        return 1, 0
    if dims == expected:
        return block
    if len(dims) == 2 and dims[0] == rows and dims[1] and columns % dims[1] == 0 and columns // dims[1] in _GROUPS:
        return 1, columns // dims[1]
    source = "config.json says" if said else "is usual"
    raise SourceError(
        f"tensor {name} has shape {list(scale.shape)}; blocks of {list(block)}, as {source}, need {list(expected)}, "
        f"a scale for each row {[rows, 1]}"
    )
