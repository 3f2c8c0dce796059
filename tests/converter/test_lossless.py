"""Carried-over weights are the source's own bytes; quantized ones are what the numpy reference gives."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors import safe_open

from flashpack.formats import Pack, affine
from tests.conftest import CHECKPOINTS, PackOf, source_of


def source_tensor(name: str, tensor: str) -> np.ndarray:
    """A tensor's raw bytes, read by the safetensors library."""
    import torch

    for path in source_of(name).glob("*.safetensors"):
        with safe_open(path, "pt") as f:
            if tensor in f.keys():  # noqa: SIM118 - not a dict
                found: np.ndarray = f.get_tensor(tensor).contiguous().view(torch.uint8).numpy()
                return found
    raise KeyError(tensor)


def sections(pack: Pack, layer: int, expert: int) -> dict[str, np.ndarray]:
    entry = pack.layer(layer)
    with pack.open_shard(entry) as shard:
        offset, stride = shard.extent(expert)
        record = (pack.folder / entry.path).read_bytes()[offset : offset + stride]
        return {
            s.name: np.frombuffer(record, np.uint8, s.nbytes, s.offset).reshape(s.shape[0], -1)
            for s in shard.kind(expert).sections
        }


@pytest.mark.parametrize(
    ("name", "prefix"), [("qwen3_moe-mlx4", "model"), ("qwen3_5_moe-mlx4", "language_model.model")]
)
@pytest.mark.parametrize("choice", ["auto", "source"])
def test_mlx_words_scales_and_biases_are_identical_to_the_source(
    pack_of: PackOf, name: str, prefix: str, choice: str
) -> None:
    pack = Pack(pack_of(name, choice, choice))
    for layer in pack.manifest.layers:
        for role in ("gate", "up", "down"):
            for part in ("weight", "scales", "biases"):
                source = source_tensor(name, f"{prefix}.layers.{layer.index}.mlp.switch_mlp.{role}_proj.{part}")
                for expert in range(layer.experts):
                    stored = sections(pack, layer.index, expert)[f"{role}.{part}"]
                    assert np.array_equal(stored, source[expert]), (layer.index, expert, role, part)


def test_fused_experts_are_split_into_gate_up_and_down(pack_of: PackOf) -> None:
    pack = Pack(pack_of("qwen3_5_moe", "source", "source"))
    for layer in pack.manifest.layers:
        stem = f"model.language_model.layers.{layer.index}.mlp.experts"
        fused = source_tensor("qwen3_5_moe", f"{stem}.gate_up_proj")
        down = source_tensor("qwen3_5_moe", f"{stem}.down_proj")
        for expert in range(layer.experts):
            stored = sections(pack, layer.index, expert)
            assert np.array_equal(np.concatenate([stored["gate.weight"], stored["up.weight"]]), fused[expert])
            assert np.array_equal(stored["down.weight"], down[expert])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantized_experts_are_the_reference_quantizers_bytes(pack_of: PackOf, bits: int) -> None:
    pack = Pack(pack_of("qwen3_moe", f"q{bits}", "q4", 32))
    raw = source_tensor("qwen3_moe", "model.layers.1.mlp.experts.3.up_proj.weight")
    values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    words, scales, biases, _ = affine.quantize_starts(values, bits, 32, "BF16")
    stored = sections(pack, 1, 3)
    assert stored["up.weight"].tobytes() == words.tobytes()
    assert stored["up.scales"].tobytes() == scales.tobytes()
    assert stored["up.biases"].tobytes() == biases.tobytes()


def test_small_and_deciding_tensors_keep_their_type(pack_of: PackOf) -> None:
    pack = Pack(pack_of("trained", "q4", "q4"))
    quantized = {m.name for m in pack.manifest.matrices}
    kept = {t.name: t.dtype for t in pack.manifest.tensors if t.name not in quantized and t.dtype != "U32"}
    for leaf in (
        "mlp.gate.weight", "mlp.shared_expert_gate.weight", "input_layernorm.weight", "linear_attn.conv1d.weight",
        "linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.in_proj_a.weight", "linear_attn.norm.weight",
    ):  # fmt: skip
        assert kept[f"model.layers.0.{leaf}"] == "BF16", leaf
    assert "model.layers.0.mlp.shared_expert.up_proj.weight" in quantized
    assert "model.embed_tokens.weight" in quantized


def test_a_float32_tensor_stays_float32(pack_of: PackOf) -> None:
    pack = Pack(pack_of("qwen3_5_moe"))
    assert pack.tensors["model.layers.0.linear_attn.A_log"].dtype == "F32"


def test_the_largest_group_that_divides_is_used_and_said(pack_of: PackOf, tmp_path) -> None:  # type: ignore[no-untyped-def]
    import flashpack

    report = flashpack.convert(CHECKPOINTS / "qwen3_moe_dense_first_tied", tmp_path / "out", group_size=128)
    kind = Pack(tmp_path / "out").manifest.record_kinds[0]
    assert [str(p.encoding) for p in kind.projections] == ["4-bit g64", "4-bit g64", "bf16"]
    assert any("128 does not divide 64" in n for n in report.notices)
    assert any("40 input values" in n and "kept as bf16" in n for n in report.notices)


def test_every_large_file_opens_in_the_safetensors_library(pack_of: PackOf) -> None:
    pack = pack_of("trained")
    tensors = Pack(pack).tensors
    files = sorted(pack.rglob("*.safetensors"))
    assert len(files) == 7
    seen = 0
    for path in files:
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118 - not a dict
                if name in tensors:
                    assert list(f.get_slice(name).get_shape()) == list(tensors[name].shape)
                    seen += 1
    assert seen == len(tensors)


def test_records_and_large_tensors_start_on_pages(pack_of: PackOf) -> None:
    pack = Pack(pack_of("trained"))
    for layer in pack.manifest.layers:
        with pack.open_shard(layer) as shard:
            assert all(shard.extent(e)[0] % 16384 == shard.extent(e)[1] % 16384 == 0 for e in range(layer.experts))
    for t in pack.manifest.tensors:
        assert t.offset % (16384 if t.nbytes >= 65536 else 64) == 0
