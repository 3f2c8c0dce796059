"""The one adapter to transformers' loader maps: which source tensors make which parameter of the model.

transformers says how published names become runtime names (``conversion_mapping``): renamings, and converters that
merge lists of experts and concatenate gate and up. Here the same maps are applied to names only; the operations
become descriptions of where an expert's rows lie, so a fused tensor of gigabytes is never put together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashpack.converter.tensor import SourceTensor
from flashpack.errors import SourceError, UnsupportedError
from flashpack.skeleton import ExpertsModule, tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Parts of a checkpoint that are no part of the language model, besides those that the model class itself ignores.
_FOREIGN = re.compile(
    r"(^|\.)(visual|vision_tower|vision_model|vision_encoder|audio_tower|multi_modal_projector|embed_vision|mtp)\."
    r"|rotary_emb\.inv_freq$|\.[kv]_scale$|\.input_scale$"
)


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """One projection of all experts of a layer, in a stacked tensor [E, R, I] or in E tensors [R, I].

    Expert e's matrix is rows [start, start + rows) of its R rows.
    """

    tensors: tuple[SourceTensor, ...]
    stacked: int
    start: int
    rows: int

    def matrix(self, expert: int) -> SourceTensor:
        """The matrix [rows, I] of one expert."""
        if self.stacked:
            return self.tensors[0].expert(expert).rows(self.start, self.rows)
        return self.tensors[expert].rows(self.start, self.rows)

    def split(self) -> tuple[ExpertSource, ExpertSource]:
        """First and second half of the rows: gate and up of a fused matrix."""
        half = self.rows // 2
        return (
            ExpertSource(self.tensors, self.stacked, self.start, half),
            ExpertSource(self.tensors, self.stacked, self.start + half, half),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """[E, rows, I]."""
        return self.stacked or len(self.tensors), self.rows, self.tensors[0].shape[-1]


@dataclass(frozen=True)
class Bindings:
    """Every parameter of the model bound to its source, and what the source has beyond the model."""

    dense: dict[str, SourceTensor]
    experts: dict[str, dict[str, ExpertSource]]
    dropped: list[str]


def bind(model: PreTrainedModel, sites: list[ExpertsModule], tensors: dict[str, SourceTensor]) -> Bindings:
    """Bind each parameter of ``model`` to exactly one source of the right shape, or refuse."""
    state = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    collected, converters, dropped = _rename_all(model, tensors)
    tied = tied_names(model)
    experts_of = {f"{site.name}.{p}": site for site in sites for p in site.parameters}
    dense: dict[str, SourceTensor] = {}
    experts: dict[str, dict[str, ExpertSource]] = {site.name: {} for site in sites}
    for name, shape in state.items():
        sources = collected.get(name)
        if sources is None:
            if name not in tied:
                raise SourceError(f"the checkpoint lacks {name}; it is incomplete, or of another architecture")
            continue
        found: tuple[int, ...]
        if name in experts_of:
            site = experts_of[name]
            projections = _experts(name, sources, converters.get(name))
            experts[site.name] |= projections
            one = next(iter(projections.values())).shape
            found = (one[0], sum(p.shape[1] for p in projections.values()), one[2])
        else:
            dense[name] = _dense(name, sources, converters.get(name))
            found = dense[name].shape
        if found != shape:
            raise SourceError(f"{name} has shape {list(found)} in the checkpoint, {list(shape)} in the model")
    return Bindings(dense, experts, dropped)


Collected = dict[str, dict[str, list[SourceTensor]]]


def _rename_all(
    model: PreTrainedModel, tensors: dict[str, SourceTensor]
) -> tuple[Collected, dict[str, Any], list[str]]:
    """Rename as transformers does on loading: parameter -> source pattern -> tensors in order."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    collected: Collected = defaultdict(lambda: defaultdict(list))
    used: dict[str, Any] = {}
    dropped = []
    for name in sorted(tensors, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        if renamed in state:
            collected[renamed][pattern or name].append(tensors[name])
            if pattern is not None:
                used[renamed] = by_pattern[pattern]
        elif _droppable(model, name, renamed):
            dropped.append(name)
        else:
            raise SourceError(f"the checkpoint's tensor {name} has no place in {type(model).__name__}")
    return collected, used, dropped


def _droppable(model: PreTrainedModel, name: str, renamed: str) -> bool:
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    if _FOREIGN.search(name) or any(re.search(p, n) for p in ignored for n in (name, renamed)):
        return True
    layer = re.search(r"\blayers\.(\d+)\.", renamed)
    return layer is not None and int(layer[1]) >= model.config.num_hidden_layers


def _operations(converter: Any) -> list[str]:
    return [repr(op) for op in converter.operations] if converter is not None else []


def _experts(name: str, sources: dict[str, list[SourceTensor]], converter: Any) -> dict[str, ExpertSource]:
    """The projections that the parameter ``name`` ([E, 2I, H] gate_up, [E, I, H] up or [E, H, I] down) consists of."""
    operations = _operations(converter)
    if operations in ([], ["MergeModulelist(dim=0)"], ["MergeModulelist(dim=0)", "Concatenate(dim=1)"]):
        # Converters list gate before up; a checkpoint may hold the lists in any order.
        order = list(converter.source_patterns) if converter is not None else list(sources)
        parts = [_expert_source(sources[p]) for p in order if p in sources]
        role = name.rpartition(".")[2].removesuffix("_proj")
        if role == "gate_up" and len(parts) == 1 and parts[0].stacked:
            gate, up = parts[0].split()
            return {"gate": gate, "up": up}
        if role == "gate_up" and len(parts) == 2 and parts[0].shape == parts[1].shape:
            return {"gate": parts[0], "up": parts[1]}
        if role in ("up", "down") and len(parts) == 1:
            return {role: parts[0]}
        raise SourceError(f"{name}: the checkpoint's experts are incomplete ({', '.join(sources)})")
    raise UnsupportedError(f"{name}: the loader's operations {', '.join(operations)} are not supported yet")


def _expert_source(tensors: list[SourceTensor]) -> ExpertSource:
    first = tensors[0]
    if len(first.shape) == 3 and len(tensors) == 1:
        return ExpertSource((first,), first.shape[0], 0, first.shape[1])
    for t in tensors:
        if t.shape != first.shape or t.format != first.format or len(t.shape) != 2:
            raise SourceError(f"{t.name} differs from {first.name} in shape or type; experts of a layer must be alike")
    return ExpertSource(tuple(tensors), 0, 0, first.shape[0])


def _dense(name: str, sources: dict[str, list[SourceTensor]], converter: Any) -> SourceTensor:
    if converter is not None:
        operations = ", ".join(_operations(converter))
        raise UnsupportedError(f"{name}: the loader's operations {operations} are not supported yet")
    found = [t for tensors in sources.values() for t in tensors]
    if len(found) > 1:
        raise SourceError(f"{name}: both {found[0].name} and {found[1].name} of the checkpoint would become it")
    return found[0]
