"""A checkpoint folder on disk: which tensors there are and where their bytes lie. Reads headers only."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashpack.errors import FormatError, SourceError, UnsupportedError
from flashpack.formats.checksums import hexdigest
from flashpack.formats.dtypes import ITEMSIZE
from flashpack.formats.header import parse_json, read_header
from flashpack.formats.records import Encoding

INDEX = "model.safetensors.index.json"

# Copied into the pack if present, besides every file whose name starts with "tokenizer" or "LICENSE".
# Python files (remote code) never are.
_COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True, slots=True)
class Extent:
    """A stored array in a source file, seen as 2-D [all leading dimensions, last dimension], or some of its rows."""

    path: str
    dtype: str
    offset: int
    rows: int
    row_bytes: int

    def take(self, start: int, rows: int) -> Extent:
        """Rows [start, start + rows)."""
        return replace(self, offset=self.offset + start * self.row_bytes, rows=rows)

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the model as the source stores it: its logical shape, how values are encoded, where parts lie.

    ``add`` is added to the decoded values: MLX stores some norm weights with 1 added.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    parts: dict[str, Extent]
    add: float = 0.0

    def rows(self, start: int, count: int) -> SourceTensor:
        """Rows [start, start + count) of a matrix, seen as 2-D [rows, width]."""
        parts = {k: p.take(start, count) for k, p in self.parts.items()}
        return replace(self, shape=(count, self.shape[-1]), parts=parts)

    def flat(self) -> SourceTensor:
        """The same values as one matrix [all leading dimensions, width]."""
        width = self.shape[-1] if self.shape else 1
        return replace(self, shape=(math.prod(self.shape[:-1]), width))


@dataclass(frozen=True)
class Checkpoint:
    """A source checkpoint: ``stored`` maps tensor names to (dtype, shape, extent); ``config`` is config.json."""

    folder: Path
    config: dict[str, Any]
    stored: dict[str, tuple[str, tuple[int, ...], Extent]]
    fingerprint: str

    def copied_files(self) -> list[str]:
        """Names of the small files that go into the pack unchanged, sorted."""
        names = [p.name for p in self.folder.iterdir() if p.is_file()]
        return sorted(
            n
            for n in names
            if n in _COPIED or (n.startswith(("tokenizer", "LICENSE")) and not n.endswith((".py", ".safetensors")))
        )


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read config.json, the index and every shard's header; refuses incomplete checkpoints."""
    root = Path(folder)
    if not root.is_dir():
        raise SourceError(f"{root}: no such folder")
    config_path = root / "config.json"
    if not config_path.is_file():
        raise SourceError(f"{root}: no config.json; is this a Hugging Face checkpoint folder?")
    try:
        config = parse_json(config_path.read_bytes(), str(config_path))
    except FormatError as e:
        raise SourceError(str(e)) from e
    if not isinstance(config, dict):
        raise SourceError(f"{config_path}: not a JSON object")
    shards, wanted = _shards(root)
    stored: dict[str, tuple[str, tuple[int, ...], Extent]] = {}
    states = []
    for shard in shards:
        path = root / shard
        if not path.is_file():
            raise SourceError(f"{path}: the shard is missing; download it again")
        with open(path, "rb") as f:
            try:
                header = read_header(f.fileno(), str(path))
            except FormatError as e:
                raise SourceError(str(e)) from e
            status = os.fstat(f.fileno())
        for t in header.tensors:
            if wanted.get(t.name, shard) != shard:
                continue  # a second copy: the index decides
            rows = math.prod(t.shape[:-1])
            row_bytes = t.nbytes // rows if rows else 0
            if t.name in stored:
                other = stored[t.name][2].path
                raise SourceError(f"{path}: tensor {t.name} is also in {other}; the index names neither")
            stored[t.name] = (t.dtype, t.shape, Extent(shard, t.dtype, t.offset, rows, row_bytes))
        states.append([shard, status.st_size, status.st_mtime_ns, hexdigest(repr(header.tensors).encode())])
    for name, shard in wanted.items():
        if name not in stored:
            raise SourceError(f"{root / INDEX}: names tensor {name}, which {shard} does not hold; download both again")
    fingerprint = hexdigest(json.dumps([config, states], sort_keys=True).encode())
    return Checkpoint(root, config, stored, fingerprint)


def _shards(root: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the shards to read, and the index's map from tensor to shard (empty without an index)."""
    index_path = root / INDEX
    if index_path.is_file():
        try:
            weight_map = parse_json(index_path.read_bytes(), str(index_path))["weight_map"]
        except (FormatError, KeyError, TypeError) as e:
            raise SourceError(f"{index_path}: not a safetensors index: {e}") from e
        shards = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
        for shard in shards:
            if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\\" in shard:
                raise SourceError(f"{index_path}: {shard!r} is not a file name")
        return shards, weight_map
    files = sorted(p.name for p in root.glob("*.safetensors"))
    if files in (["model.safetensors"], ["model-00001-of-00001.safetensors"]):
        return files, {}
    if files:
        raise SourceError(f"{root}: {len(files)} safetensors files but no {INDEX}; download it too")
    if any(root.glob("*.bin")) or any(root.glob("*.gguf")):
        raise UnsupportedError(f"{root}: no safetensors files; .bin and .gguf checkpoints are not supported")
    raise SourceError(f"{root}: no safetensors files")


def plain_tensor(name: str, dtype: str, shape: tuple[int, ...], extent: Extent) -> SourceTensor:
    """An unquantized tensor; ``dtype`` must be one that packs hold raw."""
    if dtype not in ("BF16", "F16", "F32"):
        raise UnsupportedError(f"tensor {name}: stored type {dtype} ({ITEMSIZE[dtype]} bytes) is not supported yet")
    return SourceTensor(name, shape, Encoding("raw", dtype), {"weight": extent})
