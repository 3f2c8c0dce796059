"""What a GGUF file says about its model: metadata under the architecture's prefix, and the shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from flashpack.converter.gguf.header import GgufTensor
from flashpack.errors import SourceError, UnsupportedError

# Metadata that changes what a model computes: refused where a family's configuration does not ask for it, unless its
# value changes nothing.
_DECIDING: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_norm": (False,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "interleave_moe_layer_step": (0, 1),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "residual_scale": (0.0, 1.0),
    "router_logit_softcapping": (0.0,),
    "rope.scale_linear": (0.0, 1.0),
    "use_parallel_residual": (False,),
}


class Facts:
    """``where`` names the file, for errors; ``tensors``: by GGUF name."""

    def __init__(self, where: str, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> None:
        self.where, self.metadata, self.tensors = where, metadata, tensors
        self.architecture = str(metadata.get("general.architecture", ""))
        self._asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """A value under the architecture's prefix. float32 numbers as the decimal fractions they were written from."""
        self._asked.add(key)
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A number that the model cannot be built without. One for each layer must be the same for all."""
        value = self.get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if type(value) is not int or value < 0:
            found = "missing" if value is None else f"{str(value)[:60]}, no number"
            raise SourceError(f"{self.where}: metadata {self.architecture}.{key} is {found}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Like ``integer``, for fractions."""
        value = self.get(key, default)
        if type(value) not in (int, float):
            found = "missing" if value is None else f"{str(value)[:60]}, no number"
            raise SourceError(f"{self.where}: metadata {self.architecture}.{key} is {found}")
        return float(value)

    def shape(self, pattern: str) -> tuple[int, ...]:
        """The shape of the first tensor whose whole name matches."""
        for name, tensor in self.tensors.items():
            if re.fullmatch(pattern, name):
                return tensor.shape
        raise SourceError(f"{self.where}: has no tensor {pattern.replace(chr(92), '')}; it is incomplete")

    def layers(self, leaf: str) -> set[int]:
        """Layers that have a tensor ``blk.<layer>.<leaf>``."""
        found = (re.fullmatch(rf"blk\.(\d+)\.{leaf}", name) for name in self.tensors)
        return {int(match[1]) for match in found if match}

    def check_all_asked(self) -> None:
        """Refuse metadata that the configuration leaves out, though the model computes something else with it."""
        for key, neutral in _DECIDING.items():
            value = self.metadata.get(f"{self.architecture}.{key}")
            if value is not None and key not in self._asked and value not in neutral:
                raise UnsupportedError(f"{self.where}: {self.architecture}.{key} = {str(value)[:60]} is not supported")
