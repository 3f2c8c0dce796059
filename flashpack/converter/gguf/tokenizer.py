"""The tokenizer, chat template and generation settings that a GGUF file has in its metadata, as files of a checkpoint.

transformers builds the tokenizer (``integrations.gguf``); its files are written as it would save them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashpack.errors import UnsupportedError
from flashpack.skeleton import library_errors

_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_PREFIX = "tokenizer.ggml."


def tokenizer_files(where: str, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> content: tokenizer.json and its configuration, generation_config.json, chat templates.

    Empty without a vocabulary. Raises ``UnsupportedError`` for a kind of tokenizer that transformers cannot build.
    """
    if not metadata.get(f"{_PREFIX}tokens") or metadata.get(f"{_PREFIX}model") in (None, "none", "no_vocab"):
        return {}
    with library_errors(f"{where}: transformers cannot build its tokenizer", UnsupportedError):
        files = _files(metadata)
    ids = {
        f"{key}_token_id": metadata[f"{_PREFIX}{name}_token_id"]
        for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"{_PREFIX}{name}_token_id" in metadata
    }
    # A turn of a chat may end with a token of its own.
    turn = metadata.get(f"{_PREFIX}eot_token_id")
    if isinstance(turn, int) and isinstance(ids.get("eos_token_id"), int) and turn != ids["eos_token_id"]:
        ids["eos_token_id"] = [ids["eos_token_id"], turn]
    files["generation_config.json"] = (json.dumps(ids, indent=2, sort_keys=True) + "\n").encode()
    return files


def _files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    parts, settings = (
        {new: metadata[f"tokenizer.{old}"] for old, new in names.items() if f"tokenizer.{old}" in metadata}
        for names in (GGUF_TOKENIZER_MAPPING["tokenizer"], GGUF_TOKENIZER_MAPPING["tokenizer_config"])
    )
    backend: Any
    backend, more = convert_gguf_tokenizer(metadata["general.architecture"], parts)
    settings |= more
    if parts["tokenizer_type"] == "llama":
        # Older files do not say; llama.cpp begins texts of such vocabularies with it.
        settings.setdefault("add_bos_token", True)
    for name, key in _SPECIAL.items():
        if (index := metadata.get(f"{_PREFIX}{key}")) is not None:
            settings[name] = parts["tokens"][index]
    build: Any = PreTrainedTokenizerFast
    tokenizer = build(tokenizer_object=backend, **settings)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
