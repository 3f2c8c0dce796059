"""An expert of the trained model, and inputs such as experts get, to quantize."""

from __future__ import annotations

import json

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from tests.conftest import TRAINED

HIDDEN, WIDTH = 256, 64


def matrices(layer: int = 3, expert: int = 5) -> dict[str, NDArray[np.float32]]:
    """gate and up [64, 256] and down [256, 64]."""
    places = json.loads((TRAINED / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for projection in ("gate", "up", "down"):
        name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        with safe_open(TRAINED / places[name], "pt") as file:
            found[projection] = file.get_tensor(name).float().numpy()
    return found


def inputs(count: int, seed: int = 0) -> Tensor:
    """float32 [count, 256] that lie near some directions, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(0))
    few = torch.randn(count, 64, generator=generator) @ mixing
    return (few + torch.randn(count, HIDDEN, generator=generator)) / 8
