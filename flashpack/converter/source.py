"""A checkpoint folder on disk: which tensors there are and where their bytes lie. Reads headers only."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from flashpack.converter.folder import SourceFolder, open_folder, source_errors
from flashpack.converter.tensor import Extent
from flashpack.errors import FormatError, SourceError, UnsupportedError
from flashpack.formats.checksums import hexdigest
from flashpack.formats.header import Header, parse_json, read_header

CONFIG = "config.json"
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


@dataclass(frozen=True)
class Checkpoint:
    """A source checkpoint: ``stored`` maps tensor names to where they lie; ``config`` is config.json.

    ``fingerprint`` says what the source was when it was opened: file -> what identifies it, as JSON.
    """

    folder: SourceFolder
    config: dict[str, Any]
    stored: dict[str, Extent]
    fingerprint: dict[str, dict[str, Any]]

    def check_unchanged(self) -> None:
        """Raise ``SourceError`` if a file is no longer the one that was opened, so that nothing made of both is kept.

        Compares what can be had without reading tensors: the state of a file, the bytes of JSON files.
        """
        for name, before in self.fingerprint.items():
            content = "content" in before
            now = _content(self.folder.read(name)) if content else self.folder.state(name)
            before = {key: before[key] for key in now}
            if now != before:
                raise SourceError(
                    f"{self.folder.where(name)}: changed during the conversion: {', '.join(differences(before, now))}; "
                    f"put the original back and run the same command again, or start anew with --overwrite"
                )

    def copied_files(self) -> list[str]:
        """Names of the small files that go into the pack unchanged, sorted."""
        return [
            n
            for n in self.folder.files()
            if n in _COPIED or (n.startswith(("tokenizer", "LICENSE")) and not n.endswith((".py", ".safetensors")))
        ]


def open_checkpoint(src: str | os.PathLike[str]) -> Checkpoint:
    """Read config.json, the index and every shard's header; refuses incomplete checkpoints."""
    folder = open_folder(src)
    files = folder.files()
    if CONFIG not in files:
        raise SourceError(f"{folder.name}: no {CONFIG}; is this a Hugging Face checkpoint folder?")
    raw = folder.read(CONFIG)
    with source_errors(folder.where(CONFIG)):
        config = parse_json(raw, folder.where(CONFIG))
    if not isinstance(config, dict):
        raise SourceError(f"{folder.where(CONFIG)}: not a JSON object")
    fingerprint = {CONFIG: _content(raw)}
    shards, wanted = _shards(folder, files, fingerprint)
    stored: dict[str, Extent] = {}
    for shard in shards:
        where = folder.where(shard)
        if shard not in files:
            raise SourceError(f"{where}: the shard is missing; download it again")
        state = folder.state(shard)
        with source_errors(where):
            header = _read_header(folder, shard, state["size"])
        fingerprint[shard] = state | {"header": hexdigest(repr(header.tensors).encode())}
        for t in header.tensors:
            if wanted.get(t.name, shard) != shard:
                continue  # a second copy: the index decides
            if t.name in stored:
                raise SourceError(f"{where}: tensor {t.name} is also in {stored[t.name].path}; the index names neither")
            stored[t.name] = Extent(shard, t.dtype, t.offset, t.shape)
    for name, shard in wanted.items():
        if name not in stored:
            raise SourceError(
                f"{folder.where(INDEX)}: names tensor {name}, which {shard} does not hold; download both again"
            )
    return Checkpoint(folder, config, stored, fingerprint)


def _read_header(folder: SourceFolder, shard: str, size: int) -> Header:
    """The header of a shard of ``size`` bytes."""

    def read(count: int, offset: int) -> bytearray:
        buffer = bytearray(count)
        folder.read_into(shard, offset, memoryview(buffer))
        return buffer

    return read_header(read, size, folder.where(shard))


def _content(data: bytes) -> dict[str, Any]:
    return {"content": hexdigest(data)}


def _shards(
    folder: SourceFolder, files: list[str], fingerprint: dict[str, dict[str, Any]]
) -> tuple[list[str], dict[str, str]]:
    """Names of the shards to read, and the index's map from tensor to shard (empty without an index).

    Adds the index to ``fingerprint``.
    """
    where = folder.where(INDEX)
    if INDEX in files:
        raw = folder.read(INDEX)
        fingerprint[INDEX] = _content(raw)
        try:
            weight_map = parse_json(raw, where)["weight_map"]
        except (FormatError, KeyError, TypeError) as e:
            raise SourceError(f"{where}: not a safetensors index: {e}") from e
        if not isinstance(weight_map, dict):
            raise SourceError(f"{where}: not a safetensors index: weight_map is not an object")
        for shard in weight_map.values():
            if not isinstance(shard, str) or not 0 < len(shard.encode()) < 256 or re.search(r"^\.\.?$|[/\\\0]", shard):
                raise SourceError(f"{where}: {str(shard)[:99]!r} is not a file name")
        return sorted(set(weight_map.values())), weight_map
    shards = [name for name in files if name.endswith(".safetensors")]
    if shards in (["model.safetensors"], ["model-00001-of-00001.safetensors"]):
        return shards, {}
    if shards:
        raise SourceError(f"{folder.name}: {len(shards)} safetensors files but no {INDEX}; download it too")
    if any(name.endswith((".bin", ".gguf")) for name in files):
        raise UnsupportedError(f"{folder.name}: no safetensors files; .bin and .gguf checkpoints are not supported")
    raise SourceError(f"{folder.name}: no safetensors files")


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
