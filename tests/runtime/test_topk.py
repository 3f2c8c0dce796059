"""Fewer experts per token: what transformers gives for such a configuration, and refused where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

import flashpack
from flashpack.errors import UsageError
from flashpack.runtime import topk
from tests.conftest import CHECKPOINTS, PackOf
from tests.families.table import FAMILIES as TABLE
from tests.families.trial import logits_of, make
from tests.runtime.test_lean import decode, some_ids

FAMILIES = ["qwen3_moe", "qwen2_moe", "qwen3_5_moe", "mixtral", "deepseek_v3", "glm4_moe", "olmoe", "gpt_oss"]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_a_model_with_fewer(pack_of: PackOf, name: str, reference: bool) -> None:
    pack, ids = pack_of(name, "source", "source"), some_ids(12)
    model = flashpack.load(pack, experts_per_token=1, reference=reference)
    own = model.flashpack.experts_per_token[1]
    assert model.flashpack.experts_per_token[0] == 1 < own
    config = AutoConfig.from_pretrained(CHECKPOINTS / name)
    topk.use_fewer(config, 1)
    theirs = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, config=config, dtype=torch.float32)
    expected, _ = decode(theirs, ids, 4)
    found, _ = decode(model, ids, 4)
    assert (found - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())
    others, _ = decode(flashpack.load(pack, reference=reference), ids, 4)
    assert (found - others).abs().max() > 1e-2


def test_what_cannot_be_is_refused(pack_of: PackOf) -> None:
    pack = pack_of("qwen3_moe", "source", "source")
    own = flashpack.load(pack).flashpack.experts_per_token[1]
    with pytest.raises(UsageError, match=f"--experts-per-token {own + 1}: from 1 to {own}"):
        flashpack.load(pack, experts_per_token=own + 1)
    with pytest.raises(UsageError, match="does not say how many"):
        topk.use_fewer(PretrainedConfig(), 1)


def test_a_router_that_asks_its_configuration_at_each_use_takes_fewer(tmp_path: Path) -> None:
    whole = make(TABLE["gemma4"], tmp_path)
    flashpack.convert(tmp_path / "source", tmp_path / "pack", "source", "source")
    config = type(whole.config).from_pretrained(tmp_path / "saved")
    topk.use_fewer(config, 1)
    theirs = type(whole).from_pretrained(
        tmp_path / "saved", config=config, dtype=torch.float32, experts_implementation="eager"
    )
    expected = logits_of(theirs.eval(), 96)
    found = logits_of(flashpack.load(tmp_path / "pack", experts_per_token=1), 96)
    assert (found - expected).abs().max() <= 1e-4
    assert (found - logits_of(flashpack.load(tmp_path / "pack"), 96)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("phimoe", "routers of PhimoeForCausalLM do not take their number from config"),  # two, always
        ("deepseek_v4", "the pack does not fit such a model: .*tid2eid has shape"),  # some tokens' are in a table
    ],
)
def test_families_that_cannot_have_fewer_are_refused(name: str, message: str, tmp_path: Path) -> None:
    make(TABLE[name], tmp_path)
    flashpack.convert(tmp_path / "source", tmp_path / "pack", "source", "source")
    flashpack.load(tmp_path / "pack", experts_per_token=2)
    with pytest.raises(UsageError, match=f"--experts-per-token.*{message}"):
        flashpack.load(tmp_path / "pack", experts_per_token=1)
