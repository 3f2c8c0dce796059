"""What all parts of a layer share: the arrays, the token, and how a part is recognized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from flashpack.kernels.interface import Step, Steps
from flashpack.runtime.dense import PackedLinear

PROBES = 8
"""Random inputs that a part must answer like the steps that replace it."""


class NotLean(Exception):
    """A part is not of a kind that has steps: the message says which. The library's own module is used."""


@contextlib.contextmanager
def library_calls(what: str) -> Iterator[None]:
    """A module that cannot be called in the usual way is not of a known kind."""
    try:
        yield
    except NotLean:
        raise
    except Exception as e:
        raise NotLean(f"{what}: {type(e).__name__}: {e}") from e


@dataclass
class Token:
    """The token that is being decoded. ``plain``: what the library's layers are called with."""

    ids: Tensor
    position: int
    cosine: Tensor
    sine: Tensor
    cache: Any
    plain: dict[str, Any]


class Board:
    """The arrays that steps read and write: ``x`` the residual stream, ``y`` what is to be added to it.

    ``rotary``: values of a head that positions turn.
    """

    def __init__(self, steps: Steps, hidden: int, rotary: int) -> None:
        self.steps, self.rotary = steps, rotary
        self.x, self.normed, self.y = (torch.zeros(hidden, device=steps.device) for _ in range(3))
        self._shared: dict[tuple[str, int], Tensor] = {}

    def array(self, name: str, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An array that layers of equal sizes share."""
        return self._shared.setdefault((name, size), torch.zeros(size, dtype=dtype, device=self.steps.device))


def norm_of(module: nn.Module, width: int, gate: Tensor | None = None) -> tuple[Tensor, float]:
    """Weight [width] and epsilon of an RMS norm, whether it multiplies by its weight or by one more than it.

    ``gate`` [PROBES, width]: if given, the norm's second argument, whose silu multiplies its result.
    """
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.shape != (width,) or not isinstance(epsilon, float) or width % 8:
        raise NotLean(f"{type(module).__name__} is no RMS norm of {width}")
    probe = torch.randn(PROBES, width, generator=torch.Generator().manual_seed(0)).to(weight.device)
    normed = probe * torch.rsqrt(probe.square().mean(-1, keepdim=True) + epsilon)
    factor = 1 if gate is None else silu(gate)
    found = module(probe) if gate is None else module(probe, gate)
    for candidate in (weight.float(), weight.float() + 1):
        if torch.allclose(found, normed * candidate * factor, rtol=1e-5, atol=1e-6):
            return candidate.clone(), epsilon
    raise NotLean(f"{type(module).__name__} is no RMS norm")


def refuse_limits(place: object, what: str) -> None:
    """Raise ``NotLean`` for what shows only in long contexts or at large values: a comparison of few tokens misses it.

    ``place``: a module or a configuration; 0 and None are no limit.
    """
    names = ("sliding_window", "attention_chunk_size", "sinks", "attn_logit_softcapping", "final_logit_softcapping")
    for name in names:
        value = getattr(place, name, None)
        if isinstance(value, Tensor) or value:
            raise NotLean(f"{what} has {name}")


def products(board: Board, x: Tensor, parts: Sequence[PackedLinear], out: Sequence[Tensor]) -> Step:
    """x times each of ``parts``, with its bias, written to ``out``; ``NotLean`` if a matrix is of another kind."""
    for part, result in zip(parts, out, strict=True):
        if (part.out_features, part.in_features) != (len(result), len(x)):
            raise NotLean(f"a matrix [{part.out_features}, {part.in_features}] is not [{len(result)}, {len(x)}]")
    step = board.steps.products(x, [p.matrix for p in parts], [p.bias for p in parts], out)
    if step is None:
        raise NotLean("a matrix is stored in a way the kernels do not know")
    return step
