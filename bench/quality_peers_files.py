"""Weights of GGUF files, folders of mlx-lm and packs, as float32 under the names of a transformers model.

Norms are stored as they are or with 1 added, and llama.cpp orders the value heads of recurrent layers differently; all
of that is undone here. Names are those of Qwen3.5-MoE.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from flashpack.formats import Encoding, Pack
from flashpack.formats.dtypes import NUMPY
from flashpack.formats.encodings import decode

SHIFTED_NORM = re.compile(r"(layernorm|[qk]_norm|model\.norm)\.weight$")
"""Norms that transformers multiplies with 1 + weight, and the peers with what they store."""


@dataclass
class Stored:
    """Decoded values in the shape of the model's parameter, and the bytes that hold them in the file."""

    values: torch.Tensor
    nbytes: int


def read(path: Path, shapes: dict[str, torch.Tensor]) -> dict[str, Stored]:
    """The tensors of a file by parameter name. ``shapes``: the model's parameters; all must be there."""
    if path.suffix == ".gguf":
        found = read_gguf(path, shapes)
    elif (path / "flashpack.json").exists():
        found = read_pack(path)
    else:
        found = read_mlx(path)
    for name, t in shapes.items():
        if name == "lm_head.weight" and name not in found:
            found[name] = Stored(found["model.embed_tokens.weight"].values.clone(), 0)  # tied
        found[name].values = found[name].values.reshape(t.shape)
    return {name: found[name] for name in shapes}


def join(gate: Stored, up: Stored) -> Stored:
    """Both in one, as transformers has them: [experts, 2 x width, H]."""
    return Stored(torch.cat([gate.values, up.values], dim=1), gate.nbytes + up.nbytes)


def read_gguf(path: Path, shapes: dict[str, torch.Tensor]) -> dict[str, Stored]:
    """A GGUF file of architecture qwen35moe."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t for t in reader.tensors}

    def number(key: str) -> int:
        return int(reader.fields[f"qwen35moe.{key}"].contents())

    def load(name: str) -> Stored:
        t = tensors[name]
        return Stored(torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()), int(t.n_bytes))

    key_heads, value_heads = number("ssm.group_count"), number("ssm.time_step_rank")
    keys = 2 * key_heads * number("ssm.state_size")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN35MOE, number("block_count"))

    def heads_back(x: torch.Tensor, dim: int, before: int) -> torch.Tensor:
        """Value heads from llama.cpp's order to that of transformers, after ``before`` rows that stay."""
        kept, moved = x.split([before, x.shape[dim] - before], dim)
        shape = moved.shape
        parts = moved.reshape(*shape[:dim], value_heads // key_heads, key_heads, -1, *shape[dim + 1 :])
        return torch.cat([kept, parts.transpose(dim, dim + 1).reshape(shape)], dim)

    found = {}
    for name in shapes:
        if name == "lm_head.weight" and "output.weight" not in tensors:
            continue
        if name.endswith("experts.gate_up_proj"):
            both = [name.replace("gate_up_proj", f"{part}_proj.weight") for part in ("gate", "up")]
            found[name] = join(*(load(names.get_name(part, (".weight",))) for part in both))
            continue
        own = re.sub(r"dt_bias$", "dt_proj.bias", name)
        stored = load(
            names.get_name(
                own if own.endswith((".weight", ".bias", "A_log")) else f"{own}.weight", (".weight", ".bias")
            )
        )
        if SHIFTED_NORM.search(name):
            stored.values = stored.values - 1
        elif "A_log" in name:
            stored.values = (-stored.values).log()
        if re.search(r"A_log|dt_bias|in_proj_[abz]", name):
            stored.values = heads_back(stored.values, 0, 0)
        elif re.search(r"in_proj_qkv|conv1d", name):
            stored.values = heads_back(stored.values, 0, keys)
        elif "linear_attn.out_proj" in name:
            stored.values = heads_back(stored.values, 1, 0)
        found[name] = stored
    return found


def read_mlx(path: Path) -> dict[str, Stored]:
    """A folder of mlx-lm with affine groups."""
    config = json.loads((path / "config.json").read_text())["quantization"]
    raw: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        raw |= load_file(file)
    found = {}
    for name, stored in raw.items():
        stem = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")):
            continue
        values, nbytes = stored, stored.nbytes
        if f"{stem}.scales" in raw:
            scales, biases = raw[f"{stem}.scales"], raw[f"{stem}.biases"]
            bits = (config | config.get(stem, {}))["bits"]
            flags = np.unpackbits(stored.view(torch.uint8).numpy(), axis=-1, bitorder="little")
            codes = flags.reshape(*scales.shape, -1, bits) @ (1 << np.arange(bits))
            values = torch.from_numpy(codes).float() * scales.float()[..., None] + biases.float()[..., None]
            values, nbytes = values.flatten(-2), nbytes + scales.nbytes + biases.nbytes
        own = name.removeprefix("language_model.").replace("switch_mlp", "experts")
        values = values.float() - 1 if SHIFTED_NORM.search(own) else values.float()
        found[own.replace("experts.down_proj.weight", "experts.down_proj")] = Stored(values, nbytes)
    for name in [n for n in found if n.endswith("experts.gate_proj.weight")]:
        up = found.pop(name.replace("gate_proj", "up_proj"))
        found[name.replace("gate_proj.weight", "gate_up_proj")] = join(found.pop(name), up)
    return found


def read_pack(path: Path) -> dict[str, Stored]:
    """A pack."""
    pack = Pack(path)
    found = {}
    parts = {name for matrix in pack.manifest.matrices for name in matrix.tensor_names().values()}
    for tensor in pack.manifest.tensors:
        if tensor.name not in parts:
            found[tensor.name] = stored_as(
                Encoding("raw", tensor.dtype), {"weight": pack.map_tensor(tensor.name)}, tensor.shape
            )
    for matrix in pack.manifest.matrices:
        arrays = {part: pack.map_tensor(name) for part, name in matrix.tensor_names().items()}
        found[matrix.name] = stored_as(matrix.encoding, arrays, matrix.shape)
    for layer in pack.manifest.layers:
        experts: dict[str, list[Stored]] = {"gate": [], "up": [], "down": []}
        with pack.open_shard(layer) as shard:
            for expert in range(layer.experts):
                kind = shard.kind(expert)
                offset, span = shard.extent(expert)
                stored, record = bytearray(os.pread(shard.fd, span, offset)), bytearray(kind.stride)
                shard.decode(expert, memoryview(stored), memoryview(record))
                arrays = {
                    s.name: np.frombuffer(record, NUMPY[s.dtype], math.prod(s.shape), s.offset).reshape(s.shape)
                    for s in kind.sections
                }
                for p in kind.projections:
                    own = {part: arrays[f"{p.name}.{part}"] for part in p.encoding.part_names}
                    experts[p.name].append(stored_as(p.encoding, own, p.shape))
        gate, up, down = (
            Stored(torch.stack([s.values for s in row]), sum(s.nbytes for s in row)) for row in experts.values()
        )
        found[f"{layer.module}.gate_up_proj"], found[f"{layer.module}.down_proj"] = join(gate, up), down
    return found


def stored_as(encoding: Encoding, arrays: dict[str, NDArray[np.generic]], shape: tuple[int, ...]) -> Stored:
    """An encoded matrix, decoded."""
    return Stored(torch.from_numpy(decode(encoding, arrays, shape).copy()), sum(a.nbytes for a in arrays.values()))
