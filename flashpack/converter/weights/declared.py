"""What a checkpoint's configuration says about its quantization: parameters, and formats that are refused by name."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from flashpack.converter.folder import source_errors
from flashpack.converter.source import Checkpoint
from flashpack.errors import SourceError, UnsupportedError
from flashpack.formats.header import parse_json

MODELOPT_FILE = "hf_quant_config.json"
"""ModelOpt describes its formats here too; older checkpoints only here."""

_METHODS = (
    "auto-round",
    "intel/auto-round",
    "awq",
    "compressed-tensors",
    "fbgemm_fp8",
    "fp8",
    "gptq",
    "modelopt",
    "mxfp4",
)
_CT_FORMATS = (
    "dense", "float-quantized", "int-quantized", "mixed-precision", "mxfp4-pack-quantized", "mxfp8-quantized",
    "naive-quantized", "nvfp4-pack-quantized", "pack-quantized",
)  # fmt: skip
_MODELOPT_ALGORITHMS = ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION", "NVFP4")


@dataclass(frozen=True)
class Declared:
    """``method``: the quantization method, "" for none; ``config``: its parameters."""

    method: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Declared:
        """From config.json, its text model's part, or ModelOpt's file. Refuses other methods."""
        where = checkpoint.folder.name
        for config in (checkpoint.config, checkpoint.config.get("text_config")):
            for key in ("quantization_config", "compression_config"):
                if isinstance(config, dict) and config.get(key):
                    return cls._checked(config[key], where)
        if MODELOPT_FILE in checkpoint.folder.files():
            path = checkpoint.folder.where(MODELOPT_FILE)
            with source_errors(path):
                data = parse_json(checkpoint.folder.read(MODELOPT_FILE), path)
            nested = data.get("quantization") if isinstance(data, dict) else None
            return cls._checked({"quant_method": "modelopt"} | (nested if isinstance(nested, dict) else {}), where)
        return cls()

    @classmethod
    def _checked(cls, config: Any, where: str) -> Declared:
        method = config.get("quant_method", "compressed-tensors") if isinstance(config, dict) else config
        if not isinstance(config, dict) or method not in _METHODS:
            raise UnsupportedError(
                f"{where}: weights quantized with {method!r} are not supported; supported: {', '.join(_METHODS)}"
            )
        if method.endswith("auto-round"):
            packing = config.get("packing_format", config.get("backend"))
            words = re.split("[:_]", packing) if isinstance(packing, str) else []
            method = next((m for m in ("gptq", "awq") if m in words), "")
            if not method:
                raise UnsupportedError(
                    f"{where}: auto-round's packing_format {packing!r} is not supported; those of gptq and awq are"
                )
            # What these keys say in GPTQ and AWQ configurations, auto-round says with packing_format.
            config = {k: v for k, v in config.items() if k not in ("version", "format", "checkpoint_format", "backend")}
        if method == "compressed-tensors":
            _check_compressed(config, where)
        if method == "modelopt":
            nested = config.get("quantization")
            config = nested if isinstance(nested, dict) else config
            algorithm = config.get("quant_algo")
            if algorithm not in _MODELOPT_ALGORITHMS:
                raise UnsupportedError(
                    f"{where}: ModelOpt's quant_algo {algorithm!r} is not supported; supported: "
                    f"{', '.join(_MODELOPT_ALGORITHMS)}"
                )
        return cls(method, config)

    def integer(self, key: str, of: str) -> int:
        """A parameter that the weights cannot be read without; ``of`` is the tensor, for the error."""
        value = self.config.get(key)
        if type(value) is not int:
            raise SourceError(f"tensor {of}: config.json's quantization gives no {key}; found {value!r}")
        return value

    def block(self) -> tuple[int, int] | None:
        """Rows and columns of the blocks that share an fp8 scale, where they are said."""
        value = self.config.get("weight_block_size")
        groups = self.config.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            value = value or (weights.get("block_structure") if isinstance(weights, dict) else None)
        if not value:
            return None
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,5}x[0-9]{1,5}", value):
            value = [int(n) for n in value.split("x")]
        if not (isinstance(value, (list, tuple)) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)):
            raise SourceError(f"config.json: weight_block_size {value!r} is no pair of sizes")
        return value[0], value[1]

    def weights(self, module: str) -> dict[str, Any]:
        """The ``weights`` arguments of the compressed-tensors group that ``module`` is of; a name or a regular
        expression before a class of modules, as there."""
        groups = self.config.get("config_groups")
        found = [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
        for by_name in (True, False):
            for group in found:
                if any(_matches(target, module, by_name) for target in group.get("targets") or ()):
                    arguments = group.get("weights")
                    return arguments if isinstance(arguments, dict) else {}
        raise SourceError(f"tensor {module}: quantized, but of no group in config.json's config_groups")


def _matches(target: Any, module: str, by_name: bool) -> bool:
    if not isinstance(target, str):
        return False
    if target.startswith("re:"):
        try:
            return by_name and re.match(target[3:], module) is not None
        except re.error as e:
            raise SourceError(f"config.json: {target!r} in config_groups is no regular expression: {e}") from e
    is_class = "." not in target and target[:1].isupper()
    return not is_class and (module == target or module.endswith("." + target)) if by_name else is_class


def _check_compressed(config: dict[str, Any], where: str) -> None:
    groups = config.get("config_groups")
    formats = [g.get("format") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, dict):
        formats.append(sparsity.get("format"))
    for name in (config.get("format"), *formats):
        if name not in (None, *_CT_FORMATS):
            raise UnsupportedError(f"{where}: compressed-tensors format {name!r} is not supported; decompress it first")
    transforms = config.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        raise UnsupportedError(f"{where}: compressed-tensors transforms (rotated weights) are not supported")
