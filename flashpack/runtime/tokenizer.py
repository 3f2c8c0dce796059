"""The pack's tokenizer: transformers' own, after a look at files that a stranger may have written."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashpack.errors import FormatError
from flashpack.formats.header import parse_json
from flashpack.skeleton import library_errors, read_whole_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_GROWTH = 1024
"""How many times longer the steps of a tokenizer may make a text. Real ones stay below 50."""

_DOUBLING = {"BPEDecoder", "ByteLevel", "CTC", "Metaspace", "NFKC", "NFKD", "Nmt", "Prepend", "WordPiece"}
"""Steps that add a character beside each, or write a byte or character as two."""

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The pack's own tokenizer; never runs code from the pack.

    Raises ``FormatError`` if there is none, or one that transformers cannot load or that makes texts explode.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in _FILES):
        # transformers would make up an empty tokenizer.
        raise FormatError(f"{folder}: the pack has no tokenizer; the source checkpoint had none")
    with library_errors(f"{folder}: transformers cannot load the pack's tokenizer"):
        config = read_whole_config(folder)
        for choice in (_json(folder / "tokenizer_config.json"), vars(config)):
            _check_class(folder, choice.get("tokenizer_class"))
        _check_growth(folder / "tokenizer.json", _json(folder / "tokenizer.json"))
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False, local_files_only=True
        )
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """Token ids of ``text``; ``special`` adds the tokens that the tokenizer puts around a text."""
    with library_errors("the pack's tokenizer fails"):
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    data = parse_json(path.read_bytes(), str(path)) if path.is_file() else {}
    if not isinstance(data, dict):
        raise FormatError(f"{path}: not a JSON object")
    return data


def _check_class(folder: Path, name: Any) -> None:
    """transformers takes a class of any kind by name, models too: only tokenizers may load the pack."""
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if name is None:
        return
    found = tokenizer_class_from_name(name) if isinstance(name, str) else name
    # What transformers does not know, it replaces by its general class.
    if found is not None and not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
        raise FormatError(f"{folder}: tokenizer_class {str(name)[:60]!r} is not a tokenizer")


def _check_growth(path: Path, data: dict[str, Any]) -> None:
    """A chain of replacements that each double a text would fill the memory with a short prompt."""
    for steps in (("normalizer", "pre_tokenizer", "post_processor"), ("decoder",)):
        growth = 1
        for node in itertools.chain.from_iterable(_nodes(data.get(step)) for step in steps):
            growth *= _growth(node)
            if growth > MAX_GROWTH:
                raise FormatError(f"{path}: its {steps[0]} makes a text more than {MAX_GROWTH} times longer")


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects in ``value``."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nodes(inner)


def _growth(node: dict[str, Any]) -> int:
    """How many times longer one step can make a text."""
    kind = node.get("type")
    if kind == "Replace":
        pattern, content = node["pattern"], node["content"]
        # An expression may match a single character, or the empty text beside each.
        return -(-len(content) // len(pattern["String"])) or 1 if "String" in pattern else 1 + len(content)
    if kind == "TemplateProcessing":
        return max(1, *(sum("Sequence" in part for part in node[k]) for k in ("single", "pair")))
    if kind == "Precompiled" and node["precompiled_charsmap"]:
        table = base64.b64decode(node["precompiled_charsmap"])
        replacements = table[4 + int.from_bytes(table[:4], "little") :]
        return max(1, *map(len, replacements.split(b"\0")))
    return 2 if kind in _DOUBLING else 1
