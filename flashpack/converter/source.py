"""A checkpoint folder on disk: which tensors there are and where their bytes lie. Reads headers only."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

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
    """A source checkpoint: ``stored`` maps tensor names to (dtype, shape, extent); ``config`` is config.json.

    ``fingerprint`` says what the source was when it was opened: file -> what identifies it, as JSON.
    """

    folder: Path
    config: dict[str, Any]
    stored: dict[str, tuple[str, tuple[int, ...], Extent]]
    fingerprint: dict[str, dict[str, Any]]

    def check_unchanged(self) -> None:
        """Raise ``SourceError`` if a file is no longer the one that was opened, so that nothing made of both is kept.

        Compares what can be had without reading tensors: size and modified time, the bytes of JSON files.
        """
        for name, before in self.fingerprint.items():
            path = self.folder / name
            with source_errors(path):
                now = _content(path.read_bytes()) if "content" in before else _state(path.stat())
            before = {key: before[key] for key in now}
            if now != before:
                raise SourceError(
                    f"{path}: changed during the conversion: {', '.join(differences(before, now))}; put the original "
                    f"back and run the same command again, or start anew with --overwrite"
                )

    def read_copied(self, name: str) -> bytes:
        """The bytes of one of ``copied_files``."""
        with source_errors(self.folder / name):
            return (self.folder / name).read_bytes()

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
    with source_errors(config_path):
        raw = config_path.read_bytes()
        config = parse_json(raw, str(config_path))
    if not isinstance(config, dict):
        raise SourceError(f"{config_path}: not a JSON object")
    fingerprint = {config_path.name: _content(raw)}
    shards, wanted = _shards(root, fingerprint)
    stored: dict[str, tuple[str, tuple[int, ...], Extent]] = {}
    for shard in shards:
        path = root / shard
        if not path.is_file():
            raise SourceError(f"{path}: the shard is missing; download it again")
        with source_errors(path), open(path, "rb") as f:
            header = read_header(f.fileno(), str(path))
            state = _state(os.fstat(f.fileno()))
        fingerprint[shard] = state | {"header": hexdigest(repr(header.tensors).encode())}
        for t in header.tensors:
            if wanted.get(t.name, shard) != shard:
                continue  # a second copy: the index decides
            rows = math.prod(t.shape[:-1])
            row_bytes = t.nbytes // rows if rows else 0
            if t.name in stored:
                other = stored[t.name][2].path
                raise SourceError(f"{path}: tensor {t.name} is also in {other}; the index names neither")
            stored[t.name] = (t.dtype, t.shape, Extent(shard, t.dtype, t.offset, rows, row_bytes))
    for name, shard in wanted.items():
        if name not in stored:
            raise SourceError(f"{root / INDEX}: names tensor {name}, which {shard} does not hold; download both again")
    return Checkpoint(root, config, stored, fingerprint)


@contextlib.contextmanager
def source_errors(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading ``path`` into a ``SourceError``."""
    try:
        yield
    except FormatError as e:
        raise SourceError(str(e)) from e
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror}") from e


def _state(status: os.stat_result) -> dict[str, Any]:
    """Size in bytes and modified time (UTC, with nanoseconds) of a file; two states are only ever compared."""
    return {"size": status.st_size, "modified": str(np.datetime64(status.st_mtime_ns, "ns"))}


def _content(data: bytes) -> dict[str, Any]:
    return {"content": hexdigest(data)}


def _shards(root: Path, fingerprint: dict[str, dict[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """Names of the shards to read, and the index's map from tensor to shard (empty without an index).

    Adds the index to ``fingerprint``.
    """
    index_path = root / INDEX
    if index_path.is_file():
        with source_errors(index_path):
            raw = index_path.read_bytes()
        fingerprint[INDEX] = _content(raw)
        try:
            weight_map = parse_json(raw, str(index_path))["weight_map"]
        except (FormatError, KeyError, TypeError) as e:
            raise SourceError(f"{index_path}: not a safetensors index: {e}") from e
        if not isinstance(weight_map, dict):
            raise SourceError(f"{index_path}: not a safetensors index: weight_map is not an object")
        for shard in weight_map.values():
            if not isinstance(shard, str) or not 0 < len(shard.encode()) < 256 or re.search(r"^\.\.?$|[/\\\0]", shard):
                raise SourceError(f"{index_path}: {str(shard)[:99]!r} is not a file name")
        return sorted(set(weight_map.values())), weight_map
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


def differences(old: object, new: object, name: str = "") -> list[str]:
    """What differs between two JSON values, leaf by leaf: "recipe experts q4 -> q3"."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            inner = f"{name} {key}".strip()
            if key not in old or key not in new:
                found.append(f"{inner} is {'new' if key in new else 'gone'}")
            elif old[key] != new[key]:
                found += differences(old[key], new[key], inner)
        return found
    texts = [str(value) for value in (old, new)]
    if any(
        isinstance(v, (dict, list)) or re.fullmatch("[0-9a-f]{64}", t) for v, t in zip((old, new), texts, strict=True)
    ):
        return [f"{name} changed"]
    return [f"{name} {texts[0]} -> {texts[1]}"]
