"""How checkpoints store weights: one module per format, each turning stored arrays into the model's tensors.

What a tensor is stored in is decided tensor by tensor, from the names of its parts; the configuration gives
parameters only, and is compared with the shapes.
"""

from __future__ import annotations

from typing import Any

from flashpack.converter.source import Checkpoint
from flashpack.converter.tensor import SourceTensor, plain_tensor
from flashpack.converter.weights.mlx import is_mlx, read_mlx
from flashpack.errors import UnsupportedError


def read_tensors(checkpoint: Checkpoint) -> tuple[dict[str, SourceTensor], str]:
    """The model's tensors by name, and the name of the weight format ("plain": not quantized)."""
    if is_mlx(checkpoint):
        return read_mlx(checkpoint), "mlx-affine"
    for config in (checkpoint.config, checkpoint.config.get("text_config") or {}):
        quantization: Any = config.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            raise UnsupportedError(f"{checkpoint.folder.name}: weights quantized with {method!r} are not supported yet")
    return {name: plain_tensor(name, extent) for name, extent in checkpoint.stored.items()}, "plain"
