"""``kernels.interface.Steps`` in C++: bound to arrays that stay where they are, a call passes hardly anything."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from flashpack.kernels.cpu.compiled import NativeKernels, NativeRecord, matrix_of, native_record
from flashpack.kernels.cpu.native import compute
from flashpack.kernels.interface import (
    ACTIVATIONS,
    MODES,
    Activation,
    AttentionShape,
    DeltaShape,
    RecordView,
    ResidentStep,
    Step,
    StoredMatrix,
    TokenStep,
)


class NativeStep:
    """Calls of the library, one after the other. ``keep``: what they have the addresses of."""

    def __init__(self, library: ctypes.CDLL, handle: int, calls: Sequence[compute.Call], keep: object) -> None:
        self._run, self._handle, self._keep = library.flashpack_run, handle, keep
        self.calls = calls
        self._addresses = (ctypes.c_void_p * len(calls))(*map(ctypes.addressof, calls))

    def __call__(self) -> None:
        failed = self.answer()
        if failed:
            self.fail(failed)

    def answer(self) -> int:
        """What ``flashpack_run`` answers."""
        answer: int = self._run(self._handle, self._addresses, len(self._addresses))
        return answer

    def fail(self, failed: int) -> None:
        """Raise what an answer means."""
        place, status = failed // 4 - 1, -(failed % 4)  # flashpack_run
        function = next(name for name, n in compute.FUNCTIONS.items() if n == self.calls[place].function)
        if status == -2:
            raise MemoryError(f"no memory for the kernels' working space ({function})")
        if function == "route":
            raise FloatingPointError("a router's logits are not numbers")
        raise ValueError(f"the kernels refuse the arguments of {function}")


Made = TypeVar("Made", bound=NativeStep)

_ABSENT = 3
"""What is left of an answer of ``flashpack_run`` divided by 4 where an expert is not in memory."""


class _AttentionStep(NativeStep):
    native: compute.Attention

    def given(self, keys: Tensor, values: Tensor, position: int, cosine: Tensor, sine: Tensor) -> None:
        native, call = self.native, self.calls[0]
        native.keys, native.values, native.capacity = keys.data_ptr(), values.data_ptr(), keys.shape[1]
        call.numbers[0] = position
        call.pointers[4], call.pointers[5] = cosine.data_ptr(), sine.data_ptr()
        self._token = keys, values, cosine, sine


class _RowStep(NativeStep):
    def given(self, index: int) -> None:
        self.calls[0].numbers[0] = index


class _DeltaStep(NativeStep):
    native: compute.Delta

    def given(self, window: Tensor, state: Tensor) -> None:
        self.native.window, self.native.state = window.data_ptr(), state.data_ptr()
        self._token = window, state


class _ResidentStep(NativeStep):
    native: compute.Resident
    table: Any
    """Addresses of records by expert; None for those that are not there."""

    def put(self, expert: int, record: RecordView | None) -> None:
        self.table[expert] = record.address if isinstance(record, NativeRecord) and record.native else None

    @property
    def seconds(self) -> float:
        return float(self.native.seconds)


class _FusedCall:
    """``ends``: how many calls lie before each resident step, the one itself included."""

    def __init__(self, step: NativeStep, ends: list[int]) -> None:
        self._step, self._ends = step, ends

    def __call__(self) -> int:
        failed = self._step.answer()
        if not failed:
            return len(self._ends)
        if failed % 4 != _ABSENT:
            self._step.fail(failed)
        return self._ends.index(failed // 4)


class NativeSteps:
    """Makes steps that run on the threads of ``kernels``."""

    def __init__(self, kernels: NativeKernels) -> None:
        self.device = torch.device("cpu")
        self._kernels = kernels
        self._library = kernels.workers.library
        self._handle = kernels.workers.handle

    @property
    def fusion(self) -> NativeSteps:
        return self

    def products(
        self,
        x: Tensor,
        weights: Sequence[Tensor | StoredMatrix],
        biases: Sequence[Tensor | None],
        out: Sequence[Tensor],
    ) -> Step | None:
        made = [matrix_of(w, b) for w, b in zip(weights, biases, strict=True)]
        matrices = [m for m in made if m is not None]
        if len(matrices) < len(made):
            return None
        array = (compute.Matrix * len(matrices))(*matrices)
        outputs = (ctypes.c_void_p * len(out))(*(o.data_ptr() for o in out))
        addresses = x.data_ptr(), ctypes.addressof(array), ctypes.addressof(outputs)
        return self._step("linear", addresses, (len(matrices),), 0.0, (array, outputs, x, *weights, *biases, *out))

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor | None, epsilon: float, out: Tensor) -> Step:
        addresses = tuple(map(_address, (x, y, weight, out)))
        return self._step("add_norm", addresses, (x.numel(),), epsilon, (x, y, weight, out))

    def attention(self, shape: AttentionShape, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> TokenStep:
        native = compute.Attention(
            None, None, *map(_address, (shape.query_norm, shape.key_norm)), 0, shape.heads, shape.kv_heads, shape.width,
            shape.rotary, shape.query_stride, shape.gate, shape.epsilon, shape.scale,
        )  # fmt: skip
        inputs = tuple(t.data_ptr() for t in (query, key, value))
        addresses = ctypes.addressof(native), *inputs, None, None, out.data_ptr()
        step = self._step("attend", addresses, (0,), 0.0, (native, shape, query, key, value, out), _AttentionStep)
        step.native = native
        return step

    def delta(self, shape: DeltaShape, inputs: Sequence[Tensor], out: Tensor) -> TokenStep:
        weights = shape.filter, shape.filter_bias, shape.rate, shape.rate_bias, shape.norm
        native = compute.Delta(
            None, None, *map(_address, weights), shape.key_heads, shape.value_heads, shape.key_width, shape.value_width,
            shape.taps, shape.key_stride, shape.value_stride, shape.number_stride, shape.epsilon,
        )  # fmt: skip
        addresses = ctypes.addressof(native), *(t.data_ptr() for t in inputs), out.data_ptr()
        step = self._step("delta", addresses, (), 0.0, (native, shape, *inputs, out), _DeltaStep)
        step.native = native
        return step

    def route(
        self, logits: Tensor, bias: Tensor | None, top_k: int, mode: str, divide: bool, factor: float, chosen: Tensor,
        weights: Tensor,
    ) -> Step:  # fmt: skip
        arrays = logits, bias, chosen, weights
        numbers = logits.numel(), top_k, MODES.index(mode), int(divide)
        return self._step("route", tuple(map(_address, arrays)), numbers, factor, arrays)

    def sequence(self, steps: Sequence[Step]) -> Step:
        made = [step for step in steps if isinstance(step, NativeStep)]
        assert len(made) == len(steps)
        return NativeStep(self._library, self._handle, [call for step in made for call in step.calls], made)

    def _step(
        self, function: str, addresses: Sequence[int | None], numbers: Sequence[int], real: float, keep: object,
        kind: type[Made] | None = None,
    ) -> Made:  # fmt: skip
        call = compute.Call(
            (ctypes.c_void_p * 8)(*addresses), (ctypes.c_int64 * 4)(*numbers), compute.FUNCTIONS[function], real
        )
        made: Any = kind or NativeStep
        step: Made = made(self._library, self._handle, [call], keep)
        return step

    def record(self, view: RecordView) -> RecordView | None:
        record = native_record(view)
        return record if record.native else None

    def experts(self, x: Tensor, activation: Activation, out: Tensor) -> Callable[[Sequence[RecordView], int], None]:
        assert activation.name is not None
        kernels = self._kernels
        function, limit = ACTIVATIONS.index(activation.name), activation.limit
        call, handle, address, most = self._library.flashpack_experts, self._handle, x.data_ptr(), len(out)
        ones, zeros = (ctypes.c_int32 * most)(*[1] * most), (ctypes.c_int32 * most)()
        row, base, keep = 4 * out.shape[1], out.data_ptr(), (x, out)

        def step(records: Sequence[RecordView], first: int, _keep: object = keep) -> None:
            count = len(records)
            known: list[int] = [r.address for r in records if isinstance(r, NativeRecord) and r.native]
            if len(known) < count:
                kernels.experts(x.unsqueeze(0), records, [[0]] * count, activation, out[first : first + count])
                return
            addresses = (ctypes.c_void_p * count)(*known)
            if call(handle, address, 1, addresses, ones, count, zeros, function, limit, base + first * row):
                raise ValueError("the kernels refuse a record")

        return step

    def combine(self, outputs: Tensor, places: Tensor, weights: Tensor, out: Tensor) -> Step:
        arrays = outputs, places, weights, out
        return self._step("combine", tuple(map(_address, arrays)), (places.numel(), out.numel()), 0.0, arrays)

    def experts_combined(self, x: Tensor, activation: Activation, weights: Tensor, out: Tensor) -> None:
        return None

    def resident(
        self, x: Tensor, activation: Activation, experts: int, chosen: Tensor | None, weights: Tensor | None,
        beside: Sequence[RecordView], outputs: Tensor, out: Tensor | None,
    ) -> ResidentStep | None:  # fmt: skip
        count = len(beside) + (0 if chosen is None else len(chosen))
        if activation.name is None or count > compute.MOST_RESIDENT:
            return None
        known = [r.address for r in beside if isinstance(r, NativeRecord) and r.native]
        assert len(known) == len(beside)  # made by ``record``
        table, others = (ctypes.c_void_p * max(1, experts))(), (ctypes.c_void_p * max(1, len(known)))(*known)
        native = compute.Resident(
            ctypes.addressof(table), ctypes.addressof(others), experts, len(known),
            0 if chosen is None else len(chosen), ACTIVATIONS.index(activation.name), activation.limit, 0.0,
        )  # fmt: skip
        addresses = ctypes.addressof(native), *map(_address, (x, chosen, weights, outputs, out))
        keep = native, table, others, beside, x, chosen, weights, outputs, out
        step = self._step("resident", addresses, (), 0.0, keep, _ResidentStep)
        step.native, step.table = native, table
        return step

    def row(self, matrix: Tensor | StoredMatrix, out: Tensor) -> TokenStep | None:
        native = matrix_of(matrix)
        if native is None or (isinstance(matrix, StoredMatrix) and matrix.encoding.name != "affine"):
            return None
        addresses = ctypes.addressof(native), out.data_ptr()
        return self._step("row", addresses, (0,), 0.0, (native, matrix, out), _RowStep)

    def fuse(self, groups: Sequence[Sequence[Step]], after: Sequence[Step]) -> Callable[[], int]:
        made = [[step for step in group if isinstance(step, NativeStep)] for group in (*groups, after)]
        assert sum(map(len, made)) == sum(map(len, groups)) + len(after)
        calls = [[call for step in group for call in step.calls] for group in made]
        step = NativeStep(self._library, self._handle, [call for some in calls for call in some], made)
        return _FusedCall(step, list(itertools.accumulate(map(len, calls[:-1]))))

    def read(self, array: Tensor) -> list[int]:
        numbers: list[int] = array.tolist()
        return numbers

    def write(self, array: Tensor, numbers: Sequence[int]) -> None:
        array.numpy()[: len(numbers)] = numbers  # cheaper to write to than a tensor


def _address(array: Tensor | None) -> int | None:
    return None if array is None else array.data_ptr()
