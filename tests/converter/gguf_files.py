"""GGUF files of the tiny checkpoints, as llama.cpp's converter would write them, through the gguf package's writer.

Names come from the gguf package's own map; what llama.cpp does to values and orders is done here as its converter
does it. ``write_gguf`` gives back the weights that the file holds, in the checkpoint's own names and orders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import TRAINED, source_of

ARCHITECTURES = {  # by folder
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "mixtral": "llama",
    "olmoe": "olmoe", "gpt_oss": "gpt-oss", "qwen3_5_moe": "qwen35moe", "granitemoe": "granitemoe",
    "glm4_moe": "glm4moe", "minimax_m2": "minimax-m2", TRAINED.name: "qwen35moe",
}  # fmt: skip
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")

Weights = dict[str, np.ndarray]
Undo = Callable[[np.ndarray], np.ndarray]


def read_weights(folder: Path) -> Weights:
    """All tensors of a checkpoint in float32, without those of other parts than the language model."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return {
        name.replace("model.language_model.", "model."): t.float().numpy()
        for name, t in tensors.items()
        if not re.match(r"(model\.)?(visual|mtp)\.", name)
    }


def write_gguf(
    path: Path,
    source: str | Path = "qwen3_moe",
    kind: str = "F32",
    experts: str | None = None,
    metadata: dict[str, Any] | None = None,
    pieces: int = 0,
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    architecture: str | None = None,
) -> Weights:
    """Write a file whose matrices are of ggml type ``kind`` (``experts``: those of experts) where it fits their width.

    ``pieces``: tensors in each piece of a split file. ``metadata``: values instead of what belongs there.
    """
    folder = source_of(source) if isinstance(source, str) else source
    config = json.loads((folder / "config.json").read_text())
    config |= config.get("text_config") or {}
    architecture = architecture or ARCHITECTURES[folder.name]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=pieces)
    fields = _fields(architecture, config) | (metadata or {})
    for key, value in fields.items():
        key = key if key.startswith("general.") else f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    if tokenizer:
        tokenizer(writer)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    held: Weights = {}
    for name, values, undo in _stored(architecture, config, read_weights(folder)):
        stem, suffix = name, ""
        for end in (".weight", ".bias"):
            if name.endswith(end):
                stem, suffix = name.removesuffix(end), end
        found = names.get_name(stem)
        assert found is not None, name
        target = found + suffix
        chosen = experts if experts and "_exps" in found else kind
        quantized = (
            values.ndim > 1
            and suffix == ".weight"
            and "norm" not in found
            and "ffn_gate_inp" not in found
            and "ssm_conv" not in found
        )
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[chosen]][0]
        chosen = chosen if quantized and values.shape[-1] % block == 0 else "F32"
        qtype = gguf.GGMLQuantizationType[chosen]
        data = _encode(np.ascontiguousarray(values, np.float32), qtype)
        writer.add_tensor(target, data, raw_dtype=qtype)
        held |= undo(gguf.dequantize(data, qtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _encode(values: np.ndarray, qtype: gguf.GGMLQuantizationType) -> np.ndarray:
    """Quantized values; random blocks with small scales for types that the gguf package only decodes."""
    if not qtype.name.endswith("_K"):
        data: np.ndarray = gguf.quantize(values, qtype)
        return data
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    assert qtype.name == "Q6_K"  # the scale is at the end
    blocks = np.random.default_rng(6).integers(0, 256, (*values.shape[:-1], values.shape[-1] // block, size), np.uint8)
    blocks[..., -2:] = np.array([1e-4], "<f2").view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """The bundled model's vocabulary, as llama.cpp's converter writes it."""
    data = json.loads((TRAINED / "tokenizer.json").read_text())
    added = {t["id"]: t["content"] for t in data["added_tokens"]}
    tokens = {index: token for token, index in data["model"]["vocab"].items()} | added
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([tokens[i] for i in range(len(tokens))])
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[i in added] for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template((TRAINED / "chat_template.jinja").read_text())


def save_weights(folder: Path, weights: Weights, like: str | Path) -> Path:
    """A checkpoint in float32 with ``weights``, and the configuration of another."""
    source = source_of(like) if isinstance(like, str) else like
    config = json.loads((source / "config.json").read_text())
    if "text_config" in config:
        config = config["text_config"] | {"tie_word_embeddings": config.get("tie_word_embeddings", False)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    save_file({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in weights.items()}, folder / "model.safetensors")
    return folder


def _fields(architecture: str, c: dict[str, Any]) -> dict[str, Any]:
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    width = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    fields: dict[str, Any] = {
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c.get("intermediate_size"),
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "rope.freq_base": float(rope.get("rope_theta") or c["rope_theta"]),
        "expert_count": c.get("num_experts") or c.get("num_local_experts") or c.get("n_routed_experts"),
        "expert_used_count": c["num_experts_per_tok"],
    }
    if c.get("head_dim"):
        fields |= {"attention.key_length": c["head_dim"], "attention.value_length": c["head_dim"]}
    if rope.get("rope_type") == "yarn":
        fields |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"])}
        fields["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    partial = rope.get("partial_rotary_factor") or c.get("partial_rotary_factor") or 1
    match architecture:
        case "llama":
            fields |= {"rope.dimension_count": width, "vocab_size": c["vocab_size"]}
        case "gpt-oss":
            fields["attention.sliding_window"] = c["sliding_window"]
        case "granitemoe":
            fields |= {"rope.dimension_count": width, "attention.scale": float(c["attention_multiplier"])}
            fields |= {"embedding_scale": float(c["embedding_multiplier"]), "logit_scale": float(c["logits_scaling"])}
            fields["residual_scale"] = float(c["residual_multiplier"])
        case "glm4moe":
            fields |= {
                "rope.dimension_count": int(width * partial),
                "expert_shared_count": c["n_shared_experts"],
                "leading_dense_block_count": c["first_k_dense_replace"],
                "expert_gating_func": 2,
                "expert_weights_scale": float(c["routed_scaling_factor"]),
                "expert_weights_norm": c["norm_topk_prob"],
                "expert_group_count": c["n_group"],
                "expert_group_used_count": c["topk_group"],
            }
        case "minimax-m2":
            fields |= {"rope.dimension_count": c.get("rotary_dim") or int(width * partial), "expert_gating_func": 2}
        case "qwen35moe":
            fields |= {
                "rope.dimension_count": int(width * partial),
                "rope.dimension_sections": [*rope.get("mrope_section", [11, 11, 10]), 0],
                "ssm.conv_kernel": c["linear_conv_kernel_dim"],
                "ssm.state_size": c["linear_key_head_dim"],
                "ssm.group_count": c["linear_num_key_heads"],
                "ssm.time_step_rank": c["linear_num_value_heads"],
                "ssm.inner_size": c["linear_value_head_dim"] * c["linear_num_value_heads"],
            }
    return fields


def _stored(architecture: str, c: dict[str, Any], weights: Weights) -> list[tuple[str, np.ndarray, Any]]:
    """(name that the gguf package knows, values as the file has them, values in the file -> weights by own name)."""
    found: list[tuple[str, np.ndarray, Any]] = []
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, w in weights.items():
        if match := _EXPERT.fullmatch(name):
            stacks.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = w
        elif re.search(r"experts\.gate_up_proj(_bias)?$|input_linear\.weight$", name):
            found += _both(name, w, architecture)
        elif re.search(r"experts\.down_proj(_bias)?$", name):
            turned = architecture == "gpt-oss" and not name.endswith("_bias")
            target = re.sub("_proj_bias$", "_proj.bias", name) if name.endswith("_bias") else f"{name}.weight"
            found.append((target, _turn(w, turned), lambda v, n=name, t=turned: {n: _turn(v, t)}))
        else:
            found.append(_one(name, w, architecture, c))
    for name, by_expert in stacks.items():
        stem, leaf = name.removesuffix(".weight").rsplit(".", 1)
        whole = np.stack([by_expert[e] for e in sorted(by_expert)])
        found.append((name, whole, lambda v, s=stem, x=leaf: {f"{s}.{e}.{x}.weight": m for e, m in enumerate(v)}))
    return found


def _turn(values: np.ndarray, turned: bool) -> np.ndarray:
    return np.swapaxes(values, -1, -2) if turned else values


def _both(name: str, w: np.ndarray, architecture: str) -> list[tuple[str, np.ndarray, Any]]:
    """gate and up of a fused tensor; the second one puts them together again."""
    bias, alternate = name.endswith("_bias"), architecture == "gpt-oss"
    w = _turn(w, alternate and not bias)
    half = w.shape[1] // 2
    gate, up = (w[:, ::2], w[:, 1::2]) if alternate else (w[:, :half], w[:, half:])
    stem = re.sub(r"(experts\.gate_up_proj(_bias)?|input_linear\.weight)$", "experts.", name)
    stem, suffix = stem.replace("block_sparse_moe", "mlp"), ".bias" if bias else ".weight"
    kept: list[np.ndarray] = []

    def join(v: np.ndarray) -> Weights:
        both = np.concatenate([kept[0], v], axis=1)
        if alternate:
            both = np.stack([kept[0], v], axis=2).reshape(both.shape)
        return {name: _turn(both, alternate and not bias)}

    def first(v: np.ndarray) -> Weights:
        kept.append(v)
        return {}

    return [(f"{stem}gate_proj{suffix}", gate, first), (f"{stem}up_proj{suffix}", up, join)]


def _one(name: str, w: np.ndarray, architecture: str, c: dict[str, Any]) -> tuple[str, np.ndarray, Any]:
    """A tensor of its own: the name, what the file holds, and back."""

    def plain(v: np.ndarray) -> Weights:
        return {name: v.reshape(w.shape)}

    if architecture in ("llama", "granitemoe") and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = c["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        size = len(w) // heads
        swapped = w.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(w.shape)
        return name, swapped, lambda v: {name: v.reshape(heads, size // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)}
    if name.endswith("output_linear.weight"):
        return name.replace("block_sparse_moe.output_linear", "mlp.experts.down_proj"), w, plain
    if name.endswith("self_attn.sinks"):
        return f"{name}.weight", w, plain
    if name.endswith("e_score_correction_bias"):
        return name.replace("correction_bias", "correction.bias"), w, plain
    if architecture != "qwen35moe":
        return name, w, plain
    groups, heads, size = (c[f"linear_{k}"] for k in ("num_key_heads", "num_value_heads", "value_head_dim"))
    before = 2 * groups * c["linear_key_head_dim"]
    order = np.arange(heads).reshape(groups, -1).T.ravel()  # place in the file -> head
    each = (order[:, None] * size + np.arange(size)).ravel()
    rows = {"in_proj_z": each, "in_proj_a": order, "in_proj_b": order, "A_log": order, "dt_bias": order}
    rows |= dict.fromkeys(("in_proj_qkv", "conv1d"), np.concatenate([np.arange(before), before + each]))
    leaf = name.split("linear_attn.")[-1].removesuffix(".weight")
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return name, w + 1, lambda v: {name: v - np.float32(1)}
    if leaf == "out_proj":
        return name, w[:, each], lambda v: {name: v[:, np.argsort(each)]}
    if "linear_attn" in name and leaf in rows:
        moved = w[rows[leaf]].squeeze() if leaf == "conv1d" else w[rows[leaf]]
        target = name.replace(".dt_bias", ".dt_proj.bias")
        if leaf == "A_log":
            return target, -np.exp(moved), lambda v: {name: np.log(-v[np.argsort(order)])}
        return target, moved, lambda v: {name: v[np.argsort(rows[leaf])].reshape(w.shape)}
    return name, w, plain
