"""MLX checkpoints: quantized triples, stacked expert names, and what mlx-lm changes in some families.

mlx-lm stores ``X.weight`` as uint32 words with ``X.scales`` and ``X.biases`` beside it: exactly the pack's affine
encoding. Bits and group size stand in config.json (``quantization``, with overrides per module path) and are
checked against the shapes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flashpack.converter.source import Checkpoint
from flashpack.converter.tensor import Extent, Packed, SourceTensor, plain_tensor
from flashpack.errors import FormatError, SourceError, UnsupportedError
from flashpack.formats.records import Encoding

# Families whose mlx-lm conversion stores norm weights with 1 added, because transformers computes x * (1 + w) and
# mlx-lm x * w; the names are those of mlx-lm's `sanitize` functions.
_FOLDED_FAMILIES = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text")
_FOLDED_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)


def is_mlx(checkpoint: Checkpoint) -> bool:
    """Whether the names or the configuration are mlx-lm's."""
    return "quantization" in checkpoint.config or any(".switch_mlp." in name for name in checkpoint.stored)


def read_mlx(checkpoint: Checkpoint) -> dict[str, SourceTensor]:
    """The checkpoint's tensors under Hugging Face names; a stacked expert tensor has ``*`` for the expert."""
    folded = checkpoint.config.get("model_type") in _FOLDED_FAMILIES
    tensors = {}
    for name, extent in checkpoint.stored.items():
        shape = extent.shape
        stem, _, part = name.rpartition(".")
        if part in ("scales", "biases") and f"{stem}.weight" in checkpoint.stored:
            continue
        if part == "weight" and f"{stem}.scales" in checkpoint.stored:
            tensor = _quantized(checkpoint, stem, extent)
        else:
            tensor = plain_tensor(name, extent)
        if name.endswith("conv1d.weight") and len(shape) == 3 and shape[-1] == 1:
            # [channels, kernel, 1] here, [channels, 1, kernel] in torch: the same bytes.
            tensor = plain_tensor(name, extent.reshape(shape[0], 1, shape[1]))
        if folded and name.endswith(_FOLDED_NORMS):
            tensor = replace(tensor, add=-1.0)
        renamed = _rename(name)
        tensors[renamed] = replace(tensor, name=renamed)
    return tensors


def _rename(name: str) -> str:
    if name.startswith("language_model."):
        name = name.removeprefix("language_model.")
    return name.replace(".switch_mlp.", ".experts.*.")


def _quantized(checkpoint: Checkpoint, stem: str, extent: Extent) -> SourceTensor:
    bits, group_size = _parameters(checkpoint.config.get("quantization", {}), stem)
    parts = {"weight": extent}
    words = extent.shape
    for part in ("scales", "biases"):
        if f"{stem}.{part}" not in checkpoint.stored:
            raise UnsupportedError(f"tensor {stem}.weight has no {part}: MLX modes other than affine are not supported")
        parts[part] = checkpoint.stored[f"{stem}.{part}"]
        shape = parts[part].shape
        width = words[-1] * 32 // bits
        if shape != (*words[:-1], width // group_size) or width % group_size or words[-1] * 32 % bits:
            raise SourceError(
                f"tensor {stem}.{part} has shape {list(shape)}; {bits} bits in groups of {group_size}, as config.json "
                f"says, need {[*words[:-1], width // group_size]}"
            )
    scales, biases = parts["scales"].dtype, parts["biases"].dtype
    if scales != biases:
        raise UnsupportedError(f"tensor {stem}: scales are {scales}, biases {biases}")
    try:
        encoding = Encoding("affine", scales, bits, group_size)
    except FormatError as e:
        raise UnsupportedError(f"tensor {stem}.weight: {bits} bits in groups of {group_size} are not supported") from e
    return SourceTensor(f"{stem}.weight", (*words[:-1], width), Packed(encoding), parts)


def _parameters(quantization: dict[str, Any], module: str) -> tuple[int, int]:
    """(bits, group size) of a module: its override, or the global ones. An override without mode is affine."""
    own = quantization.get(module, quantization)
    if not isinstance(own, dict):
        raise SourceError(f"config.json: quantization of {module} is {own!r}, but the module has scales")
    mode = own.get("mode", "affine")
    if mode != "affine":
        raise UnsupportedError(f"MLX quantization mode {mode!r} is not supported yet")
    bits, group_size = own.get("bits"), own.get("group_size")
    if not isinstance(bits, int) or not isinstance(group_size, int) or bits <= 0 or group_size <= 0:
        raise SourceError(f"config.json: quantization of {module} lacks bits or group_size")
    return bits, group_size
