"""Recognizing activation functions by what they compute, never by a model's name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from flashpack.kernels.interface import Activation

TOLERANCE = 2e-6
"""Largest difference of a function from the formula it is taken for, of values or, above 1, relative to them."""


def _swiglu_oai(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def named(name: str, gated: bool, limit: float = 0.0) -> Activation:
    """The one of ``ACTIVATIONS`` that is called so."""
    if not gated:
        return Activation(_FORMULAS[name], name)

    def function(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return _swiglu_oai(gate, up, limit) if name == "swiglu_oai" else _FORMULAS[name](gate) * up

    return Activation(function, name, limit)


def recognize(function: Callable[[Tensor], Tensor], gated: bool, limit: float | None = None) -> Activation:
    """``function`` as an ``Activation``, with a name if it computes one of ``ACTIVATIONS``.

    ``limit``: where the module says that it clamps.
    """
    # Within and beyond any limit; up is not a function of the gate.
    gate = torch.cat([torch.linspace(-12, 12, 193), torch.tensor([-1e3, -100, -30, 30, 100, 1e3])])
    up = torch.linspace(-9, 11, len(gate))[torch.arange(len(gate)) * 71 % len(gate)]
    x = (torch.cat([gate, up]) if gated else gate).unsqueeze(0)
    with torch.no_grad():
        found = function(x)
        for name, formula in _FORMULAS.items():
            if _same(found, formula(gate) * (up if gated else 1)):
                return Activation(function, name)
        if gated and limit is not None and _same(found, _swiglu_oai(gate, up, limit)):
            return Activation(function, "swiglu_oai", float(limit))
    return Activation(function)


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.numel() != expected.numel():
        return False
    return bool(((found.reshape(-1) - expected).abs() <= TOLERANCE * expected.abs().clamp(min=1)).all())
