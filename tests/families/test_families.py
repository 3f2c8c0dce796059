"""Every family of the installed transformers whose experts have its hook: converted, loaded, compared; or refused."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import flashpack
from flashpack.converter import plan as plan_of
from flashpack.errors import SourceError, UnsupportedError
from flashpack.formats import Pack
from flashpack.formats.manifest import Manifest
from tests.conftest import ROOT
from tests.families.document import DOCUMENT, families_in
from tests.families.table import FAMILIES, REFUSED, hooked
from tests.families.trial import logits_of, make, run, write_config

TOLERANCE = 1e-4

BESIDE = re.compile(
    r"visual|vision|audio|(^|\.)mtp\.|projector|patch_merge|pre_mm_|image_newline|view_sep|sam_model|qwen2_model"
    r"|^talker\.|^code2wav\.|inv_freq|embed_vision|embed_audio"
)
"""Names of the tiny checkpoints that no text model needs; nothing else may be left out."""


def packed_values(manifest: Manifest) -> int:
    """Values in the shards."""
    total = 0
    for layer in manifest.layers:
        for kind, count in layer.kinds:
            projections = manifest.record_kinds[kind].projections
            total += count * sum(math.prod(p.shape) + (p.shape[0] if p.bias else 0) for p in projections)
    return total


def test_the_table_has_every_family_that_has_the_hook() -> None:
    assert sorted([*FAMILIES, *REFUSED]) == hooked()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_runs_as_in_transformers(name: str, tmp_path: Path) -> None:
    outcome = run(FAMILIES[name], tmp_path)
    assert outcome.difference <= TOLERANCE
    assert outcome.scale > 0.05  # logits that say something
    manifest = outcome.manifest
    assert len(manifest.layers) >= 2
    # Every value of the checkpoint is in the pack once, or in the report: routed experts in shards, the rest dense.
    experts, dense = packed_values(manifest), sum(outcome.dense_values.values())
    assert experts == outcome.expert_values
    dropped = sum(outcome.source_values[name] for name in outcome.report.dropped)
    assert experts + dense + dropped == sum(outcome.source_values.values())
    past = re.compile(rf"layers\.({outcome.layers}|42)\.")
    beside = [n for n in outcome.source_values if BESIDE.search(n) or past.search(n)]
    assert sorted(outcome.report.dropped) == sorted(beside)
    assert not [t for t in outcome.dense_values if re.search(r"\.experts\.(\d|\w+_proj)", t)]


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused_by_name(name: str, tmp_path: Path) -> None:
    config, message = REFUSED[name]
    write_config(config(), tmp_path / "source")
    with pytest.raises(UnsupportedError, match=re.escape(message)) as caught:
        flashpack.convert(tmp_path / "source", tmp_path / "pack")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pack").exists()


def test_the_document_lists_the_families() -> None:
    """Made by ``python tools/families.py``; a new version of transformers may have more."""
    assert families_in((ROOT / DOCUMENT).read_text()) == sorted([*FAMILIES, *REFUSED])


def without_correction_biases(folder: Path) -> Path:
    """The checkpoint in ``folder`` without what experts are chosen by beside the router."""
    path = folder / "source" / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "e_score_correction_bias" not in n}, path)
    return folder / "source"


def test_what_a_checkpoint_may_lack_is_stored_as_transformers_begins_with_it(tmp_path: Path) -> None:
    make(FAMILIES["axk1"], tmp_path)
    report = flashpack.convert(without_correction_biases(tmp_path), tmp_path / "pack", "source", "source")
    lacking = [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)]
    assert [n for n in report.notices if n.startswith("the checkpoint lacks")] == [
        f"the checkpoint lacks {name}, as it may; stored as transformers initializes it" for name in lacking
    ]
    assert not any(Pack(tmp_path / "pack").map_tensor(name).any() for name in lacking)
    expected = reference_logits(tmp_path / "source")
    found = logits_of(flashpack.load(tmp_path / "pack"), expected.shape[1])
    assert (found - expected).abs().max() <= TOLERANCE


def test_what_a_checkpoint_must_have_is_missed(tmp_path: Path) -> None:
    make(FAMILIES["deepseek_v3"], tmp_path)
    with pytest.raises(SourceError, match=r"lacks model\.layers\.1\.mlp\.gate\.e_score_correction_bias"):
        flashpack.convert(without_correction_biases(tmp_path), tmp_path / "pack")


def reference_logits(source: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager"
    )
    return logits_of(model.eval(), model.config.vocab_size)


@pytest.mark.parametrize("name", ["afmoe", "gemma4", "hunyuan_v1_moe", "zaya"])
def test_matrices_inside_a_router_keep_their_type(name: str, tmp_path: Path) -> None:
    make(FAMILIES[name], tmp_path)
    routers = re.compile(r"\.(gate|router)\.(\w+\.)+weight$")
    plan = plan_of(tmp_path / "source")
    encodings = {t.name: t.encoding for t in plan.dense() if routers.search(t.name) and len(t.source.shape) == 2}
    assert encodings
    assert not [n for n, encoding in encodings.items() if encoding.quantized]
    assert any(t.encoding.quantized for t in plan.dense())


@pytest.mark.parametrize("found", ["2", "5"])
def test_the_experts_numbers_must_be_all_there(found: str, tmp_path: Path) -> None:
    """As many as needed are not enough: the gate of one expert would come to the rest of another."""
    make(FAMILIES["qwen3_moe"], tmp_path)
    path = tmp_path / "source" / "model.safetensors"
    lost = rf"(layers\.1\.mlp\.experts\.){found}(\.gate_proj)"
    save_file({re.sub(lost, r"\g<1>9\2", name): tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(SourceError, match=rf"expert {found} is missing, or there twice: .*experts\.\d\.gate_proj"):
        plan_of(tmp_path / "source")
