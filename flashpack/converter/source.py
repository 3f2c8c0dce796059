"""A checkpoint folder, here or far away: which tensors there are and where their bytes lie. Reads headers only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from flashpack.converter.folder import (
    GGUF,
    Source,
    SourceFolder,
    Span,
    changed_error,
    gguf_name,
    open_folder,
    source_errors,
)
from flashpack.converter.made import MadeFolder
from flashpack.converter.tensor import Extent, SourceTensor
from flashpack.converter.vocabulary import made_tokenizer
from flashpack.errors import FormatError, SourceError, UnsupportedError
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.header import Header, parse_json, read_header

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"

# Copied into the pack if present, besides every file whose name starts with "tokenizer" or "LICENSE".
# Python files (remote code) never are.
COPIED = (
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

    ``fingerprint`` says what the source was when it was opened: file -> what identifies it, as JSON. ``tensors``: those
    of the model, where the source's format is told on opening (GGUF).
    """

    folder: SourceFolder
    config: dict[str, Any]
    stored: dict[str, Extent]
    fingerprint: dict[str, dict[str, Any]]
    tensors: dict[str, SourceTensor] | None = None

    def check_unchanged(self) -> None:
        """Raise ``SourceError`` if a file is no longer the one that was opened, so that nothing made of both is kept.

        Compares what can be had without reading tensors: the state of a file, the bytes of JSON files.
        """
        for name, before in self.fingerprint.items():
            content = "content" in before
            now = _content(self.folder.read(name)) if content else self.folder.state(name)
            before = {key: before[key] for key in now}
            if now != before:
                raise changed_error(self.folder.where(name), ", ".join(differences(before, now)))

    def copied_files(self) -> list[str]:
        """Names of the small files that go into the pack unchanged, sorted."""
        return [
            n
            for n in self.folder.files()
            if n in COPIED or (n.startswith(("tokenizer", "LICENSE")) and not n.endswith((".py", ".safetensors")))
        ]


def open_checkpoint(src: Source) -> Checkpoint:
    """Read config.json, the index and every shard's header; refuses incomplete checkpoints.

    A GGUF file, or a folder with one and no safetensors files, has everything in its own header.
    """
    chosen = gguf_name(src)
    folder = open_folder(src if chosen is None else Path(src).parent)
    try:
        files = folder.files()
        if chosen or (not any(n.endswith(".safetensors") for n in files) and any(n.endswith(GGUF) for n in files)):
            from flashpack.converter.gguf.checkpoint import open_gguf

            return open_gguf(folder, files, chosen)
        return _open(folder)
    except BaseException:
        folder.close()
        raise


def _open(folder: SourceFolder) -> Checkpoint:
    files = folder.files()
    if C.MANIFEST in files:
        raise SourceError(
            f"{folder.name}: a pack already; convert its checkpoint, or 'flashpack recode' to compress its experts"
        )
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
        if shard not in files:
            raise SourceError(f"{folder.where(shard)}: the shard is missing; download it again")
    states = [folder.state(shard) for shard in shards]
    for shard, state, header in zip(
        shards, states, _headers(folder, shards, [state["size"] for state in states]), strict=True
    ):
        where = folder.where(shard)
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
    made = made_tokenizer(folder, files)
    return Checkpoint(MadeFolder(folder, made) if made else folder, config, stored, fingerprint)


def _headers(folder: SourceFolder, shards: list[str], sizes: list[int]) -> Iterator[Header]:
    """The headers of shards of these sizes: first all lengths, then all that is so long, for far away each answer is
    waited for."""
    lengths = list(_read_all(folder, [(shard, 0, min(size, 8)) for shard, size in zip(shards, sizes, strict=True)]))
    spans = []
    for shard, size, start in zip(shards, sizes, lengths, strict=True):
        length = int.from_bytes(start, "little")
        spans.append((shard, 8, length if length <= min(size - 8, C.MAX_HEADER_BYTES) else 0))
    for shard, size, start, text in zip(shards, sizes, lengths, _read_all(folder, spans), strict=True):
        known = {(len(start), 0): start, (len(text), 8): text}

        def read(count: int, offset: int, shard: str = shard, known: dict[Any, bytearray] = known) -> bytearray:
            if (count, offset) not in known:  # what is no safetensors file, for the message
                (known[count, offset],) = _read_all(folder, [(shard, offset, count)])
            return known[count, offset]

        with source_errors(folder.where(shard)):
            header = read_header(read, size, folder.where(shard))
        yield header


def _read_all(folder: SourceFolder, spans: list[Span]) -> Iterator[bytearray]:
    with folder.steps(lambda number: [spans[number]], len(spans), Event()) as steps:
        for number, (file, offset, count) in enumerate(spans):
            buffer = bytearray(count)
            with steps.step(number) as reader:
                reader.read_into(file, offset, memoryview(buffer))
            yield buffer


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
    if any(name.endswith(".bin") for name in files):
        raise UnsupportedError(f"{folder.name}: no safetensors files; .bin checkpoints are not supported")
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
