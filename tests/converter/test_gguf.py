"""GGUF files as sources: the families against transformers, the block formats against the gguf package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import flashpack
from flashpack.converter.report import Report
from flashpack.formats import Pack, affine
from tests.conftest import CHECKPOINTS, TRAINED
from tests.converter.gguf_files import ARCHITECTURES, save_weights, write_gguf
from tests.converter.test_lossless import sections


def logits_of(model: torch.nn.Module, prompt: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = model(torch.from_numpy(prompt)[None]).logits[0].numpy()
    return logits


def rounded(report: Report) -> list[str]:
    return [notice for notice in report.notices if "no tokenizer" not in notice]


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n != TRAINED.name])
def test_logits_equal_the_reference(name: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", name)
    report = flashpack.convert(tmp_path / "model.gguf", tmp_path / "pack", "source", "source")
    assert not rounded(report)
    reference = np.load(CHECKPOINTS / f"{name}.npz")
    found = logits_of(flashpack.load(tmp_path / "pack", reference=True), reference["prompt"])
    assert np.abs(found - reference["logits"]).max() <= 1e-4


CARRIED = {
    "F16": "f16", "BF16": "bf16", "Q4_0": "4-bit g32", "Q4_1": "4-bit g32", "Q5_0": "5-bit g32", "Q5_1": "5-bit g32",
    "Q8_0": "8-bit g32", "MXFP4": "mxfp4",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "experts"),
    [
        *[("qwen3_moe", kind, kind) for kind in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")],
        ("mixtral", "Q4_0", "Q5_1"), ("gpt_oss", "Q8_0", "MXFP4"), ("trained", "Q8_0", "Q4_0"),
    ],
)  # fmt: skip
def test_quantized_values_are_carried_exactly(name: str, kind: str, experts: str, tmp_path: Path) -> None:
    """The reference is transformers' model with the weights as the gguf package decodes them."""
    from transformers import AutoModelForCausalLM

    weights = write_gguf(tmp_path / "model.gguf", name, kind, experts)
    quantized = experts not in ("F16", "BF16")
    choice = "auto" if quantized else "source"
    report = flashpack.convert(tmp_path / "model.gguf", tmp_path / "pack", choice, choice)
    assert not rounded(report)
    manifest = Pack(tmp_path / "pack").manifest
    assert {str(p.encoding) for k in manifest.record_kinds for p in k.projections} == {CARRIED[experts]}
    assert {str(m.encoding) for m in manifest.matrices} == ({CARRIED[kind]} if quantized else set())
    reference = AutoModelForCausalLM.from_pretrained(save_weights(tmp_path / "held", weights, name))
    prompt = np.arange(3, 200, 9)
    found = logits_of(flashpack.load(tmp_path / "pack", reference=True), prompt)
    assert np.abs(found - logits_of(reference, prompt)).max() <= 1e-4


def test_k_quants_are_decoded_once_and_rounded_once(tmp_path: Path) -> None:
    source = wide_checkpoint(tmp_path / "source")
    weights = write_gguf(tmp_path / "model.gguf", source, "F32", "Q6_K", architecture="qwen3moe")
    report = flashpack.convert(tmp_path / "model.gguf", tmp_path / "pack")
    assert rounded(report) == [
        f"experts' {role} projection: no encoding of a pack holds gguf-q6_k exactly; decoded and rounded to q6"
        for role in ("gate", "up", "down")
    ]
    stored = sections(Pack(tmp_path / "pack"), 0, 3)
    values = weights["model.layers.0.mlp.experts.3.gate_proj.weight"]
    words, scales, biases, _ = affine.quantize_starts(values, 6, 64, "BF16")
    for part, array in (("weight", words), ("scales", scales), ("biases", biases)):
        assert stored[f"gate.{part}"].tobytes() == array.tobytes()


def wide_checkpoint(folder: Path) -> Path:
    """A tiny model whose rows have 256 values, as blocks of K-quants need."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(5)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=256, moe_intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=64, norm_topk_prob=True,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder
