"""The config.json of an export: the pack's own bytes where they describe what is exported, else with few changes."""

from __future__ import annotations

import json
from typing import Any

from flashpack.export.content import Content
from flashpack.formats.header import parse_json

_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_QUANTIZED = ("quantization_config", "quantization", "compression_config")
_ELSEWHERE = "auto_map"
"""Where code is that a checkpoint brings along; no export has any."""


def float_type(content: Content) -> str:
    """The type for decoded values: the one that config.json names, else bfloat16."""
    return _TYPES.get(str(_dtype_name(_json(content))), "BF16")


def model_config(content: Content, quantization: dict[str, Any] | None) -> tuple[bytes, list[str]]:
    """config.json of the language model, which says that weights are stored as ``quantization``, and the losses."""
    from transformers import CONFIG_MAPPING

    from flashpack.adapters import without_weights

    raw, config, losses = _json(content), content.config, content.left_out()
    if none := without_weights(content.model):
        losses.append(
            f"experts {none[0]} to {none[-1]} have no weights, and as in published checkpoints none are written; "
            f"transformers 5.23 asks for them all the same, and does not load this"
        )
    architecture = type(content.model).__name__
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING or type(config) is not CONFIG_MAPPING[kind]:
        # Another class than the checkpoint's: its text model alone.
        config.architectures = [architecture]
        config.dtype = {code: name for name, code in _TYPES.items()}[float_type(content)]
        data: dict[str, Any] = json.loads(config.to_json_string())
    else:
        data = {k: v for k, v in raw.items() if k not in _QUANTIZED and k != _ELSEWHERE}
        if architecture not in (data.get("architectures") or []):
            data["architectures"] = [architecture]
    if quantization is not None:
        data["quantization_config"] = quantization
    if data == raw:
        return content.copy("config.json"), losses
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode(), losses


def _json(content: Content) -> dict[str, Any]:
    data = parse_json(content.copy("config.json"), "config.json")
    return data if isinstance(data, dict) else {}


def _dtype_name(data: dict[str, Any]) -> Any:
    text = next((v for k, v in data.items() if k in ("text_config", "llm_config") and isinstance(v, dict)), {})
    return next((d[k] for d in (data, text) for k in ("dtype", "torch_dtype") if d.get(k)), None)
