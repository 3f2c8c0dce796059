"""llama.cpp's architectures: which transformers family each is, its configuration, and the names of its tensors.

Names are those of the model's parameters, not of a published checkpoint; projections of experts are named
"<experts module>.*.gate" and so on (see ``converter.apart``). What llama.cpp's converter does to values or to the
order of rows is undone here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashpack.converter.gguf.arrange import columns, computed, grouped_from_tiled, halved, in_pieces, reshaped
from flashpack.converter.gguf.facts import Facts
from flashpack.converter.tensor import SourceTensor
from flashpack.errors import SourceError, UnsupportedError

Change = Callable[[str, SourceTensor, dict[str, Any]], SourceTensor]
"""(leaf of the GGUF name, tensor, configuration) -> the tensor of the model."""

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LEAVES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_EXPERTS = re.compile(r"ffn_(gate|up|down|gate_up)(?:_exps|\.(\d+))\.(weight|bias)")


def _same(leaf: str, tensor: SourceTensor, config: dict[str, Any]) -> SourceTensor:
    return tensor


@dataclass(frozen=True)
class Family:
    """``config``: what the configuration has beyond the common parts. ``leaves``: names beside ``_LEAVES``, whole with
    .weight or .bias where they end in it. ``block``: the module of a layer that has the experts."""

    model_type: str
    config: Callable[[Facts], dict[str, Any]]
    leaves: dict[str, str] = field(default_factory=dict)
    block: str = "mlp"
    change: Change = _same

    def name(self, name: str, layers: int) -> str:
        """The model's name for a GGUF name; what is no part of the model, or not known, keeps a name that shows it."""
        if name in _WHOLE:
            return _WHOLE[name]
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        if not match:
            return name
        if int(match[1]) >= layers:
            return f"mtp.{name}"  # predicts further tokens; transformers has no place for it
        layer, leaf = f"model.layers.{match[1]}", match[2]
        if expert := _EXPERTS.fullmatch(leaf):
            bias = ".bias" if expert[3] == "bias" else ""
            return f"{layer}.{self.block}.experts.{expert[2] or '*'}.{expert[1]}{bias}"
        if leaf in self.leaves:
            return f"{layer}.{self.leaves[leaf]}"
        stem, _, suffix = leaf.rpartition(".")
        known = _LEAVES | self.leaves
        return f"{layer}.{known[stem]}.{suffix}" if stem in known else name


def family_of(facts: Facts) -> Family:
    """The family of a file; refuses unknown ones by name."""
    if not facts.architecture:
        raise SourceError(f"{facts.where}: metadata general.architecture is missing")
    if facts.architecture not in FAMILIES:
        raise UnsupportedError(
            f"{facts.where}: architecture {facts.architecture[:60]!r} is not supported in GGUF files; supported: "
            f"{', '.join(sorted(FAMILIES))}. Convert the model's safetensors checkpoint instead"
        )
    if not facts.get("expert_count"):
        raise UnsupportedError(f"{facts.where}: {facts.architecture} without experts: nothing to stream")
    return FAMILIES[facts.architecture]


def make_config(facts: Facts, family: Family) -> dict[str, Any]:
    """config.json of the model in ``facts``."""
    heads, hidden = facts.integer("attention.head_count"), facts.integer("embedding_length")
    if not heads:
        raise SourceError(f"{facts.where}: metadata {facts.architecture}.attention.head_count is 0")
    config = {
        "model_type": family.model_type,
        "vocab_size": facts.shape(r"token_embd\.weight")[0],
        "hidden_size": hidden,
        "num_hidden_layers": facts.integer("block_count") - facts.integer("nextn_predict_layers", 0),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.integer("attention.head_count_kv", heads),
        "head_dim": facts.integer("attention.key_length", hidden // heads),
        "max_position_embeddings": facts.integer("context_length"),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon"),
        "num_experts_per_tok": facts.integer("expert_used_count"),
        "rope_parameters": _rope(facts),
        "tie_word_embeddings": "output.weight" not in facts.tensors,
    }
    for key, token in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{key}_token_id"] = facts.metadata.get(f"tokenizer.ggml.{token}_token_id")
    for key, value in family.config(facts).items():
        config[key] = config[key] | value if key == "rope_parameters" else value
    facts.check_all_asked()
    return config


def _rope(facts: Facts) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": facts.number("rope.freq_base", 10000.0)}
    kind = facts.get("rope.scaling.type", "none")
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(f"{facts.where}: rope scaling {str(kind)[:60]!r} is not supported")
    rope |= {"rope_type": kind, "factor": facts.number("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = facts.integer("rope.scaling.original_context_length")
        for key, name in (
            ("attn_factor", "attention_factor"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            if facts.get(f"rope.scaling.{key}") is not None:
                rope[name] = facts.number(f"rope.scaling.{key}")
    return rope


def _inner(facts: Facts) -> int:
    """The width of an expert."""
    return facts.shape(r"blk\.\d+\.ffn_down(_exps|\.\d+)\.weight")[-1]


def _has(facts: Facts, leaf: str) -> bool:
    return bool(facts.layers(re.escape(leaf)))


def _qwen_moe(facts: Facts) -> dict[str, Any]:
    moe = facts.layers(r"ffn_gate_inp\.weight")
    return {
        "num_experts": facts.integer("expert_count"),
        "moe_intermediate_size": _inner(facts),
        "intermediate_size": facts.integer("feed_forward_length", 0),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(facts.integer("block_count")) if i not in moe],
    }


def _qwen2moe(facts: Facts) -> dict[str, Any]:
    return _qwen_moe(facts) | {
        "norm_topk_prob": False,
        "qkv_bias": _has(facts, "attn_q.bias"),
        "shared_expert_intermediate_size": facts.shape(r"blk\.\d+\.ffn_up_shexp\.weight")[0],
    }


def _qwen3moe(facts: Facts) -> dict[str, Any]:
    facts.get("expert_weights_norm")  # llama.cpp's graph always normalizes
    return _qwen_moe(facts) | {"norm_topk_prob": True, "attention_bias": _has(facts, "attn_q.bias")}


def _olmoe(facts: Facts) -> dict[str, Any]:
    return {
        "num_experts": facts.integer("expert_count"),
        "intermediate_size": _inner(facts),
        "norm_topk_prob": False,
        "clip_qkv": facts.get("attention.clamp_kqv") or None,
    }


def _mixtral(facts: Facts) -> dict[str, Any]:
    width = facts.integer("embedding_length") // facts.integer("attention.head_count")
    return {
        "num_local_experts": facts.integer("expert_count"),
        "intermediate_size": _inner(facts),
        "head_dim": facts.integer("attention.key_length", facts.integer("rope.dimension_count", width)),
        "sliding_window": facts.get("attention.sliding_window"),
    }


def _granitemoe(facts: Facts) -> dict[str, Any]:
    width = facts.integer("embedding_length") // facts.integer("attention.head_count")
    return {
        "num_local_experts": facts.integer("expert_count"),
        "intermediate_size": _inner(facts),
        "attention_multiplier": facts.get("attention.scale") or width**-0.5,
        "embedding_multiplier": facts.get("embedding_scale") or 1.0,
        "residual_multiplier": facts.get("residual_scale") or 1.0,
        "logits_scaling": facts.get("logit_scale") or 1.0,
    }


def _gpt_oss(facts: Facts) -> dict[str, Any]:
    if facts.get("attention.sliding_window_pattern", 2) != 2:
        raise UnsupportedError(f"{facts.where}: another pattern of sliding windows than gpt-oss has is not supported")
    return {
        "num_local_experts": facts.integer("expert_count"),
        "intermediate_size": _inner(facts),
        "sliding_window": facts.integer("attention.sliding_window"),
        "attention_bias": _has(facts, "attn_q.bias"),
        # Not in the metadata: all published configurations have it.
        "rope_parameters": {"truncate": False},
    }


def _glm4moe(facts: Facts) -> dict[str, Any]:
    if facts.integer("expert_gating_func", 2) not in (0, 2):
        raise UnsupportedError(f"{facts.where}: glm4moe with another gating function than sigmoid is not supported")
    return {
        "n_routed_experts": facts.integer("expert_count"),
        "n_shared_experts": facts.integer("expert_shared_count"),
        "moe_intermediate_size": _inner(facts),
        "intermediate_size": facts.integer("feed_forward_length"),
        "first_k_dense_replace": facts.integer("leading_dense_block_count"),
        "n_group": facts.integer("expert_group_count", 1) or 1,
        "topk_group": facts.integer("expert_group_used_count", 1) or 1,
        "norm_topk_prob": bool(facts.get("expert_weights_norm", False)),
        "routed_scaling_factor": facts.get("expert_weights_scale") or 1.0,
        "attention_bias": _has(facts, "attn_q.bias"),
        "use_qk_norm": _has(facts, "attn_q_norm.weight"),
        "rope_parameters": _partial(facts),
    }


def _minimax_m2(facts: Facts) -> dict[str, Any]:
    if facts.integer("expert_gating_func", 2) not in (0, 2):
        raise UnsupportedError(f"{facts.where}: minimax-m2 with another gating function than sigmoid is not supported")
    return {
        "num_local_experts": facts.integer("expert_count"),
        "intermediate_size": _inner(facts),
        "rope_parameters": _partial(facts),
    }


def _partial(facts: Facts) -> dict[str, Any]:
    """The part of a head that is rotated."""
    return {"partial_rotary_factor": facts.integer("rope.dimension_count") / facts.integer("attention.key_length")}


def _qwen35moe(facts: Facts) -> dict[str, Any]:
    linear = facts.layers(r"ssm_a(\.weight)?")
    heads = facts.integer("ssm.time_step_rank")
    layers = facts.integer("block_count") - facts.integer("nextn_predict_layers", 0)
    groups, inner = facts.integer("ssm.group_count"), facts.integer("ssm.inner_size")
    if not heads or not groups or heads % groups or not inner or inner % heads:
        raise SourceError(f"{facts.where}: {heads} heads of values do not fit {groups} groups and {inner} rows")
    return {
        "num_experts": facts.integer("expert_count"),
        "moe_intermediate_size": _inner(facts),
        "shared_expert_intermediate_size": facts.shape(r"blk\.\d+\.ffn_up_shexp\.weight")[0],
        "layer_types": ["linear_attention" if i in linear else "full_attention" for i in range(layers)],
        "linear_conv_kernel_dim": facts.integer("ssm.conv_kernel"),
        "linear_key_head_dim": facts.integer("ssm.state_size"),
        "linear_num_key_heads": groups,
        "linear_num_value_heads": heads,
        "linear_value_head_dim": inner // heads,
        "rope_parameters": _partial(facts)
        | {
            "mrope_section": [n for n in facts.get("rope.dimension_sections") or [11, 11, 10] if n],
            "mrope_interleaved": True,
        },
    }


def _rotated(leaf: str, tensor: SourceTensor, config: dict[str, Any]) -> SourceTensor:
    """llama.cpp rotates pairs of rows that lie side by side; transformers those half a head apart."""
    if leaf in ("attn_q.weight", "attn_k.weight"):
        heads = config["num_attention_heads" if leaf == "attn_q.weight" else "num_key_value_heads"]
        if not heads or tensor.shape[0] % (2 * heads):
            raise SourceError(f"tensor {tensor.name}: {tensor.shape[0]} rows do not make {heads} heads")
        return halved(tensor, heads)
    return tensor


def _gate_row(tensor: SourceTensor) -> SourceTensor:
    return reshaped(tensor, 1, tensor.shape[-1])


def _shared_gate(leaf: str, tensor: SourceTensor, config: dict[str, Any]) -> SourceTensor:
    return _gate_row(tensor) if leaf == "ffn_gate_inp_shexp.weight" else tensor


def _gated_delta(leaf: str, tensor: SourceTensor, config: dict[str, Any]) -> SourceTensor:
    """Qwen3.5: norms have 1 added, A_log is stored as -exp, and the heads of values alternate between key heads."""
    groups, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    order = grouped_from_tiled(groups, heads // groups)
    size = config["linear_value_head_dim"]
    before = 2 * groups * config["linear_key_head_dim"]
    rows, wanted = (
        tensor.shape[0],
        {"attn_qkv.weight": before + heads * size, "ssm_conv1d.weight": before + heads * size},
    )
    wanted |= {"attn_gate.weight": heads * size, "ssm_alpha.weight": heads, "ssm_beta.weight": heads}
    wanted |= {"ssm_a": heads, "ssm_dt.bias": heads}
    if wanted.get(leaf, rows) != rows:
        raise SourceError(f"tensor {tensor.name} has shape {list(tensor.shape)}; {wanted[leaf]} rows are expected")
    if leaf.endswith("norm.weight") and leaf != "ssm_norm.weight":
        return _minus_one(tensor)
    match leaf:
        case "attn_qkv.weight":
            # Pieces that neither the keys' rows nor a head of values is cut by.
            piece = int(np.gcd(before, size))
            per_head = size // piece
            places = [place * per_head + j for place in order for j in range(per_head)]
            return in_pieces(tensor, [*range(before // piece), *(before // piece + p for p in places)])
        case "attn_gate.weight" | "ssm_alpha.weight" | "ssm_beta.weight":
            return in_pieces(tensor, order)
        case "ssm_out.weight":
            if tensor.shape[1] != heads * size:
                raise SourceError(
                    f"tensor {tensor.name} has shape {list(tensor.shape)}; expected {heads * size} columns"
                )
            return columns(tensor, order)
        case "ssm_conv1d.weight":
            each = [*range(before), *(before + place * size + j for place in order for j in range(size))]
            return computed(tensor, (rows, 1, tensor.shape[-1]), lambda v: v.reshape(rows, -1)[each])
        case "ssm_dt.bias":
            return computed(tensor, (heads,), lambda v: v.reshape(1, -1)[:, order])
        case "ssm_a":
            return computed(tensor, (heads,), lambda v: np.log(-v.reshape(1, -1)[:, order]), moves=False)
    return _shared_gate(leaf, tensor, config)


def _minus_one(tensor: SourceTensor) -> SourceTensor:
    return SourceTensor(tensor.name, tensor.shape, tensor.format, tensor.parts, add=-1.0)


_SHARED_EXPERTS = {f"ffn_{p}_shexp": f"mlp.shared_experts.{p}_proj" for p in ("gate", "up", "down")}

FAMILIES = {
    "glm4moe": Family("glm4_moe", _glm4moe, _SHARED_EXPERTS | {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}),
    "gpt-oss": Family("gpt_oss", _gpt_oss, {"attn_sinks.weight": "self_attn.sinks", "ffn_gate_inp": "mlp.router"}),
    "granitemoe": Family(
        "granitemoe", _granitemoe, {"ffn_gate_inp": "block_sparse_moe.router"}, "block_sparse_moe", _rotated
    ),
    "llama": Family("mixtral", _mixtral, change=_rotated),
    "minimax-m2": Family("minimax_m2", _minimax_m2, {"exp_probs_b.bias": "mlp.e_score_correction_bias"}),
    "olmoe": Family("olmoe", _olmoe),
    "qwen2moe": Family("qwen2_moe", _qwen2moe, change=_shared_gate),
    "qwen35moe": Family(
        "qwen3_5_moe_text",
        _qwen35moe,
        {
            "attn_qkv": "linear_attn.in_proj_qkv",
            "attn_gate": "linear_attn.in_proj_z",
            "ssm_alpha": "linear_attn.in_proj_a",
            "ssm_beta": "linear_attn.in_proj_b",
            "ssm_conv1d": "linear_attn.conv1d",
            "ssm_norm": "linear_attn.norm",
            "ssm_out": "linear_attn.out_proj",
            "ssm_a": "linear_attn.A_log",
            "ssm_dt.bias": "linear_attn.dt_bias",
        },
        change=_gated_delta,
    ),
    "qwen3moe": Family("qwen3_moe", _qwen3moe),
}
"""By llama.cpp's name of the architecture."""
