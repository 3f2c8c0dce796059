"""``--to flash-moe``: the files of Flash-MoE, a C and Metal engine for Qwen3.5-MoE (github.com/danveloper/flash-moe).

Its scripts make them of an MLX checkpoint. Of each layer ``packed_experts/layer_XX.bin``: the experts one after the
other, of each gate, up and down, of each words, scales and biases; ``packed_experts_2bit`` for experts of 2 bits. All
else is in ``model_weights.bin``, with a table in ``model_weights.json``: tensors under MLX's names without
``language_model.``, sorted, each at a multiple of 64 bytes. Its kernels know one encoding: 4 bits (experts: or 2) in
groups of 64 with bfloat16 scales.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashpack.errors import UnsupportedError
from flashpack.export.content import Content
from flashpack.export.mlx import only_kind, shifted_losses
from flashpack.export.mlx_dense import DenseTensor, dense_tensors, part_specs
from flashpack.export.mlx_names import family_of, full_attention_interval
from flashpack.export.options import Options, Prepared
from flashpack.formats import constants as C
from flashpack.formats.affine import quantize_starts
from flashpack.formats.dtypes import from_float32, to_float32
from flashpack.formats.encodings import decode
from flashpack.formats.entries import Layer
from flashpack.formats.files import create, output_errors, pwrite, resize, sync, write_durably
from flashpack.formats.header import TensorSpec
from flashpack.formats.records import PROJECTIONS, Encoding, RecordKind, align

Arrays = list[NDArray[np.generic]]

_ENCODING = Encoding("affine", "BF16", 4, 64)
_FOLDERS = {4: "packed_experts", 2: "packed_experts_2bit"}
_ALIGNMENT = 64
_SMALL = (".mlp.gate", ".mlp.shared_expert_gate", ".linear_attn.in_proj_a", ".linear_attn.in_proj_b")
"""Matrices that are not quantized in packs, or to 8 bits by mlx-lm."""

_HOW = "convert the checkpoint with --experts q4 --dense q4 --group-size 64"

_SIZES = {
    "hidden_size": 4096,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "vocab_size": 248320,
    "rms_norm_eps": 1e-6,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
    "full_attention_interval": 4,
    "linear_num_value_heads": 64,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000.0,
}
"""``config`` of model_weights.json, in its order, with what Flash-MoE has as constants: that of Qwen3.5-397B-A17B."""


@dataclass(frozen=True)
class _Dense:
    """What model_weights.bin has of a dense tensor. ``read`` gives the arrays of ``specs``, in order, and whether they
    are rounded from what mlx-lm would have."""

    specs: list[TensorSpec]
    read: Callable[[], tuple[Arrays, bool]]
    rounded: bool = False


def prepare(content: Content, options: Options) -> Prepared:
    """See ``export``. Raises ``UnsupportedError`` for other models and encodings than Flash-MoE's."""
    options.choose("flash-moe", "stored")
    where, kind = content.pack.folder, content.pack.manifest.model["model_type"]
    if not kind.startswith("qwen3_5_moe"):
        raise UnsupportedError(f"{where}: Flash-MoE runs Qwen3.5-MoE only, not model_type {kind!r}")
    family = family_of(content)
    if content.config.tie_word_embeddings:
        raise UnsupportedError(f"{where}: Flash-MoE needs an lm_head of its own; this model's is its embedding")
    record, folder = _record(content)
    tensors = list(dense_tensors(content, family))
    dense = [_dense(content, tensor, family.prefix) for tensor in tensors]
    config = _config(content)
    table, size = _table([spec for d in dense for spec in d.specs])
    top = {"model": where.name, "num_tensors": len(table), "tensors": table, "config": config}
    small = {"model_weights.json": _json(top)}
    components, expert_size = expert_layout(record)
    if folder == _FOLDERS[4]:
        numbers = {"num_layers": len(content.layers), "num_experts": content.layers[0].experts}
        layout = {"expert_size": expert_size, **numbers, "components": components}
        small[f"{folder}/layout.json"] = _json(layout)
    if "tokenizer.json" in content.copies():
        small["tokenizer.json"] = content.copy("tokenizer.json")

    def write(out: Path) -> list[str]:
        cast = 0
        with _file(out, "model_weights.bin", size) as put:
            for d in dense:
                arrays, rounded = d.read()
                cast += rounded
                for spec, array in zip(d.specs, arrays, strict=True):
                    put(table[spec.name]["offset"], array)
        for layer in content.layers:
            _write_layer(content, layer, expert_size, out, f"{folder}/layer_{layer.index:02}.bin")
        for name, data in small.items():
            write_durably(out, name, data, C.PARTIAL_SUFFIX)
        return [f"{cast} tensors are rounded to bf16"] if cast else []

    experts = sum(layer.experts for layer in content.layers) * expert_size
    losses = [*content.left_out(), *shifted_losses(tensors), *_losses(dense, config)]
    return Prepared(size + sum(map(len, small.values())) + experts, write, losses)


def _record(content: Content) -> tuple[RecordKind, str]:
    """What all experts of all layers are like, and the folder for them."""
    if [layer.index for layer in content.layers] != list(range(content.config.num_hidden_layers)):
        raise UnsupportedError(f"{content.pack.folder}: Flash-MoE needs experts in every layer")
    records = {only_kind(content, layer) for layer in content.layers}
    encodings = {p.encoding for record in records for p in record.projections}
    for bits, folder in _FOLDERS.items():
        if encodings == {Encoding("affine", "BF16", bits, 64)}:
            return records.pop(), folder
    raise UnsupportedError(
        f"{content.pack.folder}: Flash-MoE has experts of 4 or 2 bits in groups of 64 with bf16 scales, these are "
        f"{', '.join(sorted(map(str, encodings)))}; {_HOW}"
    )


def _dense(content: Content, tensor: DenseTensor, prefix: str) -> _Dense:
    """Matrices in 4 bits, ``A_log`` in float32, all else in bfloat16: what its kernels read."""
    stem, specs = tensor.stem.removeprefix(prefix), [_named(s, prefix) for s in tensor.specs]
    if len(tensor.shape) != 2:
        dtype = "F32" if tensor.source.endswith(".A_log") else "BF16"
        return _Dense([TensorSpec(specs[0].name, dtype, specs[0].shape)], lambda: _cast(tensor, dtype))
    if tensor.encoding == _ENCODING:
        return _Dense(specs, lambda: (tensor.read(), False))
    if not stem.endswith(_SMALL):
        raise UnsupportedError(
            f"{content.pack.folder}: Flash-MoE has matrices of 4 bits in groups of 64 with bf16 scales, "
            f"{tensor.source} is {tensor.encoding}; {_HOW}"
        )

    def quantized() -> tuple[Arrays, bool]:
        parts = dict(zip(tensor.encoding.part_names, tensor.read(), strict=True))
        values = decode(tensor.encoding, parts, tensor.shape)
        return list(quantize_starts(values, _ENCODING.bits, _ENCODING.group_size, _ENCODING.dtype)[:3]), False

    return _Dense(part_specs(stem, _ENCODING, tensor.shape), quantized, rounded=True)


def _named(spec: TensorSpec, prefix: str) -> TensorSpec:
    return TensorSpec(spec.name.removeprefix(prefix), spec.dtype, spec.shape)


def _cast(tensor: DenseTensor, dtype: str) -> tuple[Arrays, bool]:
    stored = tensor.read()[0]
    if tensor.encoding.dtype == dtype:
        return [stored], False
    values = to_float32(stored, tensor.encoding.dtype)
    cast = from_float32(values, dtype)
    return [cast], not np.array_equal(to_float32(cast, dtype), values)


def _losses(dense: list[_Dense], config: dict[str, Any]) -> list[str]:
    lines = []
    if rounded := sum(d.rounded for d in dense):
        lines.append(f"{rounded} small matrices (routers, gates, in_proj_a and in_proj_b) are rounded to 4 bits")
    if other := [name for name, size in _SIZES.items() if config[name] != size]:
        lines.append(f"Flash-MoE unchanged: it has the 397B model's sizes as constants; here {', '.join(other)} differ")
    return lines


def _table(specs: list[TensorSpec]) -> tuple[dict[str, dict[str, Any]], int]:
    """``tensors`` of model_weights.json, and the size of model_weights.bin in bytes."""
    table: dict[str, dict[str, Any]] = {}
    end = 0
    for spec in sorted(specs, key=lambda spec: spec.name):
        start = align(end, _ALIGNMENT)
        table[spec.name] = {"offset": start, "size": spec.nbytes, "shape": spec.shape, "dtype": spec.dtype}
        end = start + spec.nbytes
    return table, end


def _config(content: Content) -> dict[str, Any]:
    """``config`` of model_weights.json."""
    config = content.config
    kinds = list(config.layer_types)
    numbers = dict(config.rope_parameters) | {"full_attention_interval": full_attention_interval(content, kinds)}
    found = {name: numbers[name] if name in numbers else getattr(config, name) for name in _SIZES}
    return found | {"layer_types": kinds}


def expert_layout(record: RecordKind) -> tuple[list[dict[str, Any]], int]:
    """``components`` of layout.json, the arrays of an expert in order, and the bytes of an expert."""
    rows: list[dict[str, Any]] = []
    end = 0
    for p in record.projections:
        for spec in part_specs(f"{p.name}_proj", p.encoding, p.shape):
            row = {"name": spec.name, "offset": end, "size": spec.nbytes, "dtype": spec.dtype, "shape": spec.shape}
            rows.append(row)
            end += spec.nbytes
    return rows, end


def _json(data: dict[str, Any]) -> bytes:
    """As Python's ``json.dump(..., indent=2)`` writes it in Flash-MoE's scripts."""
    return json.dumps(data, indent=2).encode()


def _write_layer(content: Content, layer: Layer, size: int, out: Path, name: str) -> None:
    """The file of a layer's experts, of ``size`` bytes each."""
    with _file(out, name, layer.experts * size) as put:
        for expert in content.experts(layer):
            at = expert.number * size
            for projection in PROJECTIONS:
                for part in _ENCODING.part_names:
                    array = expert.matrices[projection].parts[part]
                    put(at, array)
                    at += array.nbytes


@contextlib.contextmanager
def _file(out: Path, name: str, size: int) -> Iterator[Callable[[int, NDArray[np.generic]], None]]:
    """A function that writes an array at an offset of a new file of ``size`` bytes; what nothing is written to is
    zero."""
    with output_errors(out / name):
        fd = create(out / name, out)

        def put(at: int, array: NDArray[np.generic]) -> None:
            pwrite(fd, np.ascontiguousarray(array).data.cast("B"), at)

        try:
            resize(fd, size)
            yield put
            sync(fd)
        finally:
            os.close(fd)
