"""What no reader understands, or what contradicts itself, is refused in one line that names the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashpack
from flashpack.converter.source import open_checkpoint
from flashpack.converter.weights import read_tensors
from flashpack.errors import SourceError, UnsupportedError
from tests.converter.variants import VARIANTS, Stored, write_checkpoint

Parts = dict[str, Stored]
Change = Callable[[Parts, dict[str, Any]], None]
"""Changes parts by name, and the quantization's part of config.json."""


def changed(name: str, change: Change, folder: Path) -> Path:
    """A checkpoint of one matrix ``m`` [64, 64] in a variant's format, but for ``change``."""
    parts, _ = VARIANTS[name].make(np.random.default_rng(1), 64, 64)
    config = json.loads(json.dumps(VARIANTS[name].config))
    change(parts, next(iter(config.values())))
    return write_checkpoint(folder, {f"m.{part}": s for part, s in parts.items()}, config)


def message(source: Path, kind: type[SourceError] = SourceError) -> str:
    with pytest.raises(kind) as e:
        read_tensors(open_checkpoint(source))
    text = str(e.value)
    assert "\n" not in text
    return text


def put(part: str, dtype: str, shape: tuple[int, ...]) -> Change:
    """``part`` is of another type and shape."""
    size = {"F32": "f4", "F16": "f2", "BF16": "u2", "I32": "i4"}.get(dtype, "u1")
    return lambda parts, _: parts.update({part: (dtype, np.ones(shape, size))})


def without(part: str) -> Change:
    return lambda parts, _: parts.pop(part) and None


def said(**parameters: Any) -> Change:
    return lambda _, config: config.update(parameters)


def weights(**arguments: Any) -> Change:
    return lambda _, config: config["config_groups"]["group_0"]["weights"].update(arguments)


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "aqlm", "quark", "torchao", "quanto", "a new one"])
@pytest.mark.parametrize("nested", [False, True])
def test_methods_without_a_reader_are_refused_by_name(method: str, nested: bool, tmp_path: Path) -> None:
    config: dict[str, Any] = {"quantization_config": {"quant_method": method}}
    source = write_checkpoint(tmp_path, {}, {"text_config": config} if nested else config)
    assert f"quantized with {method!r} are not supported" in message(source, UnsupportedError)


def test_modelopts_own_file_is_read(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, {}, {})
    (source / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "W4A16_AWQ"}}')
    assert "quant_algo 'W4A16_AWQ' is not supported" in message(source, UnsupportedError)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("auto-round", said(packing_format="auto_round:fp8"), "packing_format 'auto_round:fp8' is not supported"),
        ("int4", said(format="marlin-24"), "format 'marlin-24' is not supported"),
        ("int4", said(sparsity_config={"format": "sparse-24-bitmask"}), "format 'sparse-24-bitmask' is not supported"),
        ("int4", said(transform_config={"config_groups": {"u": {}}}), "transforms (rotated weights) are not supported"),
        ("int4", weights(num_bits=3), "m.weight_packed: packed integers of 3 bits are not supported"),
        ("fp8-tensor", said(quant_algo="W4A8_AWQ"), "quant_algo 'W4A8_AWQ' is not supported"),
        ("gptq", said(checkpoint_format="marlin"), "m.qweight: checkpoint_format 'marlin' is not supported"),
        ("gptq", said(bits=5), "m.qweight: 5 bits are not supported"),
        ("awq", said(version="gemv"), "m.qweight: AWQ version 'gemv' is not supported"),
        ("awq", said(backend="llm-awq"), "m.qweight: AWQ backend 'llm-awq' is not supported"),
        ("awq", said(bits=3), "m.qweight: AWQ of 3 bits is not supported"),
        ("mlx-mxfp4", said(mode="mxfp6"), "mode 'mxfp6' of m is not supported"),
        ("fp8-ragged", put("weight", "F8_E5M2", (64, 64)), "m.weight is stored as F8_E5M2; supported here: F8_E4M3"),
        ("nvfp4-modelopt", put("weight_scale_2", "BF16", ()), "m.weight_scale_2 is stored as BF16"),
    ],
)  # fmt: skip
def test_kinds_that_are_not_supported_are_refused_by_name(
    name: str, change: Change, expected: str, tmp_path: Path
) -> None:
    assert expected in message(changed(name, change, tmp_path), UnsupportedError)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("fp8-ragged", put("weight_scale_inv", "F32", (3, 3)), "m.weight_scale_inv ... [3, 3]; ... says, need [2, 2]"),
        ("fp8-ragged", said(weight_block_size=[32, 0]), "weight_block_size [32, 0] is no pair of sizes"),
        ("mxfp4-compressed", put("weight_scale", "U8", (64, 4)), "m.weight_scale ... [64, 4]; ... 32 needs [64, 2]"),
        ("nvfp4-compressed", put("weight_scale", "F8_E4M3", (64, 2)), "m.weight_scale ... [64, 2]; ... needs [64, 4]"),
        ("nvfp4-compressed", put("weight_global_scale", "F32", (64,)), "m.weight_global_scale ... [64]; ... need [1]"),
        ("int4", weights(group_size=64), "m.weight_scale ... [64, 2]; ... config.json says, needs [64, 1]"),
        ("int4-zeros", put("weight_zero_point", "I32", (8, 3)), "m.weight_zero_point ... [8, 3]; ... needs [8, 2]"),
        ("int4", said(config_groups={}), "m: quantized, but of no group in config.json's config_groups"),
        ("gptq", said(group_size=64), "m.scales ... [2, 64]; ... config.json says, needs [1, 64]"),
        ("gptq", said(bits=8), "m.scales ... [2, 64]; ... config.json says, needs [1, 64]"),
        ("gptq", said(group_size=None), "m.qweight: config.json's quantization gives no group_size; found None"),
        ("awq", said(group_size=16), "m.scales ... [2, 64]; ... config.json says, needs [4, 64]"),
        ("mlx-affine-2", said(bits=4), "m.scales ... [64, 2]; ... config.json says, need [64, 1]"),
        ("mlx-mxfp4", said(mode="affine"), "m.weight has no biases, but config.json says mode 'affine'"),
        ("mlx-affine-2", said(mode="mxfp4"), "m.weight has biases, but config.json says mode 'mxfp4'"),
        ("mlx-affine-2", said(m=False), "quantization of m is False, but the module has scales"),
    ],
)  # fmt: skip
def test_shapes_and_configuration_must_agree(name: str, change: Change, expected: str, tmp_path: Path) -> None:
    found = message(changed(name, change, tmp_path))
    for text in expected.split(" ... "):
        assert text in found


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("fp8-ragged", without("weight_scale_inv"), "m.weight is stored as F8_E4M3 without scales"),
        ("int4", without("weight_scale"), "m.weight_packed: m.weight_scale is missing"),
        ("gptq", without("qzeros"), "m.qweight: m.qzeros is missing"),
        ("awq", without("scales"), "m.qweight: m.scales is missing"),
        ("int4", without("weight_packed"), "m.weight_scale belongs to no quantized tensor"),
        ("gptq", without("qweight"), "belongs to no quantized tensor"),
        ("nvfp4-modelopt", put("pre_quant_scale", "F32", (64,)), "m.pre_quant_scale belongs to no quantized tensor"),
        ("int8-bytes", without("weight_scale"), "m.weight is stored as I8, in no form that is known"),
        ("int4", put("weight", "BF16", (64, 64)), "m.weight is there in another form, too"),
        ("gptq", said(quant_method="fp8"), "m.qweight belongs to no quantized tensor"),
    ],
)  # fmt: skip
def test_no_part_may_be_missing_or_left_over(name: str, change: Change, expected: str, tmp_path: Path) -> None:
    assert expected in message(changed(name, change, tmp_path))


def swap_groups(parts: Parts, _: dict[str, Any]) -> None:
    parts["g_idx"] = ("I32", parts["g_idx"][1][::-1].copy())


def no_such_group(parts: Parts, config: dict[str, Any]) -> None:
    name = "g_idx" if "g_idx" in parts else "weight_g_idx"
    parts[name] = ("I32", parts[name][1] + np.int32(1))


def huge(dtype: str, value: float) -> Change:
    def change(parts: Parts, _: dict[str, Any]) -> None:
        name = "scales" if "scales" in parts else "weight_scale"
        scale = np.full(parts[name][1].shape, value, np.float32)
        bits = (scale.view(np.uint32) >> 16).astype(np.uint16)
        parts[name] = (dtype, bits if dtype == "BF16" else scale.astype(np.float16))

    return change


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("gptq", swap_groups, "g_idx is not in order, although config.json says desc_act false"),
        ("gptq-order", no_such_group, "g_idx names a group that is not there; there are 2"),
        ("int4-order", no_such_group, "weight_g_idx names a group that is not there; there are 2"),
        ("gptq", said(sym=True), "zero points are not all 8, although config.json says sym true"),
        ("int4-float16", huge("F16", 9000), "a scale of 9000 with zero point 8 is too large for F16"),
        ("int4", huge("BF16", 2e38), "is too large for BF16"),
        ("int4", huge("BF16", np.inf), "a scale of inf with zero point 8 is too large for BF16"),
        ("awq", huge("F16", np.nan), "a scale of nan"),
    ],
)  # fmt: skip
def test_stored_values_that_cannot_be_carried_over_are_refused_when_they_are_read(
    name: str, change: Change, expected: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(changed(name, change, tmp_path))
    tensor = read_tensors(checkpoint)[0]["m.weight"]
    with pytest.raises(SourceError, match=r"^tensor m\.weight: ") as e:
        tensor.stored(checkpoint.folder) if tensor.encoding else tensor.values(checkpoint.folder)
    assert expected in str(e.value)


def test_a_scale_of_8000_in_float16_is_carried_over(tmp_path: Path) -> None:
    """8 * 8000 is still below 65504."""
    checkpoint = open_checkpoint(changed("int4-float16", huge("F16", 8000), tmp_path))
    stored = read_tensors(checkpoint)[0]["m.weight"].stored(checkpoint.folder)
    assert (stored["biases"] == -64000).all()


def test_scales_of_activations_and_caches_are_dropped_and_listed(tmp_path: Path) -> None:
    from tests.converter.test_weights_logits import quantized

    source, _ = quantized("nvfp4-modelopt", tmp_path / "source")
    report = flashpack.convert(source, tmp_path / "pack")
    assert "model.layers.0.mlp.experts.0.up_proj.input_scale" in report.dropped
    assert len(report.dropped) == sum(name.endswith("input_scale") for name in open_checkpoint(source).stored)
