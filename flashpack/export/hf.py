"""Hugging Face checkpoints: safetensors in the names of published checkpoints, which stock transformers loads.

Values that the pack has plain are written as they are, to the bit; quantized ones are decoded and rounded once to the
model's own type, which is bfloat16 unless config.json says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flashpack.export.configuration import float_type, model_config
from flashpack.export.content import Content, Stored
from flashpack.export.folder import NOTE
from flashpack.export.names import ExpertNames, Group, Names, expert_parameters
from flashpack.export.options import Options, Prepared
from flashpack.export.tensors import INDEX, Tensors
from flashpack.formats import constants as C
from flashpack.formats.dtypes import from_float32, to_float32
from flashpack.formats.entries import Layer
from flashpack.formats.files import write_durably
from flashpack.formats.header import TensorSpec
from flashpack.formats.records import Encoding

if TYPE_CHECKING:
    import torch

_NOT_COPIED = {C.ALLOCATION, C.QUALITY, C.QUALITY_PAGE, "config.json", INDEX, NOTE}
"""Files of the pack that are about itself, and names that an export has use for."""


@dataclass(frozen=True)
class Job:
    """Tensors of the checkpoint that are made together, and what writes them."""

    specs: list[TensorSpec]
    run: Callable[[Tensors], None]


@dataclass
class Rounding:
    """What became of decoded values. ``counts``: (part of the model, encoding) -> [changed values, all values]."""

    dtype: str
    counts: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def round(self, part: str, stored: Stored, values: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
        """``values`` of ``stored`` as ``dtype``."""
        rounded = from_float32(values, dtype)
        back = to_float32(rounded, dtype)
        count = self.counts.setdefault((part, str(stored.encoding)), [0, 0])
        count[0] += int(np.count_nonzero((back != values) & ~np.isnan(values)))
        count[1] += values.size
        return rounded

    def losses(self) -> list[str]:
        """A line for each kind of values of which some were changed."""
        name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[self.dtype]
        return [
            f"{part}, {encoding}: decoded, and {changed:,} of {total:,} values rounded to {name}"
            for (part, encoding), (changed, total) in sorted(self.counts.items())
            if changed
        ]


def prepare(content: Content, options: Options) -> Prepared:
    """The checkpoint of ``content``; writes nothing."""
    if options.choose("hf", "bf16", "compressed") == "compressed":
        from flashpack.export.compressed import prepare_compressed

        return prepare_compressed(content, options)
    dtype = float_type(content)
    rounding = Rounding(dtype)
    names = Names(content.model)
    jobs = [dense_job(content, group, dtype, rounding) for group in dense_groups(content, names)]
    jobs += [experts_job(content, layer, names, dtype, rounding) for layer in content.layers]
    config, losses = model_config(content, None)
    return checkpoint(content, options, jobs, config, losses, rounding.losses)


def checkpoint(
    content: Content,
    options: Options,
    jobs: list[Job],
    config: bytes,
    losses: list[str],
    done: Callable[[], list[str]],
) -> Prepared:
    """A folder with the tensors of ``jobs``, the ``config``, tokenizer and other small files of the pack. ``done``
    gives the losses that only the values show."""
    from transformers.core_model_loading import dot_natural_key

    # Those of a layer together, as published checkpoints have them: a distributed engine reads layer by layer.
    jobs = sorted(jobs, key=lambda job: dot_natural_key(job.specs[0].name))
    tensors = Tensors([spec for job in jobs for spec in job.specs], options.shard_size, "pt")
    copies = [n for n in content.copies() if n not in _NOT_COPIED and not n.endswith(".safetensors")]

    def write(folder: Path) -> list[str]:
        tensors.open(folder)
        try:
            for job in jobs:
                job.run(tensors)
            tensors.finish()
        finally:
            tensors.close()
        write_durably(folder, "config.json", config, C.PARTIAL_SUFFIX)
        for name in copies:
            write_durably(folder, name, content.copy(name), C.PARTIAL_SUFFIX)
        return done()

    nbytes = tensors.nbytes + sum(content.pack.files[name].size for name in copies)
    return Prepared(nbytes, write, losses)


def dense_groups(content: Content, names: Names) -> list[Group]:
    """The dense part as it is published."""
    content.check_dense()
    return names.dense(list(content.dense))


def dense_job(content: Content, group: Group, dtype: str, rounding: Rounding) -> Job:
    """Dense parameters that are published together."""
    types = {name: stored_type(content.dense[name][1], dtype) for name in group.names}
    common = _common(list(types.values()))
    specs = [TensorSpec(name, common, shape) for name, shape in group.outputs.items()]

    def run(tensors: Tensors) -> None:
        if group.converter is None:
            at = 0
            for piece in _pieces(content.tensor(group.names[0]), common, rounding):
                tensors.write(specs[0].name, piece, at)
                at += piece.nbytes
            return
        arrays = {}
        for name in group.names:
            stored = content.tensor(name)
            whole = np.concatenate([piece.reshape(-1) for piece in _pieces(stored, common, rounding)])
            arrays[name] = to_torch(whole.reshape(stored.shape), common)
        for name, tensor in group.converter.run(arrays).items():
            tensors.write(name, to_numpy(tensor))

    return Job(specs, run)


def experts_job(content: Content, layer: Layer, names: Names, dtype: str, rounding: Rounding) -> Job:
    """The experts of a layer."""
    site = content.sites[layer.index]
    published: ExpertNames = names.experts(site)
    types = [stored_type(p.encoding, dtype) for kind in content.kinds(layer) for p in kind.projections]
    biases = [p.bias for kind in content.kinds(layer) for p in kind.projections if p.bias]
    common, bias_type = _common(types), _common(biases) if biases else ""
    vectors = {f"{site.name}.{p}" for p in site.parameters if p.endswith("_bias")}
    specs = [
        TensorSpec(name, bias_type if published.parameter(name) in vectors else common, shape)
        for name, shape in published.outputs.items()
    ]

    def run(tensors: Tensors) -> None:
        for expert in content.experts(layer):
            arrays = {}
            for name, stored in expert.matrices.items():
                whole = np.concatenate(list(_pieces(stored, common, rounding, "experts")))
                arrays[name] = to_torch(whole, common)
            for name, stored in expert.biases.items():
                arrays[f"{name}.bias"] = to_torch(next(_pieces(stored, bias_type, rounding)), bias_type)
            parameters = expert_parameters(site, arrays)
            for place, tensor in published.publish(expert.number, parameters).items():
                array = to_numpy(tensor)
                row = array.nbytes // max(1, len(tensor))
                tensors.write(place.name, array, place.row * row)

    return Job(specs, run)


def stored_type(encoding: Encoding, dtype: str) -> str:
    """The type that values of ``encoding`` are exported in: their own, or ``dtype`` where they are decoded."""
    return dtype if encoding.quantized else encoding.dtype


def _common(types: list[str]) -> str:
    """The type of tensors that become one: theirs, or float32, which holds all."""
    return types[0] if len(set(types)) == 1 else "F32"


def _pieces(stored: Stored, dtype: str, rounding: Rounding, part: str = "dense") -> Iterator[NDArray[np.generic]]:
    """The values of ``stored`` as ``dtype`` in pieces of whole rows, in order."""
    if not stored.encoding.quantized and stored.encoding.dtype == dtype:
        yield stored.parts["weight"]
        return
    for values in stored.pieces():
        yield rounding.round(part, stored, values, dtype)


def to_torch(array: NDArray[np.generic], dtype: str) -> torch.Tensor:
    """``array``, as ``NUMPY[dtype]``, as a tensor of that type."""
    import torch

    whole = np.ascontiguousarray(array)
    if not whole.flags.writeable:
        whole = whole.copy()  # torch warns of memory that it may not write to
    if dtype == "BF16":
        return torch.from_numpy(whole.view("<i2")).view(torch.bfloat16)
    return torch.from_numpy(whole)


def to_numpy(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of ``tensor`` in row-major order."""
    import torch

    array: NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return array
