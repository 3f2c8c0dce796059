"""``--to mlx``: a checkpoint for mlx-lm. Quantized matrices are carried word by word, where MLX has their encoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashpack.errors import UnsupportedError
from flashpack.export.content import Content
from flashpack.export.mlx_dense import DenseTensor, Mode, dense_tensors, mode_of, part_specs
from flashpack.export.mlx_names import Family, family_of, mlx_config
from flashpack.export.options import Options, Prepared
from flashpack.export.tensors import Tensors
from flashpack.formats import constants as C
from flashpack.formats.entries import Layer
from flashpack.formats.files import write_durably
from flashpack.formats.header import TensorSpec
from flashpack.formats.manifest import canonical
from flashpack.formats.records import RecordKind

CONFIG = "config.json"
_ABOUT_THE_PACK = (C.QUALITY, C.QUALITY_PAGE, C.ALLOCATION)


def prepare(content: Content, options: Options) -> Prepared:
    """See ``export``. Raises ``UnsupportedError`` for families and encodings that mlx-lm has not."""
    options.choose("mlx", "stored")
    family = family_of(content)
    dense = list(dense_tensors(content, family))
    modes: dict[str, Mode] = {}
    specs: list[TensorSpec] = []
    for tensor in dense:
        if (mode := mode_of(tensor.encoding, tensor.source)) is not None:
            modes |= dict.fromkeys(_modules(tensor.stem, family), mode)
        specs += tensor.specs
    for layer in content.layers:
        kind = only_kind(content, layer)
        for p in kind.projections:
            stem = f"{family.experts_module(layer.module)}.{p.name}_proj"
            what = f"{content.pack.folder}: layer {layer.index}: {p.name} of the experts"
            if (mode := mode_of(p.encoding, what)) is not None:
                modes[stem] = mode
            specs += part_specs(stem, p.encoding, (layer.experts, *p.shape))
            specs += [TensorSpec(f"{stem}.bias", p.bias, (layer.experts, p.shape[0]))] if p.bias else []
    tensors = Tensors(specs, options.shard_size, "mlx")
    small = {name: content.copy(name) for name in content.copies() if name not in (CONFIG, *_ABOUT_THE_PACK)}
    small[CONFIG] = canonical(mlx_config(content, family, _quantization(modes)))

    def write(folder: Path) -> list[str]:
        tensors.open(folder)
        try:
            for tensor in dense:
                for spec, array in zip(tensor.specs, tensor.read(), strict=True):
                    tensors.write(spec.name, array)
            for layer in content.layers:
                _write_experts(content, layer, family, tensors)
            tensors.finish()
        finally:
            tensors.close()
        for name, data in small.items():
            write_durably(folder, name, data, C.PARTIAL_SUFFIX)
        return []

    nbytes = tensors.nbytes + sum(map(len, small.values()))
    losses = [*content.left_out(), *shifted_losses(dense), *_split_losses(dense, family)]
    return Prepared(nbytes, write, losses)


def _modules(stem: str, family: Family) -> list[str]:
    """The modules of mlx-lm whose weight the tensor ``stem`` becomes."""
    matrix, parts = family.split
    return [stem.removesuffix(matrix) + part for part in parts] if matrix and stem.endswith(matrix) else [stem]


def _split_losses(dense: list[DenseTensor], family: Family) -> list[str]:
    """A line on quantized matrices that mlx-lm cuts in two, and quantizes anew, when it loads them."""
    again = [tensor for tensor in dense if tensor.encoding.quantized and len(_modules(tensor.stem, family)) > 1]
    return [f"{len(again)} matrices {family.split[0][1:]} will be quantized once more by mlx-lm when it loads"] * bool(
        again
    )


def only_kind(content: Content, layer: Layer) -> RecordKind:
    """The record kind of all experts of a layer. Raises ``UnsupportedError`` if they differ."""
    kinds = content.kinds(layer)
    if len(kinds) > 1:
        raise UnsupportedError(
            f"{content.pack.folder}: experts of layer {layer.index} are stored in {len(kinds)} ways (--bpw); "
            f"this export has one for a layer"
        )
    return kinds[0]


def shifted_losses(dense: list[DenseTensor]) -> list[str]:
    """A line on norm weights that are rounded when 1 is added to them."""
    lossy = [tensor for tensor in dense if tensor.lossy]
    if not lossy:
        return []
    return [
        f"{len(lossy)} norm weights are stored with 1 added, as mlx-lm wants them, and rounded to "
        f"{lossy[0].encoding.dtype.lower()} once more"
    ]


def _write_experts(content: Content, layer: Layer, family: Family, tensors: Tensors) -> None:
    module = family.experts_module(layer.module)
    for expert in content.experts(layer):
        for name, matrix in expert.matrices.items():
            for part, array in matrix.parts.items():
                tensors.write(f"{module}.{name}_proj.{part}", array, expert.number * array.nbytes)
        for name, bias in expert.biases.items():
            array = bias.parts["weight"]
            tensors.write(f"{module}.{name}_proj.bias", array, expert.number * array.nbytes)


def _quantization(modes: dict[str, Mode]) -> dict[str, Any]:
    """The map of config.json: what most modules have, and each module that differs."""
    if not modes:
        return {}
    usual = Counter(modes.values()).most_common(1)[0][0]
    return _mode_json(usual) | dict(sorted(_different(modes, usual)))


def _different(modes: dict[str, Mode], usual: Mode) -> Iterator[tuple[str, dict[str, Any]]]:
    for stem, mode in modes.items():
        if mode != usual:
            yield stem, _mode_json(mode)


def _mode_json(mode: Mode) -> dict[str, Any]:
    return {"mode": mode[0], "bits": mode[1], "group_size": mode[2]}
