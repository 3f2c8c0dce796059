"""Hugging Face checkpoints with weights in the layouts of compressed-tensors, as vLLM and transformers load them.

Only what these layouts hold exactly is written so: experts of any other kind are refused, other matrices of the dense
part decoded as in the plain export, and named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashpack.errors import UnsupportedError
from flashpack.export.configuration import float_type, model_config
from flashpack.export.content import Content, Expert, Stored
from flashpack.export.hf import Job, Rounding, checkpoint, dense_groups, dense_job, experts_job
from flashpack.export.names import ExpertNames, Group, Names, expert_parameters
from flashpack.export.options import Options, Prepared
from flashpack.export.schemes import FP8_BLOCKS, Scheme, arrays_of, fits, parts_of, scale_type, scheme_of
from flashpack.export.tensors import Tensors
from flashpack.formats.entries import Layer
from flashpack.formats.header import TensorSpec
from flashpack.formats.records import Encoding
from flashpack.skeleton import ExpertsModule

if TYPE_CHECKING:
    import torch

_INSTEAD = "use --weights bf16"


def prepare_compressed(content: Content, options: Options) -> Prepared:
    """The checkpoint of ``content``; writes nothing. Raises ``UnsupportedError`` for experts that do not fit."""
    dtype = float_type(content)
    rounding = Rounding(dtype)
    names = Names(content.model)
    jobs: list[Job] = []
    pairs = _GlobalScales()
    chosen: dict[str, Scheme | None] = {}
    for group in dense_groups(content, names):
        scheme = _dense_scheme(content, group)
        if scheme is not None:
            jobs.append(_dense_job(content, group))
        else:
            jobs.append(dense_job(content, group, dtype, rounding))
        for name, shape in group.outputs.items():
            if len(shape) == 2 and name.endswith(".weight") and not _is_embedding(content, group.names[0]):
                chosen[name.removesuffix(".weight")] = scheme
    for layer in content.layers:
        scheme = _experts_scheme(content, layer)
        published = names.experts(content.sites[layer.index])
        if scheme is None:
            jobs.append(experts_job(content, layer, names, dtype, rounding))
            chosen |= {n.removesuffix(".weight"): None for n in published.outputs}
        else:
            job, modules = _experts_job(content, layer, published, pairs)
            jobs.append(job)
            chosen |= dict.fromkeys(modules, scheme)
    if not any(chosen.values()):
        raise UnsupportedError(
            f"{content.pack.folder}: nothing in it is quantized as in compressed-tensors; {_INSTEAD}"
        )
    config, losses = model_config(content, quantization_config(chosen))

    def done() -> list[str]:
        return [*rounding.losses(), *pairs.lines()]

    return checkpoint(content, options, jobs, config, losses, done)


@dataclass
class _GlobalScales:
    """What engines make of the scales of whole nvfp4 matrices, which the files hold as the pack does.

    vLLM computes gate and up of an expert as one matrix, with gate's scale. transformers, up to 5.23 at least, decodes
    experts without these scales.
    """

    experts: int = 0
    differing: int = 0

    def see(self, expert: Expert) -> None:
        """An expert that is written."""
        found = [m.parts["global"] for n, m in expert.matrices.items() if n != "down" and "global" in m.parts]
        self.experts += bool(found)
        self.differing += len(found) == 2 and bool(found[0] != found[1])

    def lines(self) -> list[str]:
        """Lines for the report."""
        if not self.experts:
            return []
        lines = [
            "for vLLM: transformers 5.23 decodes nvfp4 experts without weight_global_scale, which gives other values"
        ]
        if self.differing:
            lines.append(
                f"in {self.differing:,} of {self.experts:,} experts gate and up have different weight_global_scales; "
                f"vLLM takes gate's for both"
            )
        return lines


def quantization_config(chosen: Mapping[str, Scheme | None]) -> dict[str, Any]:
    """What config.json says of the modules of ``chosen``: of one scheme, or not quantized (None).

    One scheme for all that is quantized is one group of "Linear" modules, as llm-compressor writes it; several have the
    modules as expressions, that of the experts first.
    """
    unquantized = [name for name, scheme in chosen.items() if scheme is None]
    schemes: dict[Scheme, list[str]] = {}
    for name, scheme in chosen.items():
        if scheme is not None:
            schemes.setdefault(scheme, []).append(name)
    if blocks := next((s for s in schemes if s.format == FP8_BLOCKS), None):
        if len(schemes) > 1:
            raise UnsupportedError(f"matrices in blocks of fp8 cannot stand beside those of other schemes; {_INSTEAD}")
        modules = sorted({re.sub(r"(\.experts)\..*", r"\1", name) for name in unquantized})
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": modules,
            "quant_method": "fp8",
            "weight_block_size": list(dict(blocks.weights)["weight_block_size"]),
        }
    ordered = sorted(schemes.items(), key=lambda item: not any(".experts." in n for n in item[1]))
    groups = {}
    for number, (scheme, members) in enumerate(ordered):
        targets = ["Linear"] if len(schemes) == 1 else _patterns(members, list(chosen))
        groups[f"group_{number}"] = scheme.to_json(targets)
    formats = {scheme.format for scheme in schemes}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": _patterns(unquantized, list(chosen)),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _patterns(names: list[str], every: list[str]) -> list[str]:
    """``names`` of modules as few expressions that match no others of ``every``: layers and experts as numbers."""
    general = {name: "re:^" + re.sub(r"\d+", r"\\d+", name.replace(".", r"\.")) + "$" for name in every}
    wanted = set(names)
    others = {general[name] for name in every if name not in wanted}
    return sorted({general[name] if general[name] not in others else name for name in names})


def _is_linear(content: Content, name: str) -> bool:
    """Whether ``name`` is the weight of a Linear module: engines look for the parts of others nowhere."""
    from torch import nn

    return isinstance(content.model.get_submodule(name.rpartition(".")[0]), nn.Linear)


def _is_embedding(content: Content, name: str) -> bool:
    from torch import nn

    return isinstance(content.model.get_submodule(name.rpartition(".")[0]), nn.Embedding)


def _dense_scheme(content: Content, group: Group) -> Scheme | None:
    """The scheme that holds a dense matrix exactly, if there is one."""
    if group.converter is not None or not _is_linear(content, group.names[0]):
        return None
    (name,) = group.names
    scheme = scheme_of(content.dense[name][1])
    return scheme if scheme is not None and fits(content.peek(name)) else None


def _dense_job(content: Content, group: Group) -> Job:
    (name,) = group.names
    (published,) = group.outputs
    stored = content.peek(name)
    specs = _specs(published, stored.encoding, stored.shape, scale_type(stored) or "")

    def run(tensors: Tensors) -> None:
        _write(tensors, published, content.tensor(name))

    return Job(specs, run)


def _experts_scheme(content: Content, layer: Layer) -> Scheme | None:
    """The scheme of a layer's experts; None if they are not quantized. Those that do not fit are refused."""
    encodings = {p.encoding for kind in content.kinds(layer) for p in kind.projections}
    if not any(e.quantized for e in encodings):
        return None
    where = f"{content.pack.folder}: layer {layer.index}"
    if len(encodings) > 1:
        raise UnsupportedError(
            f"{where}: its experts have matrices of several encodings ({', '.join(sorted(map(str, encodings)))}), of "
            f"which engines take one only; {_INSTEAD}"
        )
    (encoding,) = encodings
    scheme = scheme_of(encoding)
    if scheme is None:
        raise UnsupportedError(f"{where}: compressed-tensors has no place for experts of {encoding}; {_INSTEAD}")
    if any(p.bias for kind in content.kinds(layer) for p in kind.projections):
        raise UnsupportedError(f"{where}: compressed-tensors has no place for experts with biases; {_INSTEAD}")
    first = next(content.experts(layer, 1))
    _require(first, where)
    if not scheme.symmetric:
        raise UnsupportedError(
            f"{where}: neither vLLM nor transformers takes experts with zero points in compressed-tensors; {_INSTEAD}"
        )
    return scheme


def _require(expert: Expert, where: str) -> None:
    for name, stored in expert.matrices.items():
        if not fits(stored):
            raise UnsupportedError(
                f"{where}, expert {expert.number}: {name} of {stored.encoding} has biases that are no multiples of its "
                f"scales, which compressed-tensors has no place for; {_INSTEAD}"
            )


def _experts_job(content: Content, layer: Layer, published: ExpertNames, pairs: _GlobalScales) -> tuple[Job, list[str]]:
    """What writes a layer's experts, and the names of their modules."""
    where = f"{content.pack.folder}: layer {layer.index}"
    (kind,) = content.kinds(layer)
    projections = {p.name: p for p in kind.projections}
    encoding = kind.projections[0].encoding  # of all
    names = _single_names(content.sites[layer.index], published, {n: p.shape for n, p in projections.items()}, where)
    specs = [
        spec
        for by_projection in names
        for projection, name in by_projection.items()
        for spec in _specs(name, encoding, projections[projection].shape, encoding.dtype)
    ]

    def run(tensors: Tensors) -> None:
        for expert in content.experts(layer):
            _require(expert, where)
            pairs.see(expert)
            for projection, stored in expert.matrices.items():
                _write(tensors, names[expert.number][projection], stored)

    return Job(specs, run), [n.removesuffix(".weight") for by_projection in names for n in by_projection.values()]


def _single_names(
    site: ExpertsModule, published: ExpertNames, shapes: dict[str, tuple[int, int]], where: str
) -> list[dict[str, str]]:
    """For each expert, projection -> name of its published weight. Refuses families whose experts are stacked.

    Found by publishing matrices that tell which they are, and whether they were turned or cut.
    """
    import torch

    marks = {name: torch.full(shape, number, dtype=torch.uint8) for number, (name, shape) in enumerate(shapes.items())}
    for mark in marks.values():
        mark[0, -1] += 100
    made = published.publish(0, expert_parameters(site, marks))
    found: dict[str, int] = {}
    for number, (place, tensor) in enumerate(made.items()):
        for projection, mark in marks.items():
            if _equal(mark, tensor) and place.name.endswith(".weight") and place.shape == shapes[projection]:
                found[projection] = number
    if found.keys() != shapes.keys():
        raise UnsupportedError(
            f"{where}: the experts of this family are published in one tensor, and compressed-tensors needs them "
            f"one by one; {_INSTEAD}"
        )
    places = [published.places(expert) for expert in range(site.num_experts)]
    return [{projection: names[number].name for projection, number in found.items()} for names in places]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def _specs(name: str, encoding: Encoding, shape: tuple[int, ...], scales: str) -> list[TensorSpec]:
    stem = name.removesuffix("weight")
    return [TensorSpec(stem + part, dtype, size) for part, (dtype, size) in parts_of(encoding, shape, scales).items()]


def _write(tensors: Tensors, name: str, stored: Stored) -> None:
    stem = name.removesuffix("weight")
    for part, array in arrays_of(stored).items():
        tensors.write(stem + part, array)
