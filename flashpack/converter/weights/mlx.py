"""MLX checkpoints: quantized triples, stacked expert names, and what mlx-lm changes in some families.

mlx-lm stores ``X.weight`` as uint32 words with ``X.scales`` and ``X.biases`` beside it: exactly the pack's affine
encoding. Modes of small floats have no biases, and scales of one byte. Bits, group size and mode stand in config.json
(``quantization``, with overrides per module path) and are checked against the shapes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flashpack.converter.source import Checkpoint
from flashpack.converter.tensor import Extent, SourceTensor, plain_tensor
from flashpack.converter.weights.parts import check_dtype, packed
from flashpack.errors import FormatError, SourceError, UnsupportedError
from flashpack.formats.records import MXFP4, Encoding, fp8, nvfp4

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

_STACKS = {
    "gpt_oss": (".mlp.experts.", ".mlp.experts."),
    "granitemoe": (".block_sparse_moe.switch_mlp.", ".block_sparse_moe.experts."),
    "minimax_m2": (".block_sparse_moe.switch_mlp.", ".mlp.experts."),
    "mixtral": (".block_sparse_moe.switch_mlp.", ".mlp.experts."),
}
"""Families of which transformers' loader knows no names of stacked experts with gate and up apart: mlx-lm's module with
them, and the model's."""

_FLOATS = {"mxfp4": (MXFP4, 4, 32), "mxfp8": (fp8("E8M0", (1, 32)), 8, 32), "nvfp4": (nvfp4("none"), 4, 16)}
"""Modes without biases: encoding, bits, group size."""


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
        renamed = _rename(name, *_STACKS.get(str(checkpoint.config.get("model_type")), ("", "")))
        tensors[renamed] = replace(tensor, name=renamed)
    return tensors


def _rename(name: str, stacks: str, experts: str) -> str:
    """The name in Hugging Face checkpoints; of ``stacks`` that of ``converter.apart``."""
    name = name.removeprefix("language_model.")
    if stacks and stacks in name:
        role, _, leaf = name.rpartition("_proj.")
        return role.replace(stacks, f"{experts}*.") + (".bias" if leaf == "bias" else "")
    return name.replace(".switch_mlp.", ".experts.*.")


def _quantized(checkpoint: Checkpoint, stem: str, extent: Extent) -> SourceTensor:
    bits, group_size, mode = _parameters(checkpoint.config.get("quantization", {}), stem)
    names = {part: f"{stem}.{part}" for part in ("weight", "scales", "biases") if f"{stem}.{part}" in checkpoint.stored}
    found = {part: (name, checkpoint.stored[name]) for part, name in names.items()}
    check_dtype(f"{stem}.weight", extent, "U32")
    words, scales = extent.shape, found["scales"][1]
    if (mode == "affine") != ("biases" in found):
        has = "biases" if "biases" in found else "no biases"
        raise SourceError(f"tensor {stem}.weight has {has}, but config.json says mode {mode!r}")
    if mode == "affine":
        biases = check_dtype(f"{stem}.biases", found["biases"][1], scales.dtype)
        try:
            encoding = Encoding("affine", scales.dtype, bits, group_size)
        except FormatError as e:
            what = f"{bits} bits in groups of {group_size}, scales {scales.dtype}"
            raise UnsupportedError(f"tensor {stem}.weight: {what} are not supported") from e
    else:
        encoding, *numbers = _FLOATS[mode]
        check_dtype(f"{stem}.scales", scales, "U8")
        if (bits, group_size) != tuple(numbers):
            what = f"{bits} bits in groups of {group_size}"
            raise SourceError(f"tensor {stem}.weight: config.json says mode {mode!r} with {what}; {numbers} are known")
        biases = scales
    width = words[-1] * 32 // bits
    groups = (*words[:-1], width // group_size)
    if (scales.shape, biases.shape) != (groups, groups) or width % group_size or words[-1] * 32 % bits:
        raise SourceError(
            f"tensor {stem}.scales has shape {list(scales.shape)}; {bits} bits in groups of {group_size}, as "
            f"config.json says, need {list(groups)}"
        )
    return packed(f"{stem}.weight", f"mlx-{mode}", encoding, (*words[:-1], width), found)


def _parameters(quantization: dict[str, Any], module: str) -> tuple[int, int, str]:
    """(bits, group size, mode) of a module: its override, or the global ones. An override without mode is affine."""
    own = quantization.get(module, quantization)
    if not isinstance(own, dict):
        raise SourceError(f"config.json: quantization of {module} is {own!r}, but the module has scales")
    mode = own.get("mode", "affine")
    if mode not in ("affine", *_FLOATS):
        raise UnsupportedError(f"config.json: MLX quantization mode {mode!r} of {module} is not supported")
    bits, group_size = own.get("bits"), own.get("group_size")
    if not isinstance(bits, int) or not isinstance(group_size, int) or bits <= 0 or group_size <= 0:
        raise SourceError(f"config.json: quantization of {module} lacks bits or group_size")
    return bits, group_size, mode
