"""How checkpoints store weights: one module per format, each turning stored arrays into the model's tensors.

What a tensor is stored in is decided tensor by tensor, from the names and types of its parts; the configuration gives
parameters only, and is compared with the shapes.
"""

from __future__ import annotations

import re

from flashpack.converter.source import Checkpoint
from flashpack.converter.tensor import Extent, SourceTensor, plain_tensor
from flashpack.converter.weights import mxfp4, nvfp4
from flashpack.converter.weights.awq import read_awq
from flashpack.converter.weights.compressed import read_bytes, read_packed
from flashpack.converter.weights.declared import Declared
from flashpack.converter.weights.fp8 import read_fp8
from flashpack.converter.weights.gptq import read_gptq
from flashpack.converter.weights.mlx import is_mlx, read_mlx
from flashpack.converter.weights.parts import Parts
from flashpack.errors import SourceError

_PART = re.compile(
    r"\.(weight_scale(_inv|_2)?|weight_zero_point|weight_global_scale|weight_packed|weight_shape|weight_g_idx|qweight|"
    r"qzeros|scales|g_idx|pre_quant_scale)$|_(blocks|scales|scale_inv|weight_scale(_2)?)$"
)
"""Names that only parts of quantized tensors have."""

_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")


def read_tensors(checkpoint: Checkpoint) -> tuple[dict[str, SourceTensor], str]:
    """The model's tensors by name, and the names of their formats joined by "+" ("plain": none is quantized)."""
    if checkpoint.tensors is not None:
        tensors = checkpoint.tensors
    else:
        mlx = is_mlx(checkpoint)
        tensors = read_mlx(checkpoint) if mlx else _read(Parts(checkpoint.stored), Declared.of(checkpoint))
    labels = {t.format.label for t in tensors.values()} - {"plain"}
    return tensors, "+".join(sorted(labels)) or "plain"


def _read(parts: Parts, declared: Declared) -> dict[str, SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    for name, extent in parts.stored.items():
        tensor = _quantized(name, extent, parts, declared)
        if tensor is not None:
            parts.used.add(name)
            if tensor.name in tensors or (tensor.name != name and tensor.name in parts.stored):
                raise SourceError(f"tensor {name}: {tensor.name} is there in another form, too")
            tensors[tensor.name] = tensor
    for name, extent in parts.stored.items():
        if name not in parts.used:
            if _PART.search(name):
                raise SourceError(f"tensor {name} belongs to no quantized tensor; the checkpoint is incomplete")
            if extent.dtype in _INTEGERS and name.endswith(".weight"):
                raise SourceError(f"tensor {name} is stored as {extent.dtype}, in no form that is known")
            tensors[name] = plain_tensor(name, extent)
    return tensors


def _quantized(name: str, extent: Extent, parts: Parts, declared: Declared) -> SourceTensor | None:
    """The tensor that ``name`` is the main part of; None for plain ones, and for parts of others."""
    stem, _, leaf = name.rpartition(".")
    match leaf, extent.dtype:
        case "weight_packed", "U8" if f"{stem}.weight_global_scale" in parts.stored:
            return nvfp4.read_compressed(stem, extent, parts)
        case "weight_packed", "U8":
            return mxfp4.read_pairs(f"{stem}.weight", name, extent, f"{stem}.weight_scale", parts)
        case "weight_packed", "I32":
            return read_packed(stem, extent, parts, declared)
        case "qweight", _ if declared.method == "awq":
            return read_awq(stem, extent, parts, declared)
        case "qweight", _ if declared.method == "gptq":
            return read_gptq(stem, extent, parts, declared)
        case "weight", "U8" if f"{stem}.weight_scale_2" in parts.stored:
            return nvfp4.read_modelopt(name, extent, parts)
        case "weight", "I8" if f"{stem}.weight_scale" in parts.stored:
            return read_bytes(stem, extent, parts, declared)
        case "weight", "I8" if f"{stem}.scale" in parts.stored:
            return mxfp4.read_pairs(name, name, extent, f"{stem}.scale", parts)
        case _, "F8_E4M3" | "F8_E5M2" if not _PART.search(name):
            return read_fp8(name, extent, parts, declared)
    if leaf.endswith("_blocks"):
        return mxfp4.read_blocks(name.removesuffix("_blocks"), extent, parts)
    return None
