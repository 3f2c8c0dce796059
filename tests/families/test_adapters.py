"""Families without transformers' experts hook, and families under another name: the same logits as transformers' own
model, or a refusal by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    DbrxConfig,
    DeepseekV3Config,
    JetMoeConfig,
    Llama4TextConfig,
    LongcatFlashConfig,
    PretrainedConfig,
    PreTrainedModel,
    Step3p7Config,
    Step3p7ForConditionalGeneration,
)

import flashpack
from flashpack.adapters import DbrxExperts
from flashpack.converter.stack import apply
from flashpack.converter.tensor import Extent, Packed, SourceTensor
from flashpack.errors import FormatError, SourceError, UnsupportedError
from flashpack.formats import Pack
from flashpack.formats.records import Encoding
from flashpack.runtime.forecast import smallest_of
from flashpack.skeleton import read_config

Tensors = dict[str, Tensor]
Json = dict[str, Any]
Publish = Callable[[Tensors], Tensors]

_SIZES: Json = {
    "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_MLA: Json = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 20,
}  # fmt: skip
# As in Kimi K2, with fewer positions to stretch.
_YARN: Json = {
    "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16, "type": "yarn",
}  # fmt: skip


def llama4(**more: Any) -> Llama4TextConfig:
    sizes = {"num_hidden_layers": 4, "intermediate_size": 24, "intermediate_size_mlp": 40, "num_local_experts": 5}
    steps = {"interleave_moe_layer_step": 2, "attention_chunk_size": 8, "attn_scale": 0.5, "floor_scale": 4}
    return Llama4TextConfig(**_SIZES | sizes | steps | more)


def dbrx(**more: Any) -> DbrxConfig:
    ffn = {"ffn_hidden_size": 24, "moe_num_experts": 5, "moe_top_k": 2, "ffn_act_fn": {"name": "gelu"}}
    attention = {"kv_n_heads": 2, "clip_qkv": 2, "rope_theta": 500000}
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "vocab_size": 96}
    return DbrxConfig(**sizes, ffn_config=ffn | more, attn_config=attention)


def longcat(**more: Any) -> LongcatFlashConfig:
    sizes = {"num_layers": 2, "ffn_hidden_size": 40, "expert_ffn_hidden_size": 24, "n_routed_experts": 5}
    zero = {"zero_expert_num": 3, "moe_topk": 3, "routed_scaling_factor": 6.0}
    return LongcatFlashConfig(**_SIZES | _MLA | sizes | zero | more)


def jetmoe() -> JetMoeConfig:
    sizes = {"num_hidden_layers": 2, "kv_channels": 8, "intermediate_size": 24, "num_local_experts": 5}
    keys = {k: v for k, v in _SIZES.items() if k not in ("num_attention_heads", "head_dim")}
    return JetMoeConfig(**keys | sizes)


def step3p7() -> Step3p7Config:
    """A dense layer, one of sliding attention, and limits: none, wide and narrow."""
    sizes = {"num_hidden_layers": 4, "intermediate_size": 40, "moe_intermediate_size": 24, "share_expert_dim": 20}
    experts = {"n_routed_experts": 5, "num_experts_per_tok": 2, "moe_router_scaling_factor": 3.0}
    layers = {"moe_layers_enum": "1,2,3", "swiglu_limits": [0.0, 0.0, 7.0, 0.3], "sliding_window": 8}
    types = {"layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56}
    return Step3p7Config(
        text_config=_SIZES | sizes | experts | layers | types, vision_config=vision, tie_word_embeddings=False
    )


def deepseek_v3(**more: Any) -> DeepseekV3Config:
    return DeepseekV3Config(**_DEEPSEEK | {"rope_theta": 50000.0, "rope_scaling": dict(_YARN)} | more)


_DEEPSEEK: Json = _SIZES | _MLA | {
    "max_position_embeddings": 512, "num_hidden_layers": 3, "intermediate_size": 40, "moe_intermediate_size": 24,
    "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.827, "norm_topk_prob": True, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
    "tie_word_embeddings": False,
}  # fmt: skip


def model_of(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """transformers' model with every value random and a bfloat16 number; routers are larger, so choices are clear."""
    kinds = {**MODEL_FOR_CAUSAL_LM_MAPPING, Step3p7Config: Step3p7ForConditionalGeneration}
    model: PreTrainedModel = kinds[type(config)](config)
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.state_dict().items()):
            noise = torch.randn(value.shape, generator=generator)
            if value.dim() < 2:
                value += 0.2 * noise
            else:
                width = (
                    value.shape[-2] if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else value.shape[-1]
                )
                value.copy_((3 if "router" in name or "mlp.gate." in name else 1.2) * noise / width**0.5)
            value.copy_(value.bfloat16())
    return model.eval()


def logits_of(model: PreTrainedModel) -> Tensor:
    """[28, vocabulary]: of a prompt of 24 tokens, and of 4 that follow one by one with the cache."""
    ids = torch.randint(3, 96, (1, 28), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        out = model(ids[:, :24], use_cache=True)
        logits, cache = [out.logits[0]], out.past_key_values
        for i in range(24, 28):
            out = model(ids[:, i : i + 1], use_cache=True, past_key_values=cache)
            logits.append(out.logits[0])
    return torch.cat(logits)


def write(folder: Path, config: Json, tensors: Tensors) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    stored = {n: (t if "e_score" in n else t.bfloat16()).contiguous().clone() for n, t in tensors.items()}
    save_file(stored, folder / "model.safetensors")
    return folder


def apart(tensors: Tensors, block: str, form: str = "experts.{}.{}_proj.weight") -> Tensors:
    """Fused experts of ``block``, [E, 2I, H] and [E, H, I], in names of their own; ``form`` may have no number."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        stem, found, leaf = name.partition(f".{block}.experts.")
        if not found:
            made[name] = tensor
            continue
        roles = {"gate": tensor.chunk(2, 1)[0], "up": tensor.chunk(2, 1)[1]} if "gate" in leaf else {"down": tensor}
        for role, stack in roles.items():
            if form.count("{}") == 1:
                made[f"{stem}.{block}.{form.format(role)}"] = stack
                continue
            for e, matrix in enumerate(stack):
                made[f"{stem}.{block}.{form.format(e, role)}"] = matrix
    return made


def turned(tensors: Tensors) -> Tensors:
    """Experts of llama4 with rows as rows."""
    return {n: t.transpose(1, 2) if ".experts." in n else t for n, t in tensors.items()}


def beside_images(tensors: Tensors, *others: str) -> Tensors:
    """The names of a language model that is a part of one for images, too."""
    return {f"language_model.{n}": t for n, t in tensors.items()} | {n: torch.ones(4, 4) for n in others}


def steps(tensors: Tensors) -> Tensors:
    """The names of Step-3.7-Flash."""
    names = {
        "model.language_model.": "model.", "model.vision_model.": "vision_model.", ".mlp.experts.": ".moe.",
        "model.multi_modal_projector.": "vit_large_projector.", ".mlp.shared_experts.": ".share_expert.",
        ".mlp.gate.weight": ".moe.gate.weight", ".mlp.gate.e_score_correction_bias": ".moe.router_bias",
    }  # fmt: skip
    made: Tensors = {}
    for name, tensor in apart(tensors, "mlp", "experts.{}_proj.weight").items():
        for runtime, published in names.items():
            name = name.replace(runtime, published)
        made[name] = tensor
    return made


def saved(config: PretrainedConfig) -> Json:
    data: Json = config.to_dict()
    return data


def kimi_k2(**more: Any) -> Json:
    """The fields of Kimi K2's config.json: those of DeepSeek V3 as they were called by its own code."""
    remote = {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModelForCausalLM": "modeling_deepseek.D"}
    keys = {k: v for k, v in _DEEPSEEK.items() if k != "head_dim"}
    return keys | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "auto_map": remote, "ep_size": 1,
        "aux_loss_alpha": 0.001, "moe_layer_freq": 1, "num_nextn_predict_layers": 0, "pretraining_tp": 1,
        "rope_scaling": dict(_YARN), "rope_theta": 50000.0, "scoring_func": "sigmoid", "seq_aux": True,
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.48.3", "use_cache": True,
    } | more  # fmt: skip


@dataclass(frozen=True)
class Case:
    """transformers' configuration, the config.json that is written, the names of tensors, and how those begin that
    have no place in the language model."""

    config: PretrainedConfig
    json: Json
    publish: Publish = lambda tensors: tensors
    dropped: tuple[str, ...] = ()


CASES = {
    "llama4_text": Case(llama4(), saved(llama4())),
    "llama4 with images": Case(
        llama4(),
        {"model_type": "llama4", "text_config": saved(llama4())},
        lambda t: beside_images(t, "vision_model.model.layers.0.fc.weight", "multi_modal_projector.linear_1.weight"),
        ("vision_model.", "multi_modal_projector."),
    ),
    "llama4 with two experts for a token, one by one": Case(
        llama4(num_experts_per_tok=2, interleave_moe_layer_step=1),
        saved(llama4(num_experts_per_tok=2, interleave_moe_layer_step=1)),
        lambda t: apart(turned(t), "feed_forward"),
    ),
    "llama4 with experts stacked": Case(
        llama4(), saved(llama4()), lambda t: apart(turned(t), "feed_forward", "experts.{}_proj.weight")
    ),
    "dbrx": Case(dbrx(), saved(dbrx())),
    "dbrx, weights not scaled": Case(
        dbrx(moe_normalize_expert_weights=None), saved(dbrx(moe_normalize_expert_weights=None))
    ),
    "longcat_flash": Case(
        longcat(),
        saved(longcat()),
        lambda t: (
            apart({n: v[:5] if ".experts." in n else v for n, v in t.items()}, "mlp")
            | {"model.mtp.layers.0.eh_proj.weight": torch.ones(4, 4)}
        ),
        ("model.mtp.",),
    ),
    "longcat_flash as transformers saves it": Case(
        longcat(),
        saved(longcat()),
        lambda t: apart(t, "mlp"),
        tuple(f"model.layers.{layer}.mlp.experts.{expert}." for layer in range(2) for expert in (5, 6, 7)),
    ),
    "longcat_flash without zero experts": Case(
        longcat(zero_expert_num=0), saved(longcat(zero_expert_num=0)), lambda t: apart(t, "mlp")
    ),
    "jetmoe": Case(jetmoe(), saved(jetmoe()), dropped=("lm_head.weight",)),  # tied, and equal
    "step3p7": Case(step3p7(), saved(step3p7()), steps, ("vision_model.", "vit_large_projector.")),
    "kimi_k2": Case(
        deepseek_v3(),
        kimi_k2(num_nextn_predict_layers=1),
        lambda t: (
            apart(t, "mlp")
            | {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "model.layers.3.eh_proj.weight": torch.ones(4, 4),
            }
        ),
        ("model.layers.0.self_attn.rotary_emb.", "model.layers.3."),
    ),
    "kimi_k25": Case(
        deepseek_v3(),
        {"model_type": "kimi_k25", "text_config": kimi_k2(), "tie_word_embeddings": False},
        lambda t: beside_images(
            apart(t, "mlp"), "vision_tower.encoder.blocks.0.wqkv.weight", "mm_projector.proj.0.weight"
        ),
        ("vision_tower.", "mm_projector."),
    ),
    "kimi_vl": Case(
        deepseek_v3(),
        {
            "model_type": "kimi_vl",
            "auto_map": {"AutoConfig": "configuration_kimi_vl.KimiVLConfig"},
            "text_config": kimi_k2(model_type="deepseek_v3"),
            "vision_config": {"model_type": "moonvit", "init_pos_emb_height": 64, "merge_kernel_size": [2, 2]},
        },
        lambda t: beside_images(
            apart(t, "mlp"), "vision_tower.patch_embed.proj.weight", "multi_modal_projector.linear_1.weight"
        ),
        ("vision_tower.", "multi_modal_projector."),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Of a prompt and of decoded tokens; and every bit is the same with the smallest memory and with all."""
    case = CASES[name]
    model = model_of(case.config)
    expected = logits_of(model)
    assert expected.std() > 0.3
    tensors = case.publish(model.state_dict())
    report = flashpack.convert(write(tmp_path / "source", case.json, tensors), tmp_path / "pack", "source", "source")
    assert sorted(report.dropped) == sorted(n for n in tensors if n.startswith(case.dropped))
    assert all(any(n.startswith(prefix) for n in report.dropped) for prefix in case.dropped)
    found = [logits_of(packed(tmp_path / "pack", *options)) for options in (("smallest", 1), (None, 3))]
    assert (found[0] - expected).abs().max() <= 1e-4
    assert torch.equal(*found)
    told, taken = smallest_of(Pack(tmp_path / "pack"))[0], packed(tmp_path / "pack").flashpack.budget
    assert (told.kv, told.work, told.dense) == (taken.kv, taken.work, taken.dense)


def packed(pack: Path, memory: str | None = None, threads: int = 1) -> Any:
    """The model of ``pack``, computing on ``threads``."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return flashpack.load(pack, memory=memory)
    finally:
        torch.set_num_threads(before)


def read_experts(pack: Path, token: int) -> list[int]:
    """How many experts of each layer are read for one token."""
    model = packed(pack)
    with torch.inference_mode():
        model(torch.tensor([[token]]))
    return [layer.misses for layer in model.flashpack.store.stats.layers.values()]


@pytest.mark.parametrize(("config", "per_token"), [(llama4(num_experts_per_tok=2), 2), (dbrx(), 2), (jetmoe(), 2)])
def test_only_chosen_experts_are_read(config: PretrainedConfig, per_token: int, tmp_path: Path) -> None:
    source = write(tmp_path / "source", saved(config), model_of(config).state_dict())
    flashpack.convert(source, tmp_path / "pack", "source", "source")
    assert read_experts(tmp_path / "pack", 7) == [per_token, per_token]


def test_experts_without_weights_are_not_read(tmp_path: Path) -> None:
    model = model_of(longcat())
    state = model.state_dict()
    for name, bias in state.items():
        if name.endswith("e_score_correction_bias"):
            bias[:5], bias[5:] = -9, 9
    expected = logits_of(model)
    flashpack.convert(write(tmp_path / "source", saved(longcat()), apart(state, "mlp")), tmp_path / "pack", "source")
    assert read_experts(tmp_path / "pack", 7) == [0, 0]
    found = logits_of(packed(tmp_path / "pack"))
    assert (found - expected).abs().max() < 0.5 < (found - logits_of(model_of(longcat()))).abs().max()


@pytest.mark.parametrize(
    ("config", "block", "router"),
    [
        (llama4(), "feed_forward", "feed_forward.router.weight"),
        (dbrx(), "", "ffn.router.layer.weight"),
        (jetmoe(), "", "mlp.router.layer.weight"),
        (jetmoe(), "", "self_attention.experts.router.layer.weight"),
        (longcat(), "mlp", "mlp.router.classifier.weight"),
    ],
)
def test_routers_keep_their_type(config: PretrainedConfig, block: str, router: str, tmp_path: Path) -> None:
    tensors = model_of(config).state_dict()
    published = apart(tensors, block) if block == "mlp" else tensors
    flashpack.convert(write(tmp_path / "source", saved(config), published), tmp_path / "pack")
    manifest = Pack(tmp_path / "pack").manifest
    assert len(manifest.matrices) > 2
    assert not [m.name for m in manifest.matrices if m.name.endswith(router)]
    assert [t.dtype for t in manifest.tensors if t.name.endswith(router)] == ["BF16", "BF16"]
    assert logits_of(packed(tmp_path / "pack")).isfinite().all()


def test_kimi_k2_is_read_as_deepseek_v3(tmp_path: Path) -> None:
    config = read_config(write(tmp_path / "source", kimi_k2(), {}))
    assert type(config) is DeepseekV3Config
    assert config.model_type == "deepseek_v3"
    stretched = dict(config.rope_parameters)
    assert stretched.pop("rope_theta") == 50000.0
    assert stretched.pop("rope_type") == "yarn"
    assert {k: v for k, v in _YARN.items() if k != "type"}.items() <= stretched.items()
    expected, found = (c.to_dict() for c in (deepseek_v3(), config))
    assert {k for k in expected if expected[k] != found[k]} == {"architectures", "num_nextn_predict_layers"}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "doge", "is_moe": True}, "'doge' is not supported: its experts are single rows"),
        ({"model_type": "nllb-moe"}, "'nllb-moe' is an encoder with a decoder"),
        ({"model_type": "switch_transformers"}, "'switch_transformers' is an encoder with a decoder"),
        ({"model_type": "bamba"}, "'bamba' is not a Mixture-of-Experts model"),
    ],
)
def test_other_families_are_refused_by_name(config: Json, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=reason) as error:
        flashpack.convert(write(tmp_path / "source", config, {"x": torch.ones(1)}), tmp_path / "pack")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "pack").exists()


def test_every_family_without_the_hook_is_known() -> None:
    """In the installed transformers; vitpose_backbone, of which there is no language model, is the only other one."""
    known = {"dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"}
    files = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    found = set()
    for path in files:
        text = path.read_text()
        if re.search(r"^class \w*(Experts|MoE|Moe)\(", text, re.M) and "@use_experts_implementation" not in text:
            found.add(path.parent.name)
    assert {"dbrx", "llama4"} < found <= known | {"vitpose_backbone"}


def test_matrices_below_each_other_must_be_those_of_all_experts(tmp_path: Path) -> None:
    tensors = model_of(dbrx()).state_dict()
    tensors["transformer.blocks.1.ffn.experts.mlp.w1"] = torch.ones(121, 32)
    source = write(tmp_path / "source", saved(dbrx()), tensors)
    with pytest.raises(SourceError, match=r"blocks\.1.*mlp\.w1 has shape \[121, 32\], not that of 5 matrices"):
        flashpack.convert(source, tmp_path / "pack")


def test_quantized_matrices_below_each_other_are_refused() -> None:
    extent = Extent("file", "U8", 0, (64,))
    tensor = SourceTensor("w2", (64, 32), Packed("affine", Encoding("affine", "BF16", 4, 32)), {"weight": extent})
    converter = next(c for c in DbrxExperts.loader_map(dbrx()) if len(c.source_patterns) == 1)
    with pytest.raises(UnsupportedError, match=r"x\.down_proj: quantized experts below each other"):
        apply("x.down_proj", converter, {converter.source_patterns[0]: [tensor]}, (5, 32, 24))


def test_more_experts_for_a_token_than_there_are_is_refused(tmp_path: Path) -> None:
    config = dbrx(moe_top_k=6)
    source = write(tmp_path / "source", saved(config), model_of(config).state_dict())
    flashpack.convert(source, tmp_path / "pack", "source", "source")
    with pytest.raises(FormatError, match=r"config\.json: 6 experts per token, of 5"):
        flashpack.load(tmp_path / "pack")
