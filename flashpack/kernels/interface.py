"""What a device must be able to do. The runtime knows nothing else about kernels.

Arrays are torch tensors on the device. Block layouts are those of ``flashpack.formats``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from flashpack.formats.records import RecordKind

Activation = Callable[["torch.Tensor"], "torch.Tensor"]
"""[tokens, 2I] (gate rows first) -> [tokens, I] for gated experts; [tokens, I] -> [tokens, I] without a gate."""


@dataclass(frozen=True, slots=True)
class AffineMatrix:
    """A group-affine matrix [out, in]: ``words`` int32 [out, in*bits/32] (the bits of uint32), ``scales`` and
    ``biases`` [out, in/group_size] in bfloat16, float16 or float32."""

    words: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.words.shape[0], self.words.shape[1] * 32 // self.bits


@dataclass(frozen=True, slots=True)
class RecordView:
    """An expert's record where it lies in memory, ready for kernels.

    ``first`` are the matrices before the activation, in row order: gate and up as one where they lie side by side,
    else gate and up, or up alone.
    """

    first: tuple[torch.Tensor | AffineMatrix, ...]
    down: torch.Tensor | AffineMatrix


class Kernels(Protocol):
    """One device's kernels. Activations are float32, float16 or bfloat16; results have their type."""

    name: str

    def view_record(self, record: torch.Tensor, kind: RecordKind) -> RecordView:
        """See the bytes of a record (uint8 [stride]) as matrices, without copying."""
        ...

    def expert(self, x: torch.Tensor, record: RecordView, activation: Activation) -> torch.Tensor:
        """One expert's feed-forward network: x [tokens, hidden] -> [tokens, hidden].

        A row of the result does not depend on how many threads computed it.
        """
        ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor | AffineMatrix) -> torch.Tensor:
        """x [..., in] times the transpose of ``weight`` [out, in] -> [..., out]."""
        ...

    def embedding(self, ids: torch.Tensor, weight: torch.Tensor | AffineMatrix, dtype: torch.dtype) -> torch.Tensor:
        """Rows of ``weight``: ids [...] -> [..., in], in ``dtype``."""
        ...
