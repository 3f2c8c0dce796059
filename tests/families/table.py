"""Every family of the installed transformers whose experts module has the hook."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig

from tests.families import published as p
from tests.families.checkpoint import EXPERTS, configuration
from tests.families.trial import Family, Publish


def hooked() -> list[str]:
    """Families whose modeling file decorates an experts module with ``use_experts_implementation``."""
    models = Path(transformers.__file__).parent / "models"
    files = models.glob("*/modeling_*.py")
    return sorted(p.parent.name for p in files if re.search(r"^@use_experts_implementation", p.read_text(), re.M))


def text(model_type: str, publish: Publish = p.as_saved, **changes: Any) -> Family:
    """A checkpoint of a text model."""
    return Family(partial(configuration, model_type, **changes), publish=publish)


def whole(model_type: str, model: str, publish: Publish = p.as_saved, **changes: Any) -> Family:
    """A checkpoint with parts for images or sound beside the text model; ``changes`` as in ``configuration``."""
    return Family(partial(configuration, model_type, **changes), model, publish)


def mrope(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary angles for three positions, as models of images have them."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)} | more}


DENSE_FIRST = ["dense", "sparse", "sparse"]
MAMBA = ["mamba", "attention", "mamba"]
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
MLA = {"num_key_value_heads": 4}
GROUPS = {"n_group": 2, "topk_group": 1}
MTP = p.layer_past_the_last
SMALL_INKLING = {
    "head_dim": 16, "swa_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "d_rel": 4,
    "rel_extent": 32, "sliding_window_size": 8,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "afmoe": text("afmoe", layer_types=SLIDING, num_shared_experts=2, route_scale=1.5, mup_enabled=True),
    "aria": whole("aria", "AriaForConditionalGeneration"),
    "axk1": text("axk1", **MLA, **GROUPS, mlp_layer_types=DENSE_FIRST),
    "axk2": text("axk2", **MLA, mlp_layer_types=DENSE_FIRST),
    "bailing_hybrid": text("bailing_hybrid", p.layer_42, **MLA, **GROUPS, num_hidden_layers=4, layer_group_size=2),
    "beam": text("beam", **GROUPS, layer_types=SLIDING, mlp_layer_types=DENSE_FIRST),
    "cohere2_moe": text("cohere2_moe", layer_types=SLIDING, mlp_layer_types=DENSE_FIRST, tie_word_embeddings=True),
    "deepseek_ocr2": whole(
        "deepseek_ocr2", "DeepseekOcr2ForConditionalGeneration", **MLA, mlp_layer_types=DENSE_FIRST
    ),
    "deepseek_v2": text(
        "deepseek_v2", p.with_inv_freq, **MLA, **GROUPS, topk_method="group_limited_greedy", q_lora_rank=None
    ),
    "deepseek_v3": text("deepseek_v3", MTP, **MLA, **GROUPS, routed_scaling_factor=2.5),
    "deepseek_v32": text("deepseek_v32", MTP, **MLA, **GROUPS),
    "deepseek_v4": text(
        "deepseek_v4", p.deepseek_v4, num_hidden_layers=4, o_groups=2, o_lora_rank=8, index_topk=2, hc_mult=2,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
                     "compressed_sparse_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    ),
    "dots1": text("dots1", layer_types=SLIDING, routed_scaling_factor=1.5),
    "dots3_note": whole("dots3_note", "Dots3NoteForConditionalGeneration", **MLA, mlp_layer_types=DENSE_FIRST),
    "ernie4_5_moe": text("ernie4_5_moe", p.with_mtp, use_bias=True, tie_word_embeddings=True),
    "exaone_moe": text("exaone_moe", p.with_mtp, layer_types=SLIDING),
    "flex_olmo": text("flex_olmo", num_key_value_heads=4),
    "flint": text("flint", layer_types=SLIDING, mlp_only_layers=[0]),
    "gemma4": whole(
        "gemma4", "Gemma4ForConditionalGeneration", enable_moe_block=True, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=96, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        final_logit_softcapping=30.0, pad_token_id=0, tie_word_embeddings=True, top={"tie_word_embeddings": True},
    ),
    "glm4_moe": text("glm4_moe", MTP, use_qk_norm=True, attention_bias=True),
    "glm4_moe_lite": text("glm4_moe_lite", MTP, **MLA, mlp_layer_types=DENSE_FIRST),
    "glm4v_moe": whole(
        "glm4v_moe", "Glm4vMoeForConditionalGeneration", **mrope(1, 2, 1, partial_rotary_factor=1.0)
    ),
    "glm5_next": whole(
        "glm5_next", "Glm5NextForConditionalGeneration", **MLA, index_kpool=2, qk_rope_head_dim=0, head_dim=0,
        layer_types=LINEAR, mlp_layer_types=DENSE_FIRST,
    ),
    "glm_moe_dsa": text("glm_moe_dsa", MTP, **MLA, mlp_layer_types=DENSE_FIRST),
    "gpt_oss": text("gpt_oss", layer_types=SLIDING),
    "granitemoe": text("granitemoe", tie_word_embeddings=True, residual_multiplier=0.7, embedding_multiplier=3.0),
    "granitemoe_swa": text("granitemoe_swa", layer_types=SLIDING),
    "granitemoehybrid": text("granitemoehybrid", layer_types=MAMBA),
    "granitemoeshared": text("granitemoeshared", logits_scaling=2.0, attention_multiplier=0.3),
    "hunyuan_v1_moe": text("hunyuan_v1_moe"),
    "hy_v3": text("hy_v3", MTP, mlp_layer_types=DENSE_FIRST),
    "hy_v4": text("hy_v4", **MLA, mlp_layer_types=DENSE_FIRST),
    "inkling": whole(
        "inkling_mm_model", "InklingForConditionalGeneration", beside={"num_hidden_layers": 12},
        logits_mup_width_multiplier=1.0, **SMALL_INKLING,
    ),
    "inkling2": whole("inkling2", "Inkling2ForConditionalGeneration", **SMALL_INKLING, n_layers_per_attn_res_block=2),
    "jamba": text("jamba", attn_layer_period=2, attn_layer_offset=1, expert_layer_offset=0),
    "kimi_linear": text("kimi_linear", p.kimi_linear, **MLA, layer_types=LINEAR, mlp_layer_types=DENSE_FIRST),
    "kolibri1": text("kolibri1", layer_types=SLIDING),
    "laguna": text("laguna", layer_types=SLIDING, mlp_layer_types=DENSE_FIRST),
    "lfm2_moe": text("lfm2_moe", layer_types=["conv", "full_attention", "conv"], tie_word_embeddings=True),
    "mellum": text("mellum", p.with_mtp, layer_types=SLIDING),
    "mimo_v2_flash": text("mimo_v2_flash", p.with_model_mtp, layer_types=SLIDING, mlp_layer_types=DENSE_FIRST),
    "minimax": text("minimax", layer_types=LINEAR, block_size=8, mlp_beta_factor=0.7, full_attn_alpha_factor=1.3),
    "minimax_m2": text("minimax_m2"),
    "minimax_m3_vl": whole(
        "minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration", index_block_size=4, index_topk_blocks=2,
        rotary_dim=8, mlp_layer_types=DENSE_FIRST,
    ),
    "mistral4": Family(partial(configuration, "mistral4", **MLA), "Mistral4ForCausalLM"),
    "mistral_large4": whole("mistral_large4", "MistralLarge4ForConditionalGeneration", **MLA),
    "mixtral": text("mixtral", sliding_window=8),
    "muse_spark": whole(
        "muse_spark", "MuseSparkForConditionalGeneration", top={"out_hidden_size": 16}, output_multiplier=1.0,
        mlp_layer_types=DENSE_FIRST, moe_hidden_size=28,
    ),
    "nemotron_h": text(
        "nemotron_h", p.with_mtp, layers_block_type=["mamba", "moe", "attention", "moe", "mlp"], mamba_num_heads=8,
        mamba_head_dim=8, n_groups=2, ssm_state_size=8, chunk_size=8, moe_shared_expert_intermediate_size=20,
        moe_latent_size=16,
    ),
    "olmoe": text("olmoe", clip_qkv=0.5),
    "phimoe": text("phimoe", attention_bias=True, lm_head_bias=True),
    "qwen2_moe": text("qwen2_moe", mlp_only_layers=[0]),
    "qwen3_5_moe": whole("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", p.fused, layer_types=LINEAR),
    "qwen3_moe": text("qwen3_moe", decoder_sparse_step=2, num_hidden_layers=4),
    "qwen3_next": text("qwen3_next", p.with_mtp, layer_types=LINEAR),
    "qwen3_omni_moe": whole(
        "qwen3_omni_moe_thinker", "Qwen3OmniMoeThinkerForConditionalGeneration", p.thinker,
        top={"vision_start_token_id": 90}, **mrope(3, 3, 2),
    ),
    "qwen3_vl_moe": whole("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", **mrope(3, 3, 2)),
    "qwen4_exp": whole(
        "qwen4_exp", "Qwen4ExpForConditionalGeneration", p.fused, layer_types=LINEAR, ple_layer_ids=[1],
        ple_embed_dim=16, ngram_size=2, heads_per_ngram=2, ngram_vocab_size_base=40, split_ngram_parts=2,
        make_ngram_vocab_size_divisible_by=8, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16,
        indexer_budget=8, indexer_compress_ratio=2, hc_lowrank=8,
    ),
    "solar_open": text("solar_open"),
    "unlimited_ocr": whole(
        "unlimited_ocr", "UnlimitedOcrForConditionalGeneration", **MLA, mlp_layer_types=DENSE_FIRST
    ),
    "zaya": text("zaya", num_experts_per_tok=1, router_hidden_size=20, tie_word_embeddings=True),
}  # fmt: skip

REFUSED: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "diffusion_gemma": (
        partial(configuration, "diffusion_gemma", num_experts=EXPERTS),
        "model_type 'diffusion_gemma_text' has no causal language model",
    ),
    "ernie4_5_vl_moe": (
        partial(configuration, "ernie4_5_vl_moe", moe_intermediate_size=[24, 16], **mrope(1, 1, 2)),
        "model_type 'ernie4_5_vl_moe' is not supported: two kinds of experts in a layer",
    ),
    "openai_privacy_filter": (
        partial(configuration, "openai_privacy_filter"),
        "model_type 'openai_privacy_filter' has no causal language model",
    ),
}
"""Families that are refused by their configuration, and what the message says."""
