"""One family's trial: a tiny checkpoint is converted, loaded, and compared with transformers' own model of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

import flashpack
from flashpack.converter import Report
from flashpack.formats import Pack
from flashpack.formats.manifest import Manifest
from tests.families.checkpoint import randomize, write
from tests.families.published import as_saved

PROMPT, STEPS = 20, 4
"""Tokens of the prompt, and tokens then decoded greedily with the cache."""

Publish = Callable[[dict[str, torch.Tensor], dict[str, Any]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Family:
    """How to make a tiny checkpoint of a family: a configuration, the class (else the causal one), and what its
    released names differ in."""

    config: Callable[[], PretrainedConfig]
    model: str = ""
    publish: Publish = as_saved


@dataclass(frozen=True)
class Outcome:
    """What came of a trial. ``scale``: the largest logit. ``expert_values``: how many the routed experts have in the
    text model that transformers made; ``source_values``, ``dense_values``: the checkpoint's tensors and those of the
    pack's dense part, by name. ``layers`` of the text model."""

    report: Report
    manifest: Manifest
    difference: float
    scale: float
    expert_values: int
    source_values: dict[str, int]
    dense_values: dict[str, int]
    layers: int


def make(family: Family, folder: Path) -> PreTrainedModel:
    """Write the checkpoint; return the model it is of."""
    config = family.config()
    config._experts_implementation = "eager"
    kind: Any = getattr(transformers, family.model) if family.model else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    torch.manual_seed(0)
    model: PreTrainedModel = kind(config)
    randomize(model, seed=0)
    write(model, folder, family.publish)
    return model


def reference_of(kind: Any, folder: Path) -> PreTrainedModel:
    """transformers' own model of the checkpoint that it saved, in float32, by its plainest code."""
    model, info = kind.from_pretrained(
        folder,
        dtype=torch.float32,
        experts_implementation="eager",
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"], info["missing_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    result: PreTrainedModel = model.eval()
    return result


def expert_values(model: Any) -> int:
    """Values of the routed experts of the text model."""
    found = (m for m in model.get_decoder().modules() if hasattr(m, "has_gate") and hasattr(m, "is_transposed"))
    return sum(p.numel() for m in found for p in m.parameters(recurse=False))


def logits_of(model: PreTrainedModel, vocabulary: int) -> torch.Tensor:
    """[prompt and decoded tokens, vocabulary]: of the whole prompt, and of each step of greedy decoding."""
    prompt = torch.randint(3, vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = model(input_ids=prompt, attention_mask=torch.ones_like(prompt)).logits[0].float()
        steps = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=-1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.cat([whole, *(s.float() for s in steps.logits)])


def write_config(config: PretrainedConfig, folder: Path) -> None:
    """A checkpoint of no more than a configuration and one tensor."""
    config.save_pretrained(folder)
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors")


def run(family: Family, folder: Path) -> Outcome:
    """Make a checkpoint in ``folder``, convert it, load the pack with the smallest budget, and compare."""
    model = make(family, folder)
    reference = reference_of(type(model), folder / "saved")
    vocabulary = reference.config.get_text_config().vocab_size
    expected = logits_of(reference, vocabulary)
    report = flashpack.convert(folder / "source", folder / "pack", experts="source", dense="source")
    packed = flashpack.load(folder / "pack", memory="smallest")
    found = logits_of(packed, vocabulary)
    with safe_open(folder / "source" / "model.safetensors", "pt") as file:
        values = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    pack = Pack(folder / "pack")
    return Outcome(
        report,
        pack.manifest,
        float((found - expected).abs().max()),
        float(expected.abs().max()),
        expert_values(model),
        values,
        {name: math.prod(t.shape) for name, t in pack.tensors.items()},
        reference.config.get_text_config().num_hidden_layers,
    )
