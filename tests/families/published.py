"""From what transformers saves to what is released: other names and layouts, tensors that are beside the model."""

from __future__ import annotations

import re
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


def as_saved(tensors: Tensors, config: Config) -> Tensors:
    return tensors


def fused(tensors: Tensors, config: Config) -> Tensors:
    """All experts of a layer in two tensors, and multi-token prediction."""
    out = dict(tensors)
    stacks: dict[str, dict[str, list[tuple[int, torch.Tensor]]]] = {}
    for name in tensors:
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name):
            stacks.setdefault(found[1], {}).setdefault(found[3], []).append((int(found[2]), out.pop(name)))
    for stem, roles in stacks.items():
        gate, up, down = (
            torch.stack([t for _, t in sorted(roles[r], key=lambda p: p[0])]) for r in ("gate", "up", "down")
        )
        out |= {f"{stem}.gate_up_proj": torch.cat([gate, up], dim=1), f"{stem}.down_proj": down}
    return with_mtp(out, config)


def layer_past_the_last(tensors: Tensors, config: Config) -> Tensors:
    """Multi-token prediction as a layer of its own behind the others, as DeepSeek and GLM have it."""
    return _copy_of_last(tensors, config, config["num_hidden_layers"])


def layer_42(tensors: Tensors, config: Config) -> Tensors:
    return _copy_of_last(tensors, config, 42)


def _copy_of_last(tensors: Tensors, config: Config, number: int) -> Tensors:
    last, new = f"model.layers.{config['num_hidden_layers'] - 1}.", f"model.layers.{number}."
    extra = {n.replace(last, new): t + 1 for n, t in tensors.items() if n.startswith(last)}
    assert extra
    return (
        tensors | extra | {f"{new}eh_proj.weight": torch.ones(32, 64), f"{new}shared_head.norm.weight": torch.ones(32)}
    )


def with_mtp(tensors: Tensors, config: Config) -> Tensors:
    """Multi-token prediction under a prefix of its own, with experts of its own."""
    return tensors | {
        "mtp.fc.weight": torch.ones(32, 64),
        "mtp.layers.0.mlp.gate.weight": torch.ones(6, 32),
        "mtp.layers.0.mlp.experts.0.gate_proj.weight": torch.ones(24, 32),
    }


def with_model_mtp(tensors: Tensors, config: Config) -> Tensors:
    return tensors | {"model.mtp.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)}


def with_inv_freq(tensors: Tensors, config: Config) -> Tensors:
    """Rotary frequencies, which older checkpoints have."""
    return tensors | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}


def deepseek_v4(tensors: Tensors, config: Config) -> Tensors:
    """No prefix; transformers' save gives one, and renames a norm."""
    out = {n.removeprefix("model."): t for n, t in tensors.items()}
    out = {re.sub(r"^embed_tokens\.", "embed.", n): t for n, t in out.items()}
    out = {re.sub(r"^hc_head\.", "", n).replace("hc_hc_", "hc_head_"): t for n, t in out.items()}
    out = {re.sub(r"^hc_(fn|base|scale)$", r"hc_head_\1", n): t for n, t in out.items()}
    out = {re.sub(r"\.attn\.norm\.", ".attn.kv_norm.", n): t for n, t in out.items()}
    return out | {"mtp.0.attn.wq_a.weight": torch.ones(12, 32)}


def kimi_linear(tensors: Tensors, config: Config) -> Tensors:
    """Dense layers are called mlp; transformers' save calls them as the sparse ones."""
    return {re.sub(r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj.", n): t for n, t in tensors.items()}


def thinker(tensors: Tensors, config: Config) -> Tensors:
    """The thinker of an omni model: its tensors and configuration are parts of larger ones."""
    inner = dict(config)
    config.clear()
    config |= {"architectures": ["Qwen3OmniMoeForConditionalGeneration"], "model_type": "qwen3_omni_moe"}
    config["thinker_config"] = inner
    config["enable_audio_output"] = False
    return {f"thinker.{n}": t for n, t in tensors.items()} | {
        "talker.model.layers.0.mlp.experts.0.gate_proj.weight": torch.ones(8, 8),
        "code2wav.code_embedding.weight": torch.ones(8, 8),
    }
