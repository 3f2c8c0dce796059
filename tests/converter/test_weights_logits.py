"""Checkpoints of every source format, converted with the defaults: the logits are those of their decoded weights."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import flashpack
from flashpack.formats import Pack
from tests.conftest import CHECKPOINTS, PackOf
from tests.converter.variants import VARIANTS, Stored, write_checkpoint

EXACT = (
    "fp8-ragged", "fp8-e8m0", "fp8-tensor", "fp8-channel", "mxfp8", "mxfp4-deepseek", "nvfp4-compressed",
    "nvfp4-modelopt", "int4", "int4-zeros", "int8-bytes-zeros", "gptq-v2", "gptq-3", "auto-round", "mlx-mxfp4",
    "mlx-mxfp8",
)  # fmt: skip
ROUNDED = ("int4-float32", "gptq-order")


def plain() -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The tensors and the configuration of a small model that is not quantized."""
    folder = CHECKPOINTS / "qwen3_moe"
    tensors = {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}
    return tensors, json.loads((folder / "config.json").read_text())


def quantized(name: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint with all linear layers but the router in a variant's format, and the values of its tensors."""
    variant, rng = VARIANTS[name], np.random.default_rng(zlib.crc32(name.encode()))
    values, config = plain()
    stored: dict[str, Stored] = {}
    for tensor, value in values.items():
        if tensor.endswith("_proj.weight"):
            parts, decoded = variant.make(rng, value.shape[0], value.shape[1])
            stored |= {f"{tensor.removesuffix('weight')}{part}": s for part, s in parts.items()}
            values[tensor] = torch.from_numpy(decoded)
        else:
            stored[tensor] = ("BF16", value.view(torch.uint16).numpy())
    return write_checkpoint(folder, stored, config | variant.config), values


def logits_of(model: torch.nn.Module) -> np.ndarray:
    prompt = torch.arange(20)[None] * 7 % 256
    with torch.inference_mode():
        logits: np.ndarray = model(prompt).logits[0].numpy()
    return logits


def reference(values: dict[str, torch.Tensor], folder: Path) -> np.ndarray:
    """transformers' logits of the decoded values, in float32."""
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    save_file({name: v.float().contiguous() for name, v in values.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(plain()[1]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    return logits_of(model)


@pytest.mark.parametrize("name", EXACT)
def test_a_format_that_a_pack_holds_is_carried_over_without_rounding(name: str, tmp_path: Path) -> None:
    source, values = quantized(name, tmp_path / "source")
    report = flashpack.convert(source, tmp_path / "pack")
    assert report.errors == []
    assert not any("rounded" in n or "kept as" in n for n in report.notices)
    manifest = Pack(tmp_path / "pack").manifest
    assert manifest.recipe["source_format"] == VARIANTS[name].label
    assert (manifest.recipe["experts"], manifest.recipe["dense"]) == ("source", "source")
    assert {str(p.encoding) for k in manifest.record_kinds for p in k.projections} == {VARIANTS[name].encoding}
    found = logits_of(flashpack.load(tmp_path / "pack", reference=True))
    assert np.abs(found - reference(values, tmp_path / "plain")).max() <= 1e-4


@pytest.mark.parametrize("name", ROUNDED)
def test_a_format_that_no_encoding_holds_is_rounded_once_and_said(name: str, tmp_path: Path) -> None:
    source, values = quantized(name, tmp_path / "source")
    report = flashpack.convert(source, tmp_path / "pack")
    label = VARIANTS[name].label
    assert any(f"no encoding of a pack holds {label} exactly; decoded and rounded to q4" in n for n in report.notices)
    # Rounded to 4 bits once more; an own grid of 16 values is not far from the source's.
    assert 0 < max(e.largest for e in report.errors) < 0.1
    found = logits_of(flashpack.load(tmp_path / "pack", reference=True))
    expected = reference(values, tmp_path / "plain")
    assert np.abs(found - expected).mean() <= 0.2 * np.abs(expected).mean()


def test_an_explicit_width_rounds_decoded_values(tmp_path: Path) -> None:
    source, values = quantized("fp8-ragged", tmp_path / "source")
    report = flashpack.convert(source, tmp_path / "pack", "q8", "q8")
    assert any("a second time" in n for n in report.notices)
    found = logits_of(flashpack.load(tmp_path / "pack", reference=True))
    expected = reference(values, tmp_path / "plain")
    assert 1e-4 < np.abs(found - expected).mean() <= 0.05 * np.abs(expected).mean()


PUBLISHED = ["fp8block", "ct_int4", "nvfp4", "gptq", "awq"]


@pytest.mark.parametrize("name", [*(f"qwen3_moe-{kind}" for kind in PUBLISHED), "gpt_oss-mxfp4"])
def test_checkpoints_made_by_other_programs_give_their_reference_logits(pack_of: PackOf, name: str) -> None:
    reference = np.load(CHECKPOINTS / f"{name}.npz")
    model = flashpack.load(pack_of(name), reference=True)
    prompt = torch.from_numpy(reference["prompt"])[None]
    with torch.inference_mode():
        found = model(prompt).logits[0].numpy()
    assert np.abs(found - reference["logits"]).max() <= 1e-4
    tokens = model.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=-1)[0, prompt.shape[1] :]
    close = np.flatnonzero(reference["greedy_margin"] <= 2e-4)
    sure = int(close[0]) if len(close) else 16
    assert tokens[:sure].tolist() == reference["greedy"][:sure].tolist()
