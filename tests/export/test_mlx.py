"""``export --to mlx``: what comes back of it, what mlx-lm computes with it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

import flashpack
from flashpack.errors import IntegrityError, UnsupportedError
from flashpack.export import Report, export
from flashpack.export.content import Content
from flashpack.export.mlx_names import full_attention_interval
from flashpack.export.regain import regain
from flashpack.formats import Pack
from flashpack.formats.header import Header, read_header
from flashpack.formats.manifest import Manifest
from flashpack.formats.records import Encoding
from tests.conftest import CHECKPOINTS, PackOf, source_of
from tests.runtime.test_reference_logits import logits_of

Stored = dict[str, tuple[str, tuple[int, ...], bytes]]


def stored_in(folder: Path) -> Stored:
    """The tensors of a checkpoint: name -> type, shape, bytes."""
    found: Stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        header: Header = read_header(lambda size, at, data=data: data[at : at + size], len(data), str(path))  # type: ignore[misc]
        tensors = [t for t in header.tensors if not t.hidden]
        found |= {t.name: (t.dtype, t.shape, data[t.offset : t.offset + t.nbytes]) for t in tensors}
    return found


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def content_of(manifest: Manifest) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of the experts of each layer, and of each dense tensor."""
    experts = {f.path: f.digests["tail"] for f in manifest.files if f.role == "experts"}
    return experts, {t.name: t.digest for t in manifest.tensors}


@pytest.mark.parametrize("name", ["qwen3_moe-mlx4", "qwen3_5_moe-mlx4"])
def test_an_mlx_checkpoint_comes_back_to_the_byte(pack_of: PackOf, tmp_path: Path, name: str) -> None:
    """Routers, which the pack has as plain values, and norms, which it has without the 1, too."""
    report = export(pack_of(name), tmp_path / "out", "mlx")
    assert stored_in(tmp_path / "out") == stored_in(CHECKPOINTS / name)
    theirs, ours = (config_of(folder)["quantization"] for folder in (CHECKPOINTS / name, tmp_path / "out"))
    modules = {n.removesuffix(".scales") for n in stored_in(CHECKPOINTS / name) if n.endswith(".scales")}
    usual = {"mode": "affine"} | {k: v for k, v in theirs.items() if not isinstance(v, dict)}
    assert all(ours.get(m, usual) == {"mode": "affine"} | theirs.get(m, usual) for m in modules)
    assert not any("norm" in line for line in report.losses)


@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", "qwen2_moe", "glm4_moe", "trained", "mixtral", "gpt_oss-mxfp4", "granitemoe", "minimax_m2"],
)
def test_a_pack_of_the_export_is_the_pack(pack_of: PackOf, tmp_path: Path, name: str) -> None:
    """But for norms of which mlx-lm has 1 more, rounded: that is said."""
    pack = pack_of(name)
    report = export(pack, tmp_path / "out", "mlx", shard_size=100_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    flashpack.convert(tmp_path / "out", tmp_path / "back", "source", "source")
    (experts, dense), (experts_back, dense_back) = (content_of(Pack(p).manifest) for p in (pack, tmp_path / "back"))
    assert experts_back == experts
    changed = {n for n in dense if dense_back[n] != dense[n]}
    assert all(n.endswith("norm.weight") and "linear_attn" not in n for n in changed)
    said = [line for line in report.losses if line.endswith("rounded to bf16 once more")]
    assert [line.split()[0] for line in said] == ([str(len(changed))] if name == "trained" else [])
    assert bool(changed) == (name == "trained")


def _mlx_logits(folder: Path, prompt: NDArray[np.int64]) -> NDArray[np.float32]:
    """What mlx-lm computes on the processor, in float32 throughout."""
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    mx.set_default_device(mx.cpu)
    mx.disable_compile()  # fused operations would be compiled by a C++ compiler
    model, _ = mlx_lm.load_model(folder)  # refuses names and shapes that are not its own
    model.set_dtype(mx.float32)
    answer = model(mx.array(prompt)[None])
    logits: NDArray[np.float32] = np.array(answer.astype(mx.float32))[0]
    return logits


_SAME_MODEL = [
    "deepseek_v3", "glm4_moe", "granitemoe", "minimax_m2", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe",
    "qwen3_moe_dense_first_tied",
]  # fmt: skip


@pytest.mark.parametrize("name", _SAME_MODEL)
def test_mlx_lm_computes_the_logits_of_transformers(pack_of: PackOf, tmp_path: Path, name: str) -> None:
    reference = np.load(CHECKPOINTS / f"{name}.npz")
    export(pack_of(name, "source", "source"), tmp_path / "out", "mlx")
    found = _mlx_logits(tmp_path / "out", reference["prompt"])
    assert np.abs(found - reference["logits"]).max() <= 1e-4


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_next", "trained"])
def test_mlx_lm_computes_the_logits_of_a_pack_with_norms_that_are_stored_with_1_added(
    pack_of: PackOf, tmp_path: Path, name: str
) -> None:
    export(pack_of(name), tmp_path / "out", "mlx")
    prompt = np.arange(3, 40) * 5 % 250
    flashpack.convert(tmp_path / "out", tmp_path / "back", "source", "source")
    found = _mlx_logits(tmp_path / "out", prompt)
    expected = logits_of(flashpack.load(tmp_path / "back", reference=True), prompt)
    assert np.abs(found - expected).max() <= 2e-4
    before = logits_of(flashpack.load(pack_of(name), reference=True), prompt)  # of norms that are not rounded
    assert (found.argmax(-1) == before.argmax(-1)).mean() > 0.7


@pytest.mark.parametrize("experts", ["source", "q3"])
def test_mlx_lm_computes_the_logits_of_experts_with_biases(
    source_copy: Callable[[str], Path], tmp_path: Path, experts: str
) -> None:
    """gpt-oss in mxfp4. mlx-lm does not read ``truncate``, so the reference computes as mlx-lm does."""
    source = source_copy("gpt_oss-mxfp4")
    config = config_of(source)
    config["rope_scaling"]["truncate"] = True
    (source / "config.json").write_text(json.dumps(config))
    flashpack.convert(source, tmp_path / "pack", experts, "source", group_size=32)
    export(tmp_path / "pack", tmp_path / "out", "mlx")
    prompt = np.load(CHECKPOINTS / "gpt_oss-mxfp4.npz")["prompt"]
    expected = logits_of(flashpack.load(tmp_path / "pack", reference=True), prompt)
    assert np.abs(_mlx_logits(tmp_path / "out", prompt) - expected).max() <= 1e-4


def test_a_matrix_that_mlx_lm_splits_is_said_to_be_quantized_again(tmp_path: Path) -> None:
    """deepseek_v3's kv_b_proj, and how its halves are quantized, which is not how most matrices are."""
    config = AutoConfig.from_pretrained(CHECKPOINTS / "deepseek_v3")
    for name, size in {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}.items():
        setattr(config, name, size)
    config.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    flashpack.convert(tmp_path / "source", tmp_path / "pack")
    report = export(tmp_path / "pack", tmp_path / "out", "mlx")
    layers = config.num_hidden_layers
    assert f"{layers} matrices kv_b_proj will be quantized once more by mlx-lm when it loads" in report.losses
    quantization = config_of(tmp_path / "out")["quantization"]
    assert quantization["group_size"] == 64
    own = {name.rpartition(".")[2] for name, mode in quantization.items() if "self_attn" in name}
    assert own == {"embed_q", "unembed_out"}
    assert quantization["model.layers.0.self_attn.embed_q"] == {"mode": "affine", "bits": 8, "group_size": 32}
    prompt = np.arange(3, 40)
    found = _mlx_logits(tmp_path / "out", prompt)
    expected = logits_of(flashpack.load(tmp_path / "pack", reference=True), prompt)
    assert np.abs(found - expected).max() <= 0.1 * np.abs(expected).max()


def test_the_configuration_says_what_mlx_lm_leaves_to_defaults_of_its_own(pack_of: PackOf, tmp_path: Path) -> None:
    export(pack_of("trained"), tmp_path / "out", "mlx")
    config = config_of(tmp_path / "out")
    text = config["text_config"]
    assert config["model_type"] == "qwen3_5_moe"
    assert text["full_attention_interval"] == 3  # the configuration has a list of layers
    assert text["tie_word_embeddings"] is True
    assert not any(key.startswith("_") for key in text)
    assert config["quantization"] == config["quantization_config"]
    usual = {k: config["quantization"][k] for k in ("mode", "bits", "group_size")}
    experts = config["quantization"].get("language_model.model.layers.0.mlp.switch_mlp.up_proj", usual)
    attention = config["quantization"].get("language_model.model.layers.2.self_attn.q_proj", usual)
    assert (experts["bits"], attention["bits"]) == (4, 8)


def test_a_configuration_of_transformers_5_gets_the_older_names_too(
    source_copy: Callable[[str], Path], tmp_path: Path
) -> None:
    source = source_copy("qwen3_moe")
    config = config_of(source)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    theta = config.pop("rope_theta")
    config.pop("rope_scaling", None)
    (source / "config.json").write_text(json.dumps(config | {"rope_parameters": rope | {"rope_theta": theta}}))
    flashpack.convert(source, tmp_path / "pack")
    export(tmp_path / "pack", tmp_path / "out", "mlx")
    found = config_of(tmp_path / "out")
    assert found["rope_theta"] == theta
    assert {k: found["rope_scaling"][k] for k in (*rope, "type")} == rope | {"type": "yarn"}


def _refused(pack: Path, out: Path) -> str:
    with pytest.raises(UnsupportedError) as refusal:
        export(pack, out, "mlx")
    assert not out.exists()
    message = str(refusal.value)
    assert "\n" not in message
    return message


def test_what_mlx_has_not_is_refused_by_name(pack_of: PackOf, tmp_path: Path) -> None:
    assert "no MLX names are known for model_type 'llama4_text'" in _refused(pack_of("llama4_text"), tmp_path / "a")
    message = _refused(pack_of("qwen3_moe", "dq3"), tmp_path / "b")
    assert "layer 0: gate of the experts is stored as 3-bit dq, for which MLX has no mode" in message
    message = _refused(pack_of("qwen3_moe-fp8block"), tmp_path / "c")
    assert "is stored as fp8 32x32" in message
    message = _refused(pack_of("qwen3_moe-nvfp4"), tmp_path / "d")
    assert "is stored as nvfp4 with a scale for the whole matrix" in message


def test_experts_of_several_widths_in_a_layer_are_refused(tmp_path: Path) -> None:
    flashpack.convert(source_of("qwen3_moe"), tmp_path / "pack", bpw=3.6)
    assert any(layer.mixed for layer in Pack(tmp_path / "pack").manifest.layers)
    assert "ways (--bpw); this export has one for a layer" in _refused(tmp_path / "pack", tmp_path / "out")


def test_layers_with_full_attention_anywhere_are_refused(pack_of: PackOf) -> None:
    content = Content(Pack(pack_of("qwen3_next")), lambda count: None)
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    assert full_attention_interval(content, [*kinds, *kinds]) == 3
    assert full_attention_interval(content, kinds[:2]) > 2
    with pytest.raises(UnsupportedError, match="at no regular distances"):
        full_attention_interval(content, [*kinds, *kinds[1:]])


def test_a_damaged_expert_is_never_exported(pack_copy: Callable[..., Path], tmp_path: Path) -> None:
    pack = pack_copy("qwen3_moe")
    shard = pack / "experts" / "layer-0000.safetensors"
    data = bytearray(shard.read_bytes())
    data[16384 + 100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match="layer 0, expert 0"):
        export(pack, tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_what_was_quantized_is_found_again(bits: int) -> None:
    """By the formulas of MLX's quantizer (mlx/ops.cpp): the extreme of the larger magnitude is the bias, the scale is
    such that 0 is a whole number of steps away from it."""
    torch.manual_seed(1)
    values = torch.randn(2048, 64).bfloat16().float().numpy()
    values[0] = np.where(values[0] > 0, 1.5, -2)  # which any number of steps apart would explain
    low, high = values.min(axis=-1), values.max(axis=-1)
    below = np.abs(low) > np.abs(high)
    edge = np.where(below, low, high)
    scale = np.where(below, 1, -1) * (high - low) / (2**bits - 1)
    scale = edge / np.rint(edge / scale)
    scales, biases = (torch.from_numpy(a.astype(np.float32)).bfloat16().float().numpy()[:, None] for a in (scale, edge))
    codes = np.rint((values - biases) / scales).clip(0, 2**bits - 1).astype(np.float32)
    decoded = (codes * scales + biases).reshape(64, 2048)
    parts = regain(decoded, Encoding("affine", "BF16", bits, 64))
    assert parts is not None
    for found, expected in ((parts["scales"], scales), (parts["biases"], biases)):
        assert np.array_equal((found.astype(np.uint32) << 16).view(np.float32).ravel(), expected.ravel())
    words = parts["weight"].view(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    assert np.array_equal((words[..., None] >> shifts & np.uint32(2**bits - 1)).ravel(), codes.ravel())


def test_what_was_never_quantized_is_left_alone() -> None:
    values = np.random.default_rng(2).normal(size=(4, 128)).astype(np.float32)
    assert regain(values, Encoding("affine", "BF16", 8, 64)) is None
    assert regain(values[:, :96], Encoding("affine", "BF16", 8, 64)) is None


def test_the_report_names_what_is_left_out(pack_of: PackOf, tmp_path: Path) -> None:
    report: Report = export(pack_of("qwen3_5_moe"), tmp_path / "out", "mlx")
    assert any("vision" in line for line in report.losses)
    assert "vision_config" not in config_of(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "flashpack-export.json").read_text())["losses"] == report.losses
