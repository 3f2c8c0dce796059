"""A GGUF file, or the pieces of a split one, as a checkpoint: tensors under the names of transformers' model, and the
small files that a checkpoint folder would have, made from the metadata."""

from __future__ import annotations

import json
import re
from typing import Any

from flashpack.converter.folder import GGUF, SourceFolder
from flashpack.converter.gguf.blocks import weight_format
from flashpack.converter.gguf.facts import Facts
from flashpack.converter.gguf.families import Family, family_of, make_config
from flashpack.converter.gguf.folder import GgufFolder
from flashpack.converter.gguf.header import GgufTensor, read_gguf
from flashpack.converter.gguf.tokenizer import tokenizer_files
from flashpack.converter.source import CONFIG, Checkpoint
from flashpack.converter.tensor import Extent, Plain, SourceTensor
from flashpack.errors import SourceError, UnsupportedError

_PIECE = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def gguf_files(folder: SourceFolder, files: list[str], chosen: str | None) -> list[str]:
    """The file ``chosen``, or the only one of the folder, with all other pieces if it is one of a split file."""
    found = [name for name in files if name.endswith(GGUF)]
    if chosen is None:
        models = {_PIECE.sub(r"\1-of-\3.gguf", name): name for name in found}
        if len(models) != 1:
            raise SourceError(
                f"{folder.name}: {len(models)} GGUF files: {', '.join(sorted(models.values()))}; name one of them"
            )
        chosen = next(iter(models.values()))
    match = _PIECE.fullmatch(chosen)
    if match is None:
        return [chosen]
    pieces = [f"{match[1]}-{i:05}-of-{match[3]}.gguf" for i in range(1, int(match[3]) + 1)]
    for name in (*pieces, chosen):
        if name not in (files if name in pieces else pieces):
            raise SourceError(f"{folder.where(name)}: a piece of a split GGUF file is missing; download it again")
    return pieces


def open_gguf(folder: SourceFolder, files: list[str], chosen: str | None = None) -> Checkpoint:
    """Read the headers of a GGUF file in ``folder``, which holds ``files``; see ``gguf_files`` for which one."""
    fingerprint: dict[str, dict[str, Any]] = {}
    metadata: dict[str, Any] = {}
    tensors: dict[str, tuple[str, GgufTensor]] = {}
    pieces = gguf_files(folder, files, chosen)
    for i, file in enumerate(pieces):
        where = folder.where(file)
        state = folder.state(file)
        header = read_gguf(folder, file, state["size"])
        fingerprint[file] = state | {"header": header.digest}
        if (header.metadata.get("split.count", 1), header.metadata.get("split.no", i)) != (len(pieces), i):
            raise SourceError(
                f"{where}: by its metadata not piece {i + 1} of {len(pieces)}; download all of them again"
            )
        metadata = metadata or header.metadata
        for tensor in header.tensors:
            if tensor.name in tensors:
                raise SourceError(f"{where}: tensor {tensor.name[:99]!r} is also in {tensors[tensor.name][0]}")
            tensors[tensor.name] = (file, tensor)
    where = folder.where(pieces[0])
    if metadata.get("split.tensors.count", len(tensors)) != len(tensors):
        raise SourceError(
            f"{where}: the pieces hold {len(tensors)} tensors instead of {metadata['split.tensors.count']}"
        )
    facts = Facts(where, metadata, {name: tensor for name, (_, tensor) in tensors.items()})
    family = family_of(facts)
    config = make_config(facts, family)
    made = {CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
    made |= tokenizer_files(where, metadata)
    model = _tensors(facts, family, config, tensors)
    stored = {name: next(iter(t.parts.values())) for name, t in model.items()}
    return Checkpoint(GgufFolder(folder, made), config, stored, fingerprint, model)


def _tensors(
    facts: Facts, family: Family, config: dict[str, Any], tensors: dict[str, tuple[str, GgufTensor]]
) -> dict[str, SourceTensor]:
    """The model's tensors by name. What has no place in it keeps a name that the binding refuses or lists."""
    model: dict[str, SourceTensor] = {}
    for file, stored in tensors.values():
        name = family.name(stored.name, config["num_hidden_layers"])
        kind = weight_format(stored.type, stored.name)
        if isinstance(kind, Plain):
            extent = Extent(file, kind.dtype, stored.offset, stored.shape)
        elif len(stored.shape) > 1 and not stored.name.endswith(".bias"):
            extent = Extent(file, "U8", stored.offset, stored.bytes_shape)
        else:
            raise UnsupportedError(f"{facts.where}: tensor {stored.name} is no matrix, but stored as {stored.type}")
        tensor = SourceTensor(name, stored.shape, kind, {"weight": extent})
        if name != stored.name and not name.startswith("mtp."):
            tensor = family.change(re.sub(r"^blk\.\d+\.", "", stored.name), tensor, config)
        if name in model:
            raise SourceError(f"{facts.where}: two tensors would become {name}; one is {stored.name}")
        model[name] = tensor
    return model
