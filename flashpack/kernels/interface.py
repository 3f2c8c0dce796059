"""What a device must be able to do. The runtime knows nothing else about kernels.

Arrays are torch tensors on the device. Block layouts are those of ``flashpack.formats``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from flashpack.formats.records import Encoding, RecordKind

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2", "swiglu_oai")
"""Functions that kernels may have built in: of the gate, times up; ``swiglu_oai`` is GPT-OSS's, clamped at a limit.
Their order is that of their numbers in native kernels."""


@dataclass(frozen=True, slots=True)
class Activation:
    """What stands between an expert's matrices: [tokens, 2I] (gate rows first) -> [tokens, I] for gated experts;
    [tokens, I] -> [tokens, I] without a gate.

    ``name``: which of ``ACTIVATIONS`` the function is, None if none of them.
    """

    function: Callable[[torch.Tensor], torch.Tensor]
    name: str | None = None
    limit: float = 0.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A quantized matrix [out, in] in its stored parts (``formats.records.Encoding.parts``), U32 words as int32.

    ``scales`` are as stored: bfloat16, float16, float32 or, where they are small floats, uint8. ``first``: of rows cut
    from a larger matrix, the number of the first one in its block of fp8 scales.
    """

    encoding: Encoding
    weight: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    first: int = 0

    @classmethod
    def of(cls, encoding: Encoding, parts: Mapping[str, torch.Tensor]) -> StoredMatrix:
        """From its parts by name."""
        return cls(encoding, parts["weight"], parts["scales"], parts.get("biases"), parts.get("global"))

    @property
    def shape(self) -> tuple[int, int]:
        rows, stored = self.weight.shape
        return rows, stored if self.encoding.name == "fp8_e4m3" else stored * 32 // self.encoding.bits


@dataclass(frozen=True, slots=True)
class RecordView:
    """An expert's record where it lies in memory, ready for kernels: nothing in it is a copy.

    ``first`` are the matrices before the activation, in row order: gate and up as one where they lie side by side,
    else gate and up, or up alone; ``first_bias`` the bias [out] of each. Biases are bfloat16, float16 or float32.
    """

    first: tuple[torch.Tensor | StoredMatrix, ...]
    down: torch.Tensor | StoredMatrix
    first_bias: tuple[torch.Tensor | None, ...]
    down_bias: torch.Tensor | None


class Kernels(Protocol):
    """One device's kernels. Activations are float32, float16 or bfloat16; results have their type."""

    name: str

    def view_record(self, record: torch.Tensor, kind: RecordKind) -> RecordView:
        """See the bytes of a record (uint8 [stride]) as matrices, without copying."""
        ...

    def expert(self, x: torch.Tensor, record: RecordView, activation: Activation) -> torch.Tensor:
        """One expert's feed-forward network: x [tokens, hidden] -> [tokens, hidden].

        Biases are added in float32, before the activation and after ``down``.
        A row of the result does not depend on how many threads computed it.
        """
        ...

    def experts(
        self,
        x: torch.Tensor,
        records: Sequence[RecordView],
        rows: Sequence[Sequence[int]],
        activation: Activation,
        out: torch.Tensor,
    ) -> None:
        """``expert`` for several: the first gets the rows rows[0] of x [tokens, hidden], and so on; float32 out
        [sum of the lengths of rows, hidden], in this order."""
        ...

    def combine(self, outputs: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The sums over k, in order, of rows places [tokens, top_k] of float32 outputs [.., hidden] times weights
        [tokens, top_k] -> float32 [tokens, hidden]. A negative place, int32, stands for zeros."""
        ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor | StoredMatrix) -> torch.Tensor:
        """x [..., in] times the transpose of ``weight`` [out, in] -> [..., out]."""
        ...

    def embedding(self, ids: torch.Tensor, weight: torch.Tensor | StoredMatrix, dtype: torch.dtype) -> torch.Tensor:
        """Rows of ``weight``: ids [...] -> [..., in], in ``dtype``."""
        ...
