"""The one adapter to transformers' loader maps: which source tensors make which parameter of the model.

transformers says how published names become runtime names (``conversion_mapping``): renamings, and converters that
merge lists of experts and concatenate gate and up. Here the same maps are applied to names only; the operations
become descriptions of where an expert's rows lie, so a fused tensor of gigabytes is never put together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from flashpack.converter.apart import take_apart
from flashpack.converter.computed import computed, initial
from flashpack.converter.stack import ExpertStack, Rows, apply
from flashpack.converter.tensor import SourceTensor
from flashpack.errors import FlashpackError, SourceError, UnsupportedError
from flashpack.skeleton import ExpertsModule, build, find_experts, tied_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Parts of a checkpoint that are no part of the language model, besides those that the model class itself ignores.
_FOREIGN = re.compile(
    r"^(\w+\.)?(vision|visual|image|video|audio|speech)_\w+\."
    r"|(^|\.)(visual|vision_tower|vision_model|vision_encoder|audio_tower|multi_modal_projector|mm_projector"
    r"|embed_vision|embed_audio|mtp)\."
    r"|rotary_emb\.inv_freq$"
    r"|[._](input|activation|output|input_activation|output_activation|input_global|kv|[qkv]|prob)_(scale|zero_point)$"
)

_LANGUAGE = "language_model."
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Bindings:
    """Every parameter of the model bound to its source; what the source has beyond the model, and what it may lack."""

    dense: dict[str, SourceTensor]
    experts: dict[str, dict[str, ExpertStack]]
    dropped: list[str]
    initialized: list[str]


def fit(
    configs: list[PretrainedConfig], tensors: dict[str, SourceTensor]
) -> tuple[PreTrainedModel, list[ExpertsModule], Bindings]:
    """The first of the models described by ``configs`` that ``tensors`` have a place in, and their places.

    Loader maps may be written for only one of a family's classes.
    """
    refusal: FlashpackError | None = None
    for config in configs:
        try:
            model = build(config)
            sites = find_experts(model)
            return model, sites, bind(model, sites, tensors)
        except (SourceError, UnsupportedError) as e:
            refusal = refusal or e
    assert refusal is not None
    raise refusal


def bind(model: PreTrainedModel, sites: list[ExpertsModule], tensors: dict[str, SourceTensor]) -> Bindings:
    """Bind each parameter of ``model`` to exactly one source of the right shape, or refuse."""
    apart, tensors = take_apart(sites, tensors)
    collected, converters, dropped = _rename_all(model, tensors)
    tied = tied_names(model)
    initialized: list[str] = []
    experts_of = {f"{site.name}.{p}": site for site in sites for p in site.parameters}
    dense = _dense(model, {n: s for n, s in collected.items() if n not in experts_of}, converters)
    experts: dict[str, dict[str, ExpertStack]] = {site.name: apart.get(site.name, {}) for site in sites}
    for name, parameter in model.state_dict().items():
        shape, found = tuple(parameter.shape), None
        if name in experts_of and experts_of[name].name in apart:
            if name in collected:
                raise SourceError(f"{name} is in the checkpoint in two forms")
        elif name in experts_of and name in collected:
            site = experts_of[name]
            for tensor in (t for found_by_pattern in collected[name].values() for t in found_by_pattern):
                tensor.check()
            rows = apply(name, converters.get(name), collected[name], shape)
            found = rows.shape
            if found == shape:
                experts[site.name] |= _projections(site, name, rows)
        elif name in dense:
            found = dense[name].shape
        elif name not in tied and (begun := initial(model, name)) is not None:
            dense[name] = begun
            initialized.append(name)
        elif name not in tied:
            raise SourceError(f"the checkpoint lacks {name}; it is incomplete, or of another architecture")
        if found not in (shape, None):
            raise SourceError(f"{name} has shape {list(found)} in the checkpoint, {list(shape)} in the model")
    return Bindings(dense, experts, dropped, initialized)


def _projections(site: ExpertsModule, name: str, rows: Rows) -> dict[str, ExpertStack]:
    """The arrays of a record that a parameter of an experts module consists of: "gate", "up", "gate.bias", ..."""
    parameter = name.rpartition(".")[2]
    stem, bias = parameter.removesuffix("_bias"), parameter.endswith("_bias")
    suffix = ".bias" if bias else ""
    if site.is_transposed and not bias:
        rows = rows.transpose(name)
    if stem != "gate_up_proj":
        return {stem.removesuffix("_proj") + suffix: rows.take(0, rows.shape[1], 1, name)}
    half = rows.shape[1] // 2
    start, step = (half, 1) if site.is_concatenated else (1, 2)
    return {"gate" + suffix: rows.take(0, half, step, name), "up" + suffix: rows.take(start, half, step, name)}


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

    from flashpack.adapters import loader_map, without_weights

    part_key = cache(dot_natural_key)

    mapping = [*get_model_conversion_mapping(model), *loader_map(model)]
    weightless = without_weights(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    collected: Collected = defaultdict(lambda: defaultdict(list))
    used: dict[str, Any] = {}
    dropped = []
    rename = _merging(lambda name: rename_source_key(name, renamings, converters, prefix, state))
    for name in sorted(tensors, key=lambda name: [key for part in name.split(".") for key in part_key(part)]):
        renamed, pattern = rename(name)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        if renamed not in state and _LANGUAGE in name:
            renamed, pattern = rename(name.replace(_LANGUAGE, "", 1))  # beside parts for images
        if (expert := _EXPERT.search(name)) and int(expert[1]) in weightless:
            dropped.append(name)
        elif renamed in state:
            collected[renamed][pattern or name].append(tensors[name])
            if pattern is not None:
                used[renamed] = by_pattern[pattern]
        elif _droppable(model, name, renamed):
            dropped.append(name)
        else:
            raise SourceError(f"the checkpoint's tensor {name} has no place in {type(model).__name__}")
    return collected, used, dropped


_Renamed = tuple[str, str | None]


def _merging(rename: Callable[[str], _Renamed]) -> Callable[[str], _Renamed]:
    """``rename``, asked only for the first two experts of a layer where both become the same parameter: a checkpoint
    may have 100,000 names, and dozens of expressions are tried on each."""
    known: dict[tuple[str, str], list[_Renamed]] = {}

    def renamed(name: str) -> _Renamed:
        before, experts, after = name.partition(".experts.")
        number, _, leaf = after.partition(".")
        if not experts or not number.isdecimal():
            return rename(name)
        seen = known.setdefault((before, leaf), [])
        if len(seen) > 1 and seen[0] == seen[1]:
            return seen[0]
        seen.insert(0, rename(name))
        return seen[0]

    return renamed


def _droppable(model: PreTrainedModel, name: str, renamed: str) -> bool:
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    if _FOREIGN.search(name) or any(re.search(p, n) for p in ignored for n in (name, renamed)):
        return True
    layer = re.search(r"\blayers\.(\d+)\.", renamed)
    return layer is not None and int(layer[1]) >= model.config.get_text_config(decoder=True).num_hidden_layers


def _dense(model: PreTrainedModel, collected: Collected, converters: dict[str, Any]) -> dict[str, SourceTensor]:
    """Parameter -> its source. A converter may make several parameters of one tensor."""
    dense: dict[str, SourceTensor] = {}
    for name, sources in collected.items():
        found = [t for tensors in sources.values() for t in tensors]
        if name in converters:
            made = computed(model, name, converters[name], dict(sources))
        elif len(found) > 1:
            raise SourceError(f"{name}: both {found[0].name} and {found[1].name} of the checkpoint would become it")
        else:
            made = [replace(found[0], name=name)]
        for tensor in made:
            tensor.check()
            if tensor.name in dense:
                raise SourceError(f"{tensor.name}: made twice of the checkpoint, of {found[0].name} and others")
            dense[tensor.name] = tensor
    return dense
