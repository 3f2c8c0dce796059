"""What a device must be able to do. The runtime knows nothing else about kernels.

Arrays are torch tensors on the device. Block layouts are those of ``flashpack.formats``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from flashpack.formats.records import Encoding, RecordKind
    from flashpack.kernels.cpu.arena import PrefaultedMemory

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
    from a larger matrix, ``Encoding.first_in_block`` of the first one. ``coarse``: for prompts, kernels may round
    activations to 8 bits with a scale for each 64 or 32, if weights are of 4 bits (experts' they always may).
    """

    encoding: Encoding
    weight: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None
    first: int = 0
    blocks: torch.Tensor | None = None
    coarse: bool = False

    @classmethod
    def of(cls, encoding: Encoding, parts: Mapping[str, torch.Tensor]) -> StoredMatrix:
        """From its parts by name."""
        biases, total, blocks = (parts.get(part) for part in ("biases", "global", "blocks"))
        return cls(encoding, parts["weight"], parts["scales"], biases, total, blocks=blocks)

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


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's attention of one new token, with keys and values before it.

    Queries and keys may be normalized (weights [width], or None) and are turned by their position (rotary, by halves,
    the first ``rotary`` of their values). ``query_stride``: values from one head's query to the next; ``gate``: where
    in them a gate for the head's result begins, 0 for none.
    """

    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    heads: int
    kv_heads: int
    width: int
    rotary: int
    query_stride: int
    gate: int
    epsilon: float
    scale: float


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """A layer of the gated delta rule, for one new token of some channels: the queries of all key heads, their keys,
    then the values of all value heads; each key head belongs to value_heads / key_heads value heads in a row.

    ``filter`` [channels, taps] and ``filter_bias`` [channels] of the convolution, ``rate`` and ``rate_bias``
    [value_heads], ``norm`` [value_width]. A head's state fades by exp(rate * softplus(alpha + rate_bias)). Strides, in
    values: ``key_stride`` from one key head's query or key to the next one's, ``value_stride`` from its value heads'
    values and gates to the next one's, ``number_stride`` from its value heads' betas and alphas to the next one's.
    """

    filter: torch.Tensor
    filter_bias: torch.Tensor | None
    rate: torch.Tensor
    rate_bias: torch.Tensor
    norm: torch.Tensor
    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    taps: int
    key_stride: int
    value_stride: int
    number_stride: int
    epsilon: float


MOST_WIDTH = 512
"""Values of an attention head, or of a head of the delta rule; more are not known to the steps."""

MODES = ("softmax-top", "top-softmax", "sigmoid-top")
"""How a router's logits become weights: softmax over all, over the chosen, or a sigmoid of each."""

Step = Callable[[], None]


class TokenStep(Protocol):
    """A step with arguments of the token's own, which are given before it is called."""

    def given(self, *arguments: Any) -> None:
        """What the next call is about."""
        ...

    def __call__(self) -> None: ...


class ResidentStep(Protocol):
    """A layer's experts, as far as they are in memory. ``seconds``: that computing them has taken so far."""

    @property
    def seconds(self) -> float: ...

    def put(self, expert: int, record: RecordView | None) -> None:
        """Where an expert lies now, or that it is not in memory any more. Records are kept by the caller."""
        ...

    def __call__(self) -> None: ...


class Fusion(Protocol):
    """Layers computed in one call, without coming back to the caller for their experts."""

    def resident(
        self, x: torch.Tensor, activation: Activation, experts: int, chosen: torch.Tensor | None,
        weights: torch.Tensor | None, beside: Sequence[RecordView], outputs: torch.Tensor, out: torch.Tensor | None,
    ) -> ResidentStep | None:  # fmt: skip
        """What ``experts`` and ``combine`` do, for the last step of a group of a fused call; with the same bits.

        ``experts``: how many the layer has, ``chosen`` their numbers (int32; None: the layer has only ``beside``, the
        networks that every token uses). ``outputs``: rows of ``beside``, then of the chosen; ``weights``: of the
        chosen, then of ``beside``; ``out`` None: no sum. None for an activation that is not known here, or
        too many experts of a token.
        """
        ...

    def row(self, matrix: torch.Tensor | StoredMatrix, out: torch.Tensor) -> TokenStep | None:
        """Given its number, a row of ``matrix``, widened; None for encodings that are not known here."""
        ...

    def fuse(self, groups: Sequence[Sequence[Step]], after: Sequence[Step]) -> Callable[[], int]:
        """All groups, each of which ends with a resident step, and ``after``, in one call. It stops at an expert that
        is not in memory, and returns how many groups are done; of the next one only the resident step is left then."""
        ...


class Steps(Protocol):
    """The steps of decoding one token, bound to arrays that stay where they are.

    Every method returns a function without arguments (``experts``: with the token's own) that writes to ``out``. All
    arrays are contiguous float32 tensors of the device and are kept by what is returned. Steps run in the order in
    which they are called; a caller sees results only after ``read``.
    """

    device: torch.device

    @property
    def fusion(self) -> Fusion | None:
        """None where records are not in memory that the steps can be left alone with."""
        ...

    def products(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor | StoredMatrix],
        biases: Sequence[torch.Tensor | None],
        out: Sequence[torch.Tensor],
    ) -> Step | None:
        """x [width] times the transpose of each of ``weights``, plus its bias; None if one is not known here."""
        ...

    def add_norm(
        self, x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor | None, epsilon: float, out: torch.Tensor
    ) -> Step:
        """x [width] += y, then ``out`` is x over its root mean square, times ``weight``."""
        ...

    def attention(
        self, shape: AttentionShape, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor
    ) -> TokenStep:
        """Given keys and values [KV heads, capacity, width], the token's position (int), cosine and sine [rotary].

        The token's key and value are written to its position.
        """
        ...

    def delta(self, shape: DeltaShape, inputs: Sequence[torch.Tensor], out: torch.Tensor) -> TokenStep:
        """Given a convolution's window [channels, taps] and states [value heads, key width, value width], which it
        brings up to date. ``inputs``: where query, key, values, gates, betas and alphas begin."""
        ...

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, mode: str, divide: bool, factor: float,
        chosen: torch.Tensor, weights: torch.Tensor,
    ) -> Step:  # fmt: skip
        """The ``top_k`` experts of a token: int32 ``chosen`` and ``weights``. ``mode``: one of ``MODES``."""
        ...

    def sequence(self, steps: Sequence[Step]) -> Step:
        """All of these, made by this object, one after the other: cheaper than to call them one by one."""
        ...

    def record(self, view: RecordView) -> RecordView | None:
        """A network outside the arena, ready for ``experts``; None if one of its matrices is not known here."""
        ...

    def experts(
        self, x: torch.Tensor, activation: Activation, out: torch.Tensor
    ) -> Callable[[Sequence[RecordView], int], None]:
        """A function of records and the first row of ``out`` [.., hidden] that the first one's result goes to."""
        ...

    def combine(self, outputs: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> Step:
        """``out`` [hidden]: the sum of the rows ``places`` (int32) of ``outputs`` times ``weights``, in order."""
        ...

    def experts_combined(
        self, x: torch.Tensor, activation: Activation, weights: torch.Tensor, out: torch.Tensor
    ) -> Callable[[Sequence[RecordView]], None] | None:
        """``experts`` and ``combine`` at once, with the same bits: a function of as many records as ``weights`` has
        numbers, in their order. None where that gains nothing."""
        ...

    def read(self, array: torch.Tensor) -> list[int]:
        """The numbers of an int32 array, after all steps before: waits for them, and for what kernels did before."""
        ...

    def write(self, array: torch.Tensor, numbers: Sequence[int]) -> None:
        """Put numbers at the beginning of an int32 array, for the steps after; those before the last ``read`` are done
        with it, and none since then may use it."""
        ...


class Arena(Protocol):
    """Memory in which records lie, for reading threads and for kernels.

    ``tensor``: uint8 [size] on the device.
    """

    tensor: torch.Tensor

    def room(self, start: int, size: int) -> memoryview:
        """Where a thread may write the record that belongs to ``tensor[start : start + size]``: aligned to a page."""
        ...

    def landed(self, start: int, record: memoryview) -> None:
        """The thread has written all of ``record``, which is its ``room``: now it is in ``tensor``, too."""
        ...


class Kernels(Protocol):
    """One device's kernels. Activations are float32, float16 or bfloat16; results have their type.

    ``device``: where all tensors are. ``asynchronous``: whether kernels may still run, and read records, when a call
    has returned: then a caller must ``wait`` before it overwrites what they read. ``notices``: what is computed in a
    slower way than it could be, a line for each reason; more may come.
    """

    name: str
    device: torch.device
    asynchronous: bool
    notices: list[str]

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

    def arena(self, size: int, early: PrefaultedMemory | None = None) -> Arena:
        """Memory for records of ``size`` bytes in all; ``early``: the process's own, if the device's is no other."""
        ...

    def steps(self) -> Steps | None:
        """The steps of decoding on this device; None if it has none."""
        ...

    def commit(self) -> None:
        """What has been asked for begins, where results do not come at once; does not wait."""
        ...

    def wait(self) -> None:
        """Until all that has been asked for is done."""
        ...
