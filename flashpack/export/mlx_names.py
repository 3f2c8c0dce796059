"""What mlx-lm calls the parts of a model, and what it wants to read in config.json, for the families it was tried with.

The names are those of mlx-lm's module tree (``mlx_lm/models/*.py``, version 0.32), after its ``sanitize``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flashpack.errors import UnsupportedError
from flashpack.export.content import Content
from flashpack.formats.header import parse_json

_TEXT = "text_config"
_NOT_CARRIED = ("quantization", "quantization_config", "vision_config", "audio_config", "auto_map")
"""How the source was quantized is not how this is; mlx-lm leaves out towers, and their configuration, too."""

_CALLED_OTHERWISE = ("architectures", "dtype", "model_type", "rope_parameters", "transformers_version")
"""What transformers fills in, but mlx-lm has under other names or does not want."""


@dataclass(frozen=True)
class Family:
    """How mlx-lm's names differ from transformers', which are the pack's.

    ``prefix`` stands before all names; ``renamed`` replaces one part of a name by another; ``experts`` is the module
    with the stacked experts. ``shifted``: mlx-lm computes ``x * w`` where transformers has ``x * (1 + w)``, and stores
    norm weights with 1 added. ``model_type``, if not the pack's; its configuration of the text lies in ``text_config``.
    ``config``: what mlx-lm asks for in the configuration, and transformers' has not. ``split``: a matrix that mlx-lm
    makes two modules of when it loads; it quantizes them then, if the matrix was quantized.
    """

    prefix: str = ""
    renamed: tuple[str, str] = ("", "")
    experts: str = "switch_mlp"
    shifted: bool = False
    model_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    split: tuple[str, tuple[str, str]] = ("", ("", ""))

    def name(self, name: str) -> str:
        """The name of a dense tensor, or of its part."""
        before, after = self.renamed
        return self.prefix + (name.replace(before, after) if before else name)

    def experts_module(self, module: str) -> str:
        """The stacked experts of the module ``module`` (``model.layers.0.mlp.experts``)."""
        return self.name(f"{module.rpartition('.')[0]}.{self.experts}")


_QWEN3_5 = Family("language_model.", shifted=True, model_type="qwen3_5_moe")
_SPARSE = (".mlp.", ".block_sparse_moe.")

FAMILIES = {
    "deepseek_v3": Family(split=(".kv_b_proj", (".embed_q", ".unembed_out"))),
    "glm4_moe": Family(),
    "gpt_oss": Family(experts="experts"),
    "granitemoe": Family(renamed=(".router.", ".router.layer.")),
    "minimax_m2": Family(renamed=_SPARSE, config={"shared_intermediate_size": 0}),
    "mixtral": Family(renamed=_SPARSE),
    "olmoe": Family(),
    "qwen2_moe": Family(),
    "qwen3_5_moe": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5,
    "qwen3_moe": Family(),
    "qwen3_next": Family(shifted=True),
}
"""By the manifest's ``model_type``."""

SHIFTED_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)
"""Ends of the names of weights that mlx-lm stores with 1 added: those of its ``sanitize``."""


def family_of(content: Content) -> Family:
    """The family of a pack. Raises ``UnsupportedError`` for one whose names are not known here, ``FormatError`` for a
    pack whose parts do not belong together."""
    kind = content.pack.manifest.model["model_type"]
    if kind not in FAMILIES or not all(site.name.startswith("model.layers.") for site in content.sites.values()):
        raise UnsupportedError(
            f"{content.pack.folder}: no MLX names are known for model_type {kind!r}, only for "
            f"{', '.join(FAMILIES)}; use --to hf, and mlx_lm.convert if mlx-lm has it"
        )
    return FAMILIES[kind]


def source_config(content: Content) -> dict[str, Any]:
    """The pack's config.json."""
    config = parse_json(content.copy("config.json"), str(content.pack.folder / "config.json"))
    assert isinstance(config, dict)  # content.config has read it
    return config


def mlx_config(content: Content, family: Family, quantization: dict[str, Any]) -> dict[str, Any]:
    """config.json for mlx-lm.

    What the source's leaves to transformers' defaults is written out: mlx-lm has others, or none. ``quantization`` is
    also under the name that the Hugging Face hub looks for, as mlx-lm does it.
    """
    config = {key: value for key, value in source_config(content).items() if key not in _NOT_CARRIED}
    text = config.get(_TEXT) or config
    text = {key: value for key, value in text.items() if key not in _NOT_CARRIED}
    for key, value in content.config.to_dict().items():
        if value is not None and key not in _CALLED_OTHERWISE and not key.startswith("_"):
            text.setdefault(key, value)
    for key, value in (_rope(content) | family.config).items():
        text.setdefault(key, value)
    if "linear_attention" in (text.get("layer_types") or ()):
        text["full_attention_interval"] = full_attention_interval(content, text["layer_types"])
    if family.model_type:
        if _TEXT not in config:
            config = {key: config[key] for key in ("architectures", "dtype") if key in config}
        config |= {"model_type": family.model_type, _TEXT: text, "tie_word_embeddings": text["tie_word_embeddings"]}
    else:
        config = text
    return config | ({"quantization": quantization, "quantization_config": quantization} if quantization else {})


def _rope(content: Content) -> dict[str, Any]:
    """Positions as mlx-lm reads them: transformers 5 has all of it in ``rope_parameters``, earlier versions had not."""
    rope = content.config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    found: dict[str, Any] = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
    found["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    return found


def full_attention_interval(content: Content, kinds: list[str]) -> int:
    """Every which layer has full attention; mlx-lm and Flash-MoE read no list. Raises ``UnsupportedError``."""
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    if kinds != ["linear_attention" if n % every else "full_attention" for n in range(1, len(kinds) + 1)]:
        raise UnsupportedError(f"{content.pack.folder}: layers with full attention are at no regular distances")
    return every
