"""The model class on the meta device: the converter's checklist of names and shapes, the runtime's frame.

Shared by ``converter`` and ``runtime``, which never import each other. Everything model-specific is transformers'
own: configuration, modules, names. The only structure flashpack looks for is the experts module, known by the
attributes that transformers' ``use_experts_implementation`` gives it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashpack.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

_COUNT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
    "ffn_config",
)
_HOOK_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")


@dataclass(frozen=True)
class ExpertsModule:
    """The routed experts of one layer: module path, layer index and shapes."""

    name: str
    layer: int
    module: nn.Module
    num_experts: int
    parameters: dict[str, tuple[int, int, int]]

    @property
    def has_gate(self) -> bool:
        return "gate_up_proj" in self.parameters


def read_config(folder: Path) -> PretrainedConfig:
    """The text model's configuration from ``folder/config.json``; never runs code from the folder."""
    import transformers
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise UnsupportedError(f"{path}: missing; flashpack needs the checkpoint's config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError, TypeError) as e:
        kind = re.search(r'"model_type"\s*:\s*"([^"]*)"', path.read_text(errors="replace"))
        named = f"model_type {kind[1]!r}" if kind else "its model_type"
        raise UnsupportedError(
            f"{path}: {named} is not supported by transformers {transformers.__version__}: {_first_line(e)}"
        ) from e
    text: PretrainedConfig = config.get_text_config(decoder=True)
    return text


def build(
    config: PretrainedConfig, experts_implementation: str = "eager", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The causal language model of ``config`` with every parameter on the meta device, in ``dtype`` (float32)."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype or torch.float32, experts_implementation=experts_implementation
            )
    except ValueError as e:
        raise UnsupportedError(
            f"model_type {config.model_type!r} has no causal language model: {_first_line(e)}"
        ) from e
    model.train(False)
    return model


def find_experts(model: PreTrainedModel) -> list[ExpertsModule]:
    """All experts modules, in layer order; refuses what flashpack does not understand, by name."""
    family = model.config.model_type
    found = []
    for name, module in model.named_modules():
        if not all(hasattr(module, a) for a in _HOOK_ATTRIBUTES):
            continue
        odd = {
            "expert biases": module.has_bias,
            "transposed expert weights": module.is_transposed,
            "interleaved gate and up rows": not module.is_concatenated,
            "a norm after each expert": module.has_post_expert_norm,
        }
        if any(odd.values()):
            what = ", ".join(k for k, v in odd.items() if v)
            raise UnsupportedError(f"model_type {family!r}: {what} are not supported yet")
        shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
        if set(shapes) not in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"}):
            raise UnsupportedError(f"model_type {family!r}: expert parameters {sorted(shapes)} are not understood")
        layer = re.findall(r"(?:^|\.)(\d+)(?=\.)", name)
        if len(layer) != 1:
            raise FormatError(f"{name}: no single layer number in the module's name")
        found.append(ExpertsModule(name, int(layer[0]), module, shapes["down_proj"][0], shapes))
    if not found:
        if any(getattr(model.config, key, None) for key in _COUNT_KEYS):
            raise UnsupportedError(
                f"model_type {family!r} has experts, but not behind transformers' experts hook; not supported yet"
            )
        raise UnsupportedError(f"model_type {family!r} is not a Mixture-of-Experts model: nothing to stream")
    return sorted(found, key=lambda e: e.layer)


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that share another's storage: name -> name of the parameter that is stored."""
    if not model.config.tie_word_embeddings:
        return {}
    tied: Any = model._tied_weights_keys or {}
    return {k: v for k, v in dict(tied).items() if k in model.state_dict()}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300]


def matrix_module(model: PreTrainedModel, name: str) -> nn.Module | None:
    """The Linear or Embedding whose weight ``name`` is, if flashpack may replace it by a packed one.

    Subclasses do something else with their weight (scale it, say) and are left alone.
    """
    from torch import nn

    stem, _, leaf = name.rpartition(".")
    module = model.get_submodule(stem)
    return module if leaf == "weight" and type(module) in (nn.Linear, nn.Embedding) else None
