"""Exports with weights as they are stored: byte for byte the checkpoint they came from, read by compressed-tensors."""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from safetensors.torch import load_file, save_file

import flashpack
from flashpack.errors import UnsupportedError
from flashpack.export import Report, export
from flashpack.export.compressed import _single_names, quantization_config
from flashpack.export.content import Content
from flashpack.export.content import Stored as StoredMatrix
from flashpack.export.names import Names
from flashpack.export.schemes import Scheme, fits, scheme_of
from flashpack.formats import Pack
from flashpack.formats.dtypes import from_float32
from flashpack.formats.records import MXFP4, Encoding, fp8
from tests.conftest import CHECKPOINTS, PackOf, source_of
from tests.converter.variants import VARIANTS, Stored, write_checkpoint
from tests.export.test_hf import large_files, same, tensors_of


def quantized(name: str, folder: Path, attention: str = "") -> Path:
    """The small Qwen3 with all Linear layers but the router in a format of ``tests/converter/variants``; those of
    attention in another."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    stored: dict[str, Stored] = {}
    for tensor, value in tensors_of(CHECKPOINTS / "qwen3_moe").items():
        if tensor.endswith("_proj.weight"):
            variant = VARIANTS[attention if attention and "self_attn" in tensor else name]
            parts, _ = variant.make(rng, value.shape[0], value.shape[1])
            stored |= {f"{tensor.removesuffix('weight')}{part}": s for part, s in parts.items()}
        else:
            stored[tensor] = ("BF16", value.view(torch.uint16).numpy())
    config = json.loads((CHECKPOINTS / "qwen3_moe" / "config.json").read_text())
    return write_checkpoint(folder, stored, config | VARIANTS[name].config)


def compressed(pack: Path, out: Path) -> tuple[dict[str, Any], Report]:
    """The ``quantization_config`` of an export, and its report."""
    report = export(pack, out, "hf", weights="compressed")
    return json.loads((out / "config.json").read_text())["quantization_config"], report


@pytest.mark.parametrize("name", ["qwen3_moe-ct_int4", "qwen3_moe-nvfp4", "qwen3_moe-fp8block"])
def test_every_tensor_is_the_one_it_came_from(name: str, pack_of: PackOf, tmp_path: Path) -> None:
    config, _ = compressed(pack_of(name, "source", "source"), tmp_path / "export")
    expected, found = tensors_of(source_of(name)), tensors_of(tmp_path / "export")
    assert found.keys() == expected.keys()
    differing = [n for n in expected if not same(found[n], expected[n])]
    assert [n for n in differing if not n.endswith("weight_shape")] == []
    assert all(found[n].tolist() == expected[n].tolist() for n in differing)
    before = json.loads((source_of(name) / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == before["quant_method"]
    if "weight_block_size" in before:
        assert config["weight_block_size"] == before["weight_block_size"]
        assert {*config["modules_to_not_convert"], "model.embed_tokens"} == {*before["modules_to_not_convert"]}
    else:
        assert config["format"] == before["format"]


@pytest.mark.parametrize(
    "name", ["int4", "int8-bytes", "gptq-symmetric", "mxfp4-deepseek", "mlx-nvfp4", "fp8-channel", "fp8-tensor"]
)
def test_compressed_tensors_decodes_what_the_pack_holds(name: str, tmp_path: Path) -> None:
    """The library's own decoding of each matrix in float32, and the values of the pack by its plain export."""
    flashpack.convert(quantized(name, tmp_path / "source"), tmp_path / "pack", "source", "source")
    config, _ = compressed(tmp_path / "pack", tmp_path / "export")
    export(tmp_path / "pack", tmp_path / "plain", "hf")
    stored, plain = tensors_of(tmp_path / "export"), tensors_of(tmp_path / "plain")
    group = QuantizationConfig(**{k: v for k, v in config.items() if k != "quant_method"}).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group.format)
    count = 0
    for weight in (n for n in plain if n.endswith("_proj.weight")):
        stem = weight.removesuffix("weight")
        parts = {n.removeprefix(stem): t for n, t in stored.items() if n.startswith(stem)}
        if parts["weight_scale"].dtype in (torch.bfloat16, torch.float16):
            parts["weight_scale"] = parts["weight_scale"].float()
        decoded = compressor.decompress(parts, group)["weight"].float()
        assert torch.equal(decoded.bfloat16(), plain[weight]), weight
        count += 1
    assert count == 3 * (4 + 8 * 3)
    if name != "mlx-nvfp4":  # which comes back with a scale of 1 for each matrix
        flashpack.convert(tmp_path / "export", tmp_path / "back", "source", "source")
        assert large_files(Pack(tmp_path / "back").manifest) == large_files(Pack(tmp_path / "pack").manifest)


def test_zero_points_of_the_dense_part_are_kept(tmp_path: Path) -> None:
    """And experts without, as in the format's own packing of zero points along the rows."""
    source = quantized("int4", tmp_path / "source", "int4-zeros")
    flashpack.convert(source, tmp_path / "pack", "source", "source")
    config, report = compressed(tmp_path / "pack", tmp_path / "export")
    assert report.losses == []
    expected, found = tensors_of(source), tensors_of(tmp_path / "export")
    zeros = [n for n in expected if n.endswith(".weight_zero_point")]
    assert len(zeros) == 12
    assert zeros == [n for n in found if n.endswith(".weight_zero_point")]
    assert [n for n in found if "self_attn" in n and "_shape" not in n and not same(found[n], expected[n])] == []
    export(tmp_path / "pack", tmp_path / "plain", "hf")
    plain = tensors_of(tmp_path / "plain")
    groups = QuantizationConfig(**{k: v for k, v in config.items() if k != "quant_method"}).config_groups
    assert [g.weights.symmetric for g in groups.values()] == [True, False]
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for weight in (n for n in plain if n.endswith("_proj.weight") and "self_attn" in n):
        parts = {n.removeprefix(weight.removesuffix("weight")): t for n, t in found.items()}
        decoded = compressor.decompress({p: t for p, t in parts.items() if p.startswith("weight_")}, groups["group_1"])[
            "weight"
        ]
        assert torch.equal(decoded, plain[weight]), weight
    flashpack.convert(tmp_path / "export", tmp_path / "back", "source", "source")
    assert large_files(Pack(tmp_path / "back").manifest) == large_files(Pack(tmp_path / "pack").manifest)


@pytest.mark.parametrize(
    ("dtype", "scale", "bias", "fit"),
    [
        ("F32", 2.5, -2.5, True), ("F32", 2.5, -37.5, True), ("F32", 2.5, -40.0, False), ("F32", 2.5, 2.5, False),
        ("F32", 2.5, -3.75, False), ("F32", 1 + 2.0**-12, -1 - 2.0**-12, False), ("BF16", 2.5, -20.0, True),
        ("BF16", 2.5, -17.5, False),
    ],
)  # fmt: skip
def test_zero_points_are_codes(dtype: str, scale: float, bias: float, fit: bool) -> None:
    """Of 4 bits: from 0 to 15, and the middle where there is no place for them. Scales have the bits of a half."""
    parts = {
        "weight": np.zeros((1, 4), dtype="<u4"),
        "scales": from_float32(np.full((1, 1), scale, dtype="<f4"), dtype),
        "biases": from_float32(np.full((1, 1), bias, dtype="<f4"), dtype),
    }
    assert fits(StoredMatrix("a", (1, 32), Encoding("affine", dtype, 4, 32), parts)) == fit


def test_transformers_loads_integers(pack_of: PackOf, tmp_path: Path) -> None:
    """Its weights are those of the plain export."""
    from transformers import AutoModelForCausalLM

    pack = pack_of("qwen3_moe-ct_int4", "source", "source")
    compressed(pack, tmp_path / "export")
    export(pack, tmp_path / "plain", "hf")
    load = AutoModelForCausalLM.from_pretrained
    expected = load(tmp_path / "plain", dtype=torch.bfloat16).state_dict()
    found = load(tmp_path / "export", dtype=torch.bfloat16).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_dense_matrices_that_do_not_fit_are_decoded_and_named(pack_of: PackOf, tmp_path: Path) -> None:
    """Experts as in the source, attention in flashpack's own 8 bits."""
    pack = pack_of("qwen3_moe-ct_int4", "source", "q8")
    config, report = compressed(pack, tmp_path / "export")
    export(pack, tmp_path / "plain", "hf")
    found, plain = tensors_of(tmp_path / "export"), tensors_of(tmp_path / "plain")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert same(found[name], plain[name])
    assert "model.layers.1.mlp.experts.3.up_proj.weight_packed" in found
    (line,) = report.losses
    assert line.startswith("dense, 8-bit g64: decoded, and ")
    linear = torch.nn.Linear(1, 1)
    assert is_match("model.layers.1.self_attn.q_proj", linear, config["ignore"])
    assert is_match("model.layers.2.mlp.gate", linear, config["ignore"])
    assert not is_match("model.layers.1.mlp.experts.3.up_proj", linear, config["ignore"])


def test_scales_of_whole_matrices_that_engines_do_not_apply_are_named(pack_of: PackOf, tmp_path: Path) -> None:
    flashpack.convert(quantized("nvfp4-compressed", tmp_path / "source"), tmp_path / "pack", "source", "source")
    _, report = compressed(tmp_path / "pack", tmp_path / "export")
    assert report.losses == [
        "for vLLM: transformers 5.23 decodes nvfp4 experts without weight_global_scale, which gives other values",
        "in 24 of 24 experts gate and up have different weight_global_scales; vLLM takes gate's for both",
    ]


@pytest.mark.parametrize(
    ("name", "experts", "message"),
    [
        ("qwen3_moe", "source", "nothing in it is quantized as in compressed-tensors"),
        ("qwen3_moe", "q4", "expert 0: gate of 4-bit g64 has biases that are no multiples of its scales"),
        ("qwen3_moe", "q5", "no place for experts of 5-bit g64"),
        ("qwen3_moe", "gate_up=q4,down=q8", r"matrices of several encodings \(4-bit g64, 8-bit g64\)"),
        ("qwen3_moe-awq", "source", "neither vLLM nor transformers takes experts with zero points"),
        ("gpt_oss-mxfp4", "source", "no place for experts with biases"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, experts: str, message: str, pack_of: PackOf, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"{message}.*; use --weights bf16$"):
        export(pack_of(name, experts, "source"), tmp_path / "export", "hf", weights="compressed")
    assert list(tmp_path.iterdir()) == []


def test_experts_that_are_published_in_one_tensor_are_refused(pack_of: PackOf) -> None:
    content = Content(Pack(pack_of("granitemoe", "source", "source")), lambda count: None)
    (site, *_), names = content.sites.values(), Names(content.model)
    with pytest.raises(UnsupportedError, match=r"layer 0: .* in one tensor, .* one by one; use --weights bf16"):
        _single_names(site, names.experts(site), site.projections(), "layer 0")


def test_one_bias_that_does_not_fit_is_seen(pack_of: PackOf) -> None:
    content = Content(Pack(pack_of("qwen3_moe-ct_int4", "source", "source")), lambda count: None)
    gate = next(content.experts(content.layers[0])).matrices["gate"]
    assert fits(gate)
    biases = gate.parts["biases"].copy()
    biases[5, 1] ^= 1
    assert not fits(replace(gate, parts={**gate.parts, "biases": biases}))


def test_an_expert_that_does_not_fit_after_some_that_do_is_refused(tmp_path: Path) -> None:
    """An MLX checkpoint whose first experts happen to have their zero in the middle."""
    source = shutil.copytree(source_of("qwen3_moe-mlx4"), tmp_path / "source")
    for path in sorted(source.glob("*.safetensors")):
        tensors = load_file(path)
        for name in [n for n in tensors if "switch_mlp" in n and n.endswith(".biases")]:
            tensors[name][:3] = -8 * tensors[name.replace("biases", "scales")][:3]
        save_file(tensors, path, {"format": "mlx"})
    flashpack.convert(source, tmp_path / "pack", "source", "source")
    with pytest.raises(UnsupportedError, match="layer 0, expert 3: gate of 4-bit g32 has biases"):
        export(tmp_path / "pack", tmp_path / "export", "hf", weights="compressed")
    assert {p.name for p in tmp_path.iterdir()} == {"source", "pack"}


def test_several_schemes_have_groups_that_name_their_modules() -> None:
    integers = scheme_of(Encoding("affine", "BF16", 4, 32))
    floats = scheme_of(fp8("F32", (1, 0)))
    assert integers is not None
    assert floats is not None
    chosen: dict[str, Scheme | None] = {}
    for layer in range(12):
        chosen |= {f"model.layers.{layer}.self_attn.q_proj": floats if layer else None}
        chosen |= {f"model.layers.{layer}.mlp.gate": None}
        chosen |= {f"model.layers.{layer}.mlp.experts.{e}.up_proj": integers for e in range(11)}
    config = quantization_config(chosen)
    assert config["format"] == "mixed-precision"
    parsed = QuantizationConfig(**{k: v for k, v in config.items() if k != "quant_method"})
    groups = list(parsed.config_groups.values())
    assert [g.format for g in groups] == ["pack-quantized", "float-quantized"]
    linear = torch.nn.Linear(1, 1)
    for name, scheme in chosen.items():
        matching = [g.format for g in groups if is_match(name, linear, g.targets, parsed.ignore)]
        assert matching == ([scheme.format] if scheme else []), name
    with pytest.raises(UnsupportedError, match="blocks of fp8 cannot stand beside"):
        quantization_config({"a": scheme_of(fp8("F32", (128, 128))), "b": scheme_of(MXFP4)})
