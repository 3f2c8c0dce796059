"""From the names of the model class back to those of published checkpoints, by transformers' own loader maps reversed.

As ``save_pretrained`` does it, but without the model: dense parameters go through the maps in groups, experts one by
one, so no more than an expert's matrices or a few dense tensors are ever in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashpack.errors import UnsupportedError
from flashpack.skeleton import ExpertsModule, library_errors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Dense parameters that are published together. ``outputs``: published name -> shape; ``converter`` makes these.
    Without one it is a single parameter, which only has another name."""

    names: tuple[str, ...]
    outputs: dict[str, Shape]
    converter: _Converter | None


@dataclass(frozen=True)
class Place:
    """Where something of an expert is published: a tensor ``name`` of ``shape``, from row ``row`` of it on."""

    name: str
    shape: Shape
    row: int = 0


class ExpertNames:
    """The published tensors of the experts of one module: ``outputs``, name -> shape."""

    def __init__(self, site: ExpertsModule, names: Names) -> None:
        self.site = site
        self.outputs: dict[str, Shape] = {}
        self._groups: list[tuple[tuple[str, ...], _Converter, list[str], bool]] = []
        self._sources: dict[str, str] = {}
        for parameters, converter in names.grouped([f"{site.name}.{p}" for p in site.parameters]):
            whole = {n: names.shapes[n] for n in parameters}
            every = converter.shapes(whole)
            one = converter.shapes({n: (1, *shape[1:]) for n, shape in whole.items()})
            stacked = len(every) == len(one)
            self._check(list(every.values()), list(one.values()), stacked)
            self._groups.append((parameters, converter, list(every), stacked))
            self.outputs |= every
            self._sources |= dict.fromkeys(every, parameters[0])

    def parameter(self, name: str) -> str:
        """A parameter of the model that the published tensor ``name`` is made of."""
        return self._sources[name]

    def places(self, expert: int) -> list[Place]:
        """Where what is an expert's is published."""
        count = self.site.num_experts
        found = []
        for _, _, names, stacked in self._groups:
            for name in names if stacked else names[expert::count]:
                shape = self.outputs[name]
                found.append(Place(name, shape, expert * (shape[0] // count) if stacked else 0))
        return found

    def publish(self, expert: int, parameters: Mapping[str, torch.Tensor]) -> dict[Place, torch.Tensor]:
        """An expert's ``parameters`` of the module (name in it -> the expert's own, [1, ...]) at ``places``."""
        made: list[torch.Tensor] = []
        for group, converter, _, _ in self._groups:
            made += converter.run({n: parameters[n.rpartition(".")[2]] for n in group}).values()
        return dict(zip(self.places(expert), made, strict=True))

    def _check(self, every: list[Shape], one: list[Shape], stacked: bool) -> None:
        """The experts must be published stacked, or one by one: all of the first matrix, then of the next."""
        count = self.site.num_experts
        expected = [shape for shape in one for _ in range(count)]
        if stacked:
            expected = [(count * shape[0], *shape[1:]) for shape in one]
        if every != expected:
            raise UnsupportedError(f"{self.site.name}: transformers' loader map cannot be reversed expert by expert")


class Names:
    """The published names for the parameters of ``model``, which is on the meta device."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

        from flashpack.adapters import loader_map

        self.model = model
        self.shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        # A prefix is for checkpoints of another class than this one, as transformers says where it saves.
        maps: list[Any] = [
            m for m in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(m, PrefixChange)
        ]
        with library_errors(f"{type(model).__name__}: its loader map cannot be reversed", UnsupportedError):
            # An adapter's first map is the published form; transformers' own are undone from the last to the first.
            own = [m.reverse_transform() for m in loader_map(model)]
            reversed_maps = [*own, *(m.reverse_transform() for m in reversed(maps))]
        self._converters = [m for m in reversed_maps if isinstance(m, WeightConverter)]
        self._renamings = [m for m in reversed_maps if isinstance(m, WeightRenaming)]

    def dense(self, names: list[str]) -> list[Group]:
        """The groups of the dense parameters ``names``."""
        groups = []
        for group, converter in self.grouped(names):
            outputs = converter.shapes({n: self.shapes[n] for n in group})
            groups.append(Group(group, outputs, converter if converter.computes else None))
        return groups

    def experts(self, site: ExpertsModule) -> ExpertNames:
        """Those of the experts of a layer."""
        return ExpertNames(site, self)

    def grouped(self, names: list[str]) -> list[tuple[tuple[str, ...], _Converter]]:
        """Parameters that a converter takes together, and it."""
        from transformers.core_model_loading import apply_converters, apply_renamings, dot_natural_key

        groups: dict[str, list[tuple[str, str]]] = {}
        converters: dict[str, Any] = {}
        for name in sorted(names, key=dot_natural_key):
            renamed, pattern = apply_converters(name, self._converters)
            if pattern is None:
                renamed = apply_renamings(name, self._renamings)
                if renamed in groups:
                    raise UnsupportedError(f"{name}: another parameter would be published as {renamed}, too")
                groups[renamed] = [(name, name)]
            else:
                groups.setdefault(renamed, []).append((name, pattern))
                converters[renamed] = next(c for c in self._converters if pattern in c.source_patterns)
        return [
            (tuple(n for n, _ in members), _Converter(self, target, dict(members), converters.get(target)))
            for target, members in groups.items()
        ]

    def rename(self, name: str) -> str:
        """The renamings alone."""
        from transformers.core_model_loading import apply_renamings

        renamed: str = apply_renamings(name, self._renamings)
        return renamed.removesuffix("$")  # the end of an adapter's pattern


@dataclass(frozen=True)
class _Converter:
    """A reversed converter of transformers for the parameters ``patterns`` (name -> its pattern); ``target`` is its
    first result's name. None: only the name changes."""

    names: Names
    target: str
    patterns: dict[str, str]
    transform: Any

    @property
    def computes(self) -> bool:
        return self.transform is not None

    def run(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The published tensors by name."""
        if self.transform is None:
            (tensor,) = tensors.values()
            return {self.target: tensor}
        transform = deepcopy(self.transform)
        for name, tensor in tensors.items():
            transform.add_tensor(self.target, name, self.patterns[name], tensor)
        whole: Any = self.names.model
        what = f"{self.target}: transformers' loader map cannot be reversed"
        with library_errors(what, UnsupportedError):
            made = transform.convert(self.target, model=_Sized(whole, tensors), config=whole.config)
        found = {self.names.rename(n): t[0] if isinstance(t, list) else t for n, t in made.items()}
        if len(found) != len(made):
            raise UnsupportedError(f"{what}: two results have one name")
        return found

    def shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """What would be published of parameters of ``shapes``."""
        import torch

        made = self.run({n: torch.empty(shape, device="meta") for n, shape in shapes.items()})
        return {n: tuple(t.shape) for n, t in made.items()}


class _Sized:
    """What converters ask of a model: the shape of a parameter, here of the tensors at hand."""

    def __init__(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        self._model, self._tensors = model, tensors

    def get_parameter(self, name: str) -> torch.Tensor:
        """The tensor of this name, or else the model's parameter."""
        found: torch.Tensor = self._tensors[name] if name in self._tensors else self._model.get_parameter(name)
        return found


def expert_parameters(site: ExpertsModule, arrays: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters [1, ...] that an expert's ``arrays`` have in the module: "gate", "up" and "down", [out, in], and
    "gate.bias", ..., [out]. The inverse of taking them apart on conversion."""
    import torch

    found = {}
    for parameter in site.parameters:
        stem, is_bias = parameter.removesuffix("_bias").removesuffix("_proj"), parameter.endswith("_bias")
        names = [f"{n}.bias" if is_bias else n for n in (("gate", "up") if stem == "gate_up" else (stem,))]
        rows = [arrays[n] for n in names]
        together = len(rows) == 1 or site.is_concatenated
        whole = torch.cat(rows) if together else torch.stack(rows, dim=1).flatten(0, 1)
        found[parameter] = (whole.t().contiguous() if site.is_transposed and not is_bias else whole)[None]
    return found
