"""Projections of experts that a source stores apart, under names of their own: what GGUF files have.

A source names them "<experts module>.*.gate", ".up" or ".down": a stack of all experts; with a number for "*", one
expert; with ".bias" behind, its vector. ".gate_up" is both, the rows of gate before those of up. No loader map knows
these names, and no checkpoint of safetensors has them.
"""

from __future__ import annotations

import re
from collections import defaultdict

from flashpack.converter.stack import ExpertStack
from flashpack.converter.tensor import SourceTensor
from flashpack.errors import SourceError
from flashpack.skeleton import ExpertsModule

_NAME = re.compile(r"(.+)\.(\*|\d+)\.((?:gate|up|down|gate_up)(?:\.bias)?)")

Stacks = dict[str, dict[str, ExpertStack]]
"""Experts module -> "gate", "up.bias", ... -> what it is made of."""


def take_apart(sites: list[ExpertsModule], tensors: dict[str, SourceTensor]) -> tuple[Stacks, dict[str, SourceTensor]]:
    """The projections among ``tensors``, complete and of the right shapes for their modules, and all other tensors."""
    modules = {site.name: site for site in sites}
    found: dict[str, dict[str, dict[str, SourceTensor]]] = defaultdict(lambda: defaultdict(dict))
    others = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match and match[1] in modules:
            found[match[1]][match[3]][match[2]] = tensor
        else:
            others[name] = tensor
    return {module: _stacks(modules[module], arrays) for module, arrays in found.items()}, others


def _stacks(site: ExpertsModule, arrays: dict[str, dict[str, SourceTensor]]) -> dict[str, ExpertStack]:
    stacks: dict[str, ExpertStack] = {}
    for role, by_expert in arrays.items():
        first = next(iter(by_expert.values()))
        if "*" in by_expert and len(by_expert) == 1:
            whole = ExpertStack((first,), True, first.shape[1] if len(first.shape) > 1 else 0)
        elif set(by_expert) == {str(e) for e in range(site.num_experts)}:
            whole = ExpertStack.merged([by_expert[str(e)] for e in range(site.num_experts)])
        else:
            raise SourceError(f"{first.name}: {site.name} has {site.num_experts} experts, not what the file has here")
        made = {role: whole}
        if role.startswith("gate_up"):
            half, suffix = whole.rows // 2, role.removeprefix("gate_up")
            made = {f"gate{suffix}": whole.take(0, half), f"up{suffix}": whole.take(half, half)}
        for name, stack in made.items():
            if name in stacks:
                raise SourceError(f"{first.name}: the {name} of {site.name} is there in another form, too")
            stacks[name] = stack
    wanted: dict[str, tuple[int, ...]] = dict(site.projections())
    if site.has_bias:
        wanted |= {f"{role}.bias": (rows,) for role, (rows, _) in site.projections().items()}
    if set(stacks) != set(wanted):
        strange = sorted(set(stacks) ^ set(wanted))
        raise SourceError(f"{site.name}: {strange[0]} is {'missing' if strange[0] in wanted else 'one too many'}")
    for name, stack in stacks.items():
        if (stack.experts, stack.rows, *stack.width) != (site.num_experts, *wanted[name]):
            raise SourceError(
                f"{stack.tensors[0].name} has shape {list(stack.tensors[0].shape)}; the {name} of {site.num_experts} "
                f"experts needs {[site.num_experts, *wanted[name]]}"
            )
    return stacks
