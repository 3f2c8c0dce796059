"""``kernels.interface.Steps`` on Metal: steps launch kernels with their arguments bound."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashpack.kernels.interface import MODES, MOST_WIDTH, AttentionShape, DeltaShape, Step, TokenStep
from flashpack.kernels.metal.kernels import MetalKernels
from flashpack.kernels.metal.product_steps import ProductSteps

KERNELS = ("add_norm", "attend_1", "attend_2", "attend_4", "attend_8", "attend_merge", "delta", "route")
"""Those without which there are no steps."""

MOST_EXPERTS = 4096
"""That a router can choose from."""

_BLOCK, _ATTEND_THREADS, _MERGE_THREADS = 64, 256, 512  # as in attention.metal
_DELTA_THREADS = MOST_WIDTH
_LANES, _MOST_THREADS = 32, 1024  # of a SIMD group, of a threadgroup


class _AttentionStep:
    """``attend`` over the blocks of the context, then ``attend_merge``."""

    def __init__(
        self, steps: MetalSteps, shape: AttentionShape, query: Tensor, key: Tensor, value: Tensor, out: Tensor
    ) -> None:
        self._steps, self._shape = steps, shape
        self._arrays = query, key, value, steps.bound(shape.query_norm), steps.bound(shape.key_norm)
        self._query, self._out = query, out
        shared = shape.heads // shape.kv_heads
        most = 8 if shape.width <= _ATTEND_THREADS else 4  # heads whose queries a threadgroup has room for
        at_once = next((n for n in (1, 2, 4, most) if shared <= n), most)
        self._groups = shape.kv_heads * -(-shared // at_once)
        self._attend = getattr(steps.library, f"attend_{at_once}")
        self._merge = steps.library.attend_merge
        self._capacity = 0

    def given(self, keys: Tensor, values: Tensor, position: int, cosine: Tensor, sine: Tensor) -> None:
        shape, capacity = self._shape, keys.shape[1]
        if not 0 <= position < capacity:
            raise ValueError(f"no room for a token at {position} in a cache of {capacity}")
        _check_aligned(keys, values)
        if capacity != self._capacity:
            self._capacity = capacity
            norms = shape.query_norm is not None, shape.key_norm is not None
            self._numbers = self._steps.kernels.tables.constant(
                capacity, shape.heads, shape.kv_heads, shape.width, shape.rotary, shape.query_stride, shape.gate,
                *norms, float(shape.epsilon), float(shape.scale),
            )  # fmt: skip
        self._token = cosine, sine, keys, values
        self._position = position

    def __call__(self) -> None:
        shape, steps = self._shape, self._steps
        blocks = self._position // _BLOCK + 1
        position = steps.position(self._position, self._capacity)
        shares = steps.room(shape.heads * blocks * (shape.width + 2))
        self._attend(
            self._numbers, position, *self._arrays, *self._token, shares,
            threads=(blocks * _ATTEND_THREADS, self._groups), group_size=(_ATTEND_THREADS, 1),
        )  # fmt: skip
        self._merge(
            self._numbers, position, shares, self._query, self._out,
            threads=shape.heads * _MERGE_THREADS, group_size=_MERGE_THREADS,
        )  # fmt: skip


class _DeltaStep:
    """``delta``, a threadgroup for each key head."""

    def __init__(self, launch: Any, before: Sequence[Tensor], out: Tensor, key_heads: int) -> None:
        self._launch, self._before, self._out, self._threads = launch, before, out, key_heads * _DELTA_THREADS

    def given(self, window: Tensor, state: Tensor) -> None:
        _check_aligned(window, state)
        self._token = window, state

    def __call__(self) -> None:
        self._launch(*self._before, *self._token, self._out, threads=self._threads, group_size=_DELTA_THREADS)


class MetalSteps(ProductSteps):
    """Makes steps that launch kernels. Nothing that a launch reads is written by the host, except by ``write`` after
    ``read``, so launches may be as far behind as they like.

    ``synchronisations``: how often the host has waited.
    """

    def __init__(self, kernels: MetalKernels) -> None:
        super().__init__(kernels)
        self.library = kernels.library("steps")
        self.synchronisations = 0
        self._positions = torch.arange(1, dtype=torch.int32, device=self.device)
        self._room = torch.empty(0, device=self.device)

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor | None, epsilon: float, out: Tensor) -> Step:
        width = x.numel()
        numbers = self.kernels.tables.constant(width, y is not None, weight is not None, epsilon)
        threads = min(-(-width // _LANES) * _LANES, _MOST_THREADS)
        arguments = numbers, x, self.bound(y), self.bound(weight), out
        return partial(self.library.add_norm, *arguments, threads=threads, group_size=threads)

    def attention(self, shape: AttentionShape, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> TokenStep:
        s = shape
        if not _is_width(s.width) or s.rotary % 2 or s.rotary > s.width or s.kv_heads < 1 or s.heads % s.kv_heads:
            raise ValueError(f"no kernel for {s.heads} heads of {s.width} for {s.kv_heads}, {s.rotary} values turned")
        return _AttentionStep(self, shape, query, key, value, out)

    def delta(self, shape: DeltaShape, inputs: Sequence[Tensor], out: Tensor) -> TokenStep:
        s = shape
        widths = _is_width(s.key_width) and _is_width(s.value_width)
        if not widths or s.taps < 1 or s.key_heads < 1 or s.value_heads < 1 or s.value_heads % s.key_heads:
            sizes = f"{s.value_heads} heads of {s.value_width} for {s.key_heads} of {s.key_width}"
            raise ValueError(f"no kernel for {sizes}, {s.taps} taps")
        numbers = self.kernels.tables.constant(
            s.key_heads, s.value_heads, s.key_width, s.value_width, s.taps, s.key_stride, s.value_stride,
            s.number_stride, s.filter_bias is not None, float(s.epsilon),
        )  # fmt: skip
        weights = s.filter, self.bound(s.filter_bias), s.rate, s.rate_bias, s.norm
        return _DeltaStep(self.library.delta, (numbers, *inputs, *weights), out, s.key_heads)

    def route(
        self, logits: Tensor, bias: Tensor | None, top_k: int, mode: str, divide: bool, factor: float, chosen: Tensor,
        weights: Tensor,
    ) -> Step:  # fmt: skip
        experts = logits.numel()
        if not 1 <= top_k <= experts <= MOST_EXPERTS:
            raise ValueError(f"no kernel chooses {top_k} of {experts} experts")
        numbers = self.kernels.tables.constant(experts, top_k, MODES.index(mode), divide, bias is not None, factor)
        arguments = numbers, logits, self.bound(bias), chosen, weights
        return partial(self.library.route, *arguments, threads=_LANES, group_size=_LANES)

    def read(self, array: Tensor) -> list[int]:
        """``FloatingPointError`` where a router could not choose: ``route`` says so with -1."""
        self.synchronisations += 1
        self.kernels.wait()
        host = self.kernels.gpu.host(array)
        numbers: list[int] = (array if host is None else host).tolist()
        if numbers and min(numbers) < 0:
            raise FloatingPointError("a router's logits are not numbers")
        return numbers

    def write(self, array: Tensor, numbers: Sequence[int]) -> None:
        host = self.kernels.gpu.host(array)
        if host is None:
            array[: len(numbers)].copy_(torch.tensor(numbers, dtype=torch.int32))
        else:
            host.numpy()[: len(numbers)] = numbers

    def bound(self, array: Tensor | None) -> Tensor:
        """An array, or what is bound where there is none: the numbers tell kernels not to read it."""
        return self.kernels.nothing if array is None else array

    def position(self, position: int, capacity: int) -> Tensor:
        """A token's position as a number on the device: a place in a table that never changes, so that no launch can
        find the position of a token after its own."""
        if capacity > len(self._positions):
            self._positions = torch.arange(capacity, dtype=torch.int32, device=self.device)
        return self._positions[position : position + 1]

    def room(self, size: int) -> Tensor:
        """float32 [size or more] for what one kernel leaves to the next: shared, as launches run in order."""
        if size > len(self._room):
            self._room = torch.empty(2 * size, device=self.device)
        return self._room


def _is_width(width: int) -> bool:
    return width % 8 == 0 and 8 <= width <= MOST_WIDTH


def _check_aligned(*arrays: Tensor) -> None:
    """Kernels read four numbers at once, and know nothing of strides."""
    for array in arrays:
        if array.dtype != torch.float32 or not array.is_contiguous() or array.storage_offset() % 4:
            raise ValueError(f"{array.dtype} {tuple(array.shape)}: not float32, in order and aligned to 16 bytes")
