"""A tokenizer.json for checkpoints that have none: made of the vocabulary they have, by transformers' own converters.

Code of the checkpoint never runs. Where a tokenizer needs some (Kimi's), only the text of its splitting pattern is
taken from it, as a literal.
"""

from __future__ import annotations

import ast
import base64
import binascii
import importlib
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

from flashpack.converter.folder import SourceFolder, source_errors
from flashpack.errors import SourceError, UnsupportedError
from flashpack.formats.header import parse_json
from flashpack.skeleton import library_errors

READY, SETTINGS = "tokenizer.json", "tokenizer_config.json"

KINDS = ("tiktoken.model", "tekken.json", "tokenizer.model", "merges.txt")
"""Vocabularies that are converted, the first that is there; ``merges.txt`` goes with ``vocab.json``."""

_CLASSES = {
    "tokenizer.model": ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"),
    "merges.txt": ("GPT2Tokenizer", "Qwen2Tokenizer"),
}
"""transformers' classes that build a tokenizer from such a file alone."""

_PATTERN = "pat_str"

_PROBES = (
    "The quick brown fox's 12345 jumps, doesn't it?",
    "  two  spaces\tand a tab ",
    "def f(x):\n    return x + 1\n\n",
    "\u6c49\u5b57 \u304b\u306a \ud55c\uae00 \u0420\u0443\u0441 \u00e9t\u00e9 e\u0301 \ufb01 \uff21 \U0001f600",
)
"""Texts with what tokenizers treat in ways of their own."""


def made_tokenizer(folder: SourceFolder, files: list[str]) -> dict[str, bytes]:
    """What a checkpoint folder with these ``files`` lacks for its tokenizer to be loaded: file name -> content.

    Empty where nothing is lacking, and for one without any vocabulary. Raises ``UnsupportedError`` for a vocabulary
    that cannot be converted.
    """
    settings = _settings(folder, files)
    if READY in files:
        return {SETTINGS: _written(settings)} if "auto_map" in settings else {}
    kind = next((name for name in KINDS if name in files), None)
    if kind is None:
        odd = next((name for name in files if name.endswith(".tiktoken")), None)
        if odd is not None:
            raise _refusal(folder, odd, "a tokenizer of this kind is not converted")
        return {}
    with library_errors(f"{folder.where(kind)}: transformers cannot convert this tokenizer", UnsupportedError):
        if kind == "tiktoken.model":
            backend = _tiktoken(folder, files, settings)
        elif kind == "tekken.json":
            backend = _tekken(folder, kind)
            for name, token in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")):
                if backend.token_to_id(token) is not None:
                    settings.setdefault(name, token)
        else:
            backend = _by_class(folder, kind, files, settings)
        return {READY: backend.to_str().encode(), SETTINGS: _written(settings)}


def _refusal(folder: SourceFolder, file: str, why: str) -> UnsupportedError:
    return UnsupportedError(f"{folder.where(file)}: {why}; put the model's tokenizer.json beside it")


def _settings(folder: SourceFolder, files: list[str]) -> dict[str, Any]:
    if SETTINGS not in files:
        return {}
    with source_errors(folder.where(SETTINGS)):
        data = parse_json(folder.read(SETTINGS), folder.where(SETTINGS))
    if not isinstance(data, dict):
        raise SourceError(f"{folder.where(SETTINGS)}: not a JSON object")
    return data


def _written(settings: dict[str, Any]) -> bytes:
    """The settings without references to code, for the class that takes tokenizer.json as it is."""
    kept = {k: v for k, v in settings.items() if k != "auto_map"} | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return (json.dumps(kept, indent=2, sort_keys=True) + "\n").encode()


def _tiktoken(folder: SourceFolder, files: list[str], settings: dict[str, Any]) -> Any:
    """Kimi's kind: ranks, special tokens by number in the settings, the splitting pattern in Python."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    where = folder.where("tiktoken.model")
    ranks = _ranks(folder.read("tiktoken.model"), where)
    numbered = settings.get("added_tokens_decoder")
    if not isinstance(numbered, dict) or not numbered:
        raise _refusal(folder, "tiktoken.model", f"{SETTINGS} does not list its special tokens (added_tokens_decoder)")
    added = {int(number): token["content"] for number, token in numbered.items()}
    base = len(ranks)
    if sorted(ranks.values()) != list(range(base)) or max(added) > base + 2**16:
        raise SourceError(f"{where}: tokens are not numbered from 0 to {base - 1} and on")
    # Numbers that have no name are given the names that Kimi's own code gives them.
    extra = [added.get(number, f"<|reserved_token_{number}|>") for number in range(base, max(added) + 1)]

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    converter = Converter(where, _pattern(folder, files), extra_special_tokens=extra)  # type: ignore[no-untyped-call]
    return converter.converted()


def _ranks(data: bytes, where: str) -> dict[bytes, int]:
    """Token -> number, from lines of base64 and a number."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as e:
            raise SourceError(f"{where}: line {number} is not a token and its number") from e
    return ranks


def _pattern(folder: SourceFolder, files: list[str]) -> str:
    """The regular expression that texts are split by: the literal that the checkpoint's own code gives ``pat_str``."""
    found = set()
    for file in files:
        if file.startswith("tokenization") and file.endswith(".py"):
            try:
                tree = ast.parse(folder.read(file))
            except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
                raise _refusal(folder, file, "not Python; the pattern that texts are split by stands in it") from e
            for node in ast.walk(tree):
                if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names = [getattr(t, "id", getattr(t, "attr", "")) for t in targets]
                    if _PATTERN in (name.lower() for name in names):
                        found.add(_literal(node.value))
    patterns = found - {None}
    if len(patterns) != 1:
        raise _refusal(
            folder,
            "tiktoken.model",
            f"its code (tokenization_*.py, never executed) has {len(patterns) or 'no'} {_PATTERN} "
            f"{'literals' if patterns else 'literal'} to split texts by",
        )
    return str(patterns.pop())


def _literal(node: ast.expr) -> str | None:
    """The text of a literal, or of ``"separator".join([literals])``."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str(separator)), attr="join"),
            args=[ast.List(elts=items) | ast.Tuple(elts=items)],
            keywords=[],
        ):
            texts = [_literal(item) for item in items]
            return separator.join(t for t in texts if t is not None) if None not in texts else None
    return None


def _tekken(folder: SourceFolder, file: str) -> Any:
    from transformers.integrations.mistral.tokenizer import MistralConverter

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / file
        path.write_bytes(folder.read(file))
        return MistralConverter(str(path)).converted()


def _by_class(folder: SourceFolder, kind: str, files: list[str], settings: dict[str, Any]) -> Any:
    """The tokenizer that transformers' own class makes of a vocabulary."""
    import transformers
    from tokenizers.normalizers import Prepend, Replace, Sequence

    if kind == "merges.txt" and "vocab.json" not in files:
        raise _refusal(folder, kind, "vocab.json is missing")
    classes = _CLASSES[kind]
    named = str(settings.get("tokenizer_class", classes[0])).removesuffix("Fast")
    if named not in classes:
        raise _refusal(folder, kind, f"a {named[:60]!r} is not converted from it")
    if kind == "tokenizer.model" and not all(map(_installed, ("sentencepiece", "google.protobuf"))):
        raise UnsupportedError(
            f"{folder.where(kind)}: reading it needs two packages: pip install sentencepiece protobuf; "
            f"or put the model's tokenizer.json beside it"
        )
    with tempfile.TemporaryDirectory() as temporary:
        for name in (kind, "vocab.json", "added_tokens.json", "special_tokens_map.json"):
            if name in files:
                (Path(temporary) / name).write_bytes(folder.read(name))
        (Path(temporary) / SETTINGS).write_bytes(_written(settings))
        tokenizer: Any = getattr(transformers, named).from_pretrained(temporary, local_files_only=True)
    if kind == "tokenizer.model":
        legacy = settings.get("legacy") is not False and settings.get("add_prefix_space") is not False
        if legacy and named != "GemmaTokenizer":
            # As in the published tokenizer.json files; the class adds no space where a text begins with one.
            backend: Any = tokenizer.backend_tokenizer
            backend.normalizer = Sequence([Prepend("\u2581"), Replace(" ", "\u2581")])
            backend.pre_tokenizer = None
        _compare(folder, kind, tokenizer, legacy)
    return tokenizer.backend_tokenizer


def _compare(folder: SourceFolder, file: str, tokenizer: Any, legacy: bool) -> None:
    """sentencepiece's own result decides: a model may have rules for spaces or characters that the class leaves out.

    Where a text begins with a space, models that are not ``legacy`` differ from it by intent.
    """
    sentencepiece: Any = importlib.import_module("sentencepiece")
    original = sentencepiece.SentencePieceProcessor(model_proto=folder.read(file))
    for text in _PROBES:
        text = text if legacy else text.lstrip()
        if tokenizer(text, add_special_tokens=False)["input_ids"] != original.encode(text):
            raise _refusal(folder, file, f"transformers splits {text!r} in another way than sentencepiece does")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
