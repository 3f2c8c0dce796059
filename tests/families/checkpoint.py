"""Tiny seeded checkpoints of any family, made by transformers: every value is non-trivial, so that a tensor that is
dropped or swapped shows in the logits."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

EXPERTS = 6
"""Routed experts of a layer; no other dimension has this size, so routers are known by it."""

# What configurations call the sizes of a model. A family takes those that it has.
_TINY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": False, "pad_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 8,
    # dense layers
    "intermediate_size": 40, "prefix_dense_intermediate_size": 40, "first_k_dense_replace": 1, "num_dense_layers": 1,
    # experts
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "moe_intermediate_size": 24, "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "shared_expert_intermediate_size": 20, "shared_intermediate_size": 20,
    # attention with compressed keys and values, and its indexer
    "q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_topk": 6, "index_head_dim": 16, "index_n_heads": 2,
    # linear attention and state spaces
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4, "mamba_d_state": 8, "mamba_n_heads": 8,
    "mamba_n_groups": 2, "mamba_d_head": 8, "mamba_d_conv": 4, "mamba_chunk_size": 8,
}  # fmt: skip


# Parts for images and sound: as small as they can be made.
_TINIER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_heads": 2, "head_dim": 8, "image_size": 8, "patch_size": 4, "vocab_size": 8,
    "out_hidden_size": 32, "text_hidden_size": 32, "adapter_out_dim": 32, "output_dim": 32, "output_channels": 8,
    "num_position_embeddings": 16, "position_embedding_size": 16, "deepstack_visual_indexes": [0], "d_model": 16,
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "downsample_hidden_size": 8,
    "projection_hidden_dim": 8, "adapter_in_dim": 16, "adapter_input_size": 16, "moe_intermediate_size": 8,
    "num_local_experts": 2, "num_experts_per_tok": 1, "mlp_dim": 24,
    "projection_intermediate_size": 8, "feature_size": 16, "num_mel_bins": 16, "n_mel_bins": 4, "mel_vocab_size": 8,
    "global_attn_indexes": (0,), "pos_emb_height": 2, "pos_emb_width": 2, "mlp_layer_types": ["sparse"],
    "hidden_sizes": (4,), "depths": (1,), "patch_sizes": (16,), "subsampling_conv_channels": (4, 4),
    "output_proj_dims": 16,
    "codebook_size": 8, "decoder_dim": 16, "num_code_groups": 2, "num_quantizers": 2, "projector_hidden_size": 32,
}  # fmt: skip


def configuration(
    model_type: str, top: dict[str, Any] | None = None, beside: dict[str, Any] | None = None, **changes: Any
) -> PretrainedConfig:
    """A configuration of ``model_type`` in miniature; ``changes`` are those of the text model, ``top`` those around
    it, ``beside`` those of parts for images and sound."""
    return _configuration(CONFIG_MAPPING[model_type], changes, top or {}, beside or {})


def _configuration(
    kind: type[PretrainedConfig], text: dict[str, Any], top: dict[str, Any], beside: dict[str, Any]
) -> PretrainedConfig:
    parts: dict[str, PretrainedConfig] = {}
    for name, part in kind.sub_configs.items():
        part = type(getattr(kind(), name)) if part is AutoConfig else part
        if name == "text_config":
            parts[name] = _fill(part, _TINY, text)
        elif part.sub_configs:
            parts[name] = _configuration(part, text, {}, beside)
        else:
            parts[name] = _fill(part, _TINIER | beside)
    if not parts:
        return _fill(kind, _TINY, text)
    around = {"tie_word_embeddings": False, "projector_hidden_size": 32, "out_hidden_size": 32}
    return _fill(kind, around | parts, top)


def _fill(kind: type[PretrainedConfig], values: dict[str, Any], more: dict[str, Any] | None = None) -> PretrainedConfig:
    known = {f.name for f in dataclasses.fields(kind)}
    return kind(**{k: v for k, v in values.items() if k in known} | (more or {}))


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Give every parameter and persistent buffer its own seeded values.

    Matrices: normal, of the size that keeps activations in range; those with a row for each expert are larger, so
    that choices of experts are clear. Vectors: what the library begins with, and noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for _, value in sorted(model.state_dict().items()):
            if not value.is_floating_point():
                if not value.any():  # choices of experts by token
                    choices = torch.rand(value.shape[0], EXPERTS, generator=generator).argsort(-1)
                    value.copy_(choices[:, : value.shape[-1]])
                continue
            if value.dim() < 2:
                value += 0.2 * noise(value)
            elif EXPERTS in value.shape[:-1] and value.dim() == 2:
                value.copy_(4 * noise(value) / math.sqrt(value.shape[-1]))
            else:
                fan = value[0].numel() if value.dim() != 3 else value.shape[-1]
                value.copy_(1.2 * noise(value) / math.sqrt(fan))


def write(model: PreTrainedModel, folder: Path, publish: Callable[..., dict[str, torch.Tensor]]) -> None:
    """Save ``model`` in bfloat16 in ``folder``/saved, as transformers does, and in ``folder``/source as releases are:
    ``publish`` makes names, and config.json, of those that transformers saves."""
    strict = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not any(k in name.split(".") for k in strict):
            value.data = value.data.to(torch.bfloat16)
    saved, source = folder / "saved", folder / "source"
    model.save_pretrained(saved)
    tensors: dict[str, torch.Tensor] = {}
    for path in saved.glob("*.safetensors"):
        tensors |= load_file(path)
    config = json.loads((saved / "config.json").read_text())
    tensors = publish(tensors, config)
    source.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
