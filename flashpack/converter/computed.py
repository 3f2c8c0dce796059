"""Dense tensors that transformers' loader computes from others: chunks, concatenations, permutations.

The library's own operations are applied, to the decoded values of one parameter at a time, so every family's loader
is followed without knowing it. Experts never come this way (see ``stack``).
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashpack.converter.tensor import Arrays, SourceTensor, WeightFormat, Whole
from flashpack.errors import UnsupportedError
from flashpack.formats.records import Encoding
from flashpack.skeleton import library_errors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Sources = dict[str, list[SourceTensor]]
"""Tensors of the checkpoint by the pattern of the loader that their names match, in order."""


def computed(model: PreTrainedModel, name: str, converter: Any, sources: Sources) -> list[SourceTensor]:
    """The parameters that ``converter`` makes of ``sources``; ``name`` is the first of them."""
    import torch

    recipe = _Recipe(model, name, converter, sources)
    shapes = recipe.run({p: [torch.empty(t.shape, device="meta") for t in ts] for p, ts in sources.items()})
    parts = {
        f"{i}.{j}.{part}": extent
        for i, tensors in enumerate(sources.values())
        for j, tensor in enumerate(tensors)
        for part, extent in tensor.parts.items()
    }
    return [SourceTensor(t, tuple(v.shape), Computed(recipe, t), parts) for t, v in shapes.items()]


@dataclass(frozen=True, eq=False)
class _Recipe:
    model: PreTrainedModel
    name: str
    converter: Any
    sources: Sources

    def run(self, tensors: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Full name -> value of every parameter that results."""
        with library_errors(f"{self.name}: transformers' loader cannot compute it", UnsupportedError):
            made: Any = dict(tensors)
            for op in self.converter.operations:
                made = op.convert(
                    made,
                    source_patterns=self.converter.source_patterns,
                    target_patterns=self.converter.target_patterns,
                    full_layer_name=self.name,
                    model=self.model,
                    config=self.model.config,
                    missing_keys=None,
                )
            prefix, _, suffix = next(self.name.partition(key) for key in made if key in self.name)
            return {prefix + key + suffix: v[0] if isinstance(v, list) else v for key, v in made.items()}


@dataclass(frozen=True, eq=False)
class Initial(WeightFormat):
    """A buffer that the checkpoint may lack: what transformers then begins with."""

    value: NDArray[np.float32] = field(repr=False)

    @property
    def encoding(self) -> Encoding | None:
        return Encoding("raw", "F32")

    @property
    def align(self) -> int:
        return 0

    def stored(self, arrays: Arrays) -> Arrays:
        return {"weight": self.value}


def initial(model: PreTrainedModel, name: str) -> SourceTensor | None:
    """The persistent buffer ``name`` as transformers makes it, if the model's class says that it may be lacking."""
    import torch

    stem, _, leaf = name.rpartition(".")
    module = model.get_submodule(stem)
    may_lack: Any = model._keys_to_ignore_on_load_missing or ()
    if leaf not in module._buffers or not any(re.search(pattern, name) for pattern in may_lack):
        return None
    with library_errors(f"{name}: transformers does not say what it is", UnsupportedError), torch.no_grad():
        made: Any = copy.deepcopy(module).to_empty(device="cpu")
        model._init_weights(made)  # type: ignore[no-untyped-call]
    value = getattr(made, leaf).float().numpy()
    return SourceTensor(name, value.shape, Initial(value), {})


@dataclass(frozen=True, eq=False)
class Computed(Whole):
    """The parameter ``target`` of a recipe; read and computed as a whole."""

    recipe: _Recipe = field(repr=False)
    target: str

    @property
    def encoding(self) -> Encoding | None:
        encodings = {t.encoding for tensors in self.recipe.sources.values() for t in tensors}
        only = next(iter(encodings)) if len(encodings) == 1 else None
        return only if only is not None and not only.quantized else None

    def values(self, arrays: Arrays) -> NDArray[np.float32]:
        import torch

        tensors: dict[str, list[torch.Tensor]] = {}
        for i, (pattern, sources) in enumerate(self.recipe.sources.items()):
            tensors[pattern] = []
            for j, source in enumerate(sources):
                own = {part: arrays[f"{i}.{j}.{part}"] for part in source.parts}
                tensors[pattern].append(torch.from_numpy(source.decoded(own)))
        result: NDArray[np.float32] = self.recipe.run(tensors)[self.target].contiguous().numpy()
        return result
