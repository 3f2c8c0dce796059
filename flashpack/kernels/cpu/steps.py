"""The steps of decoding one token, bound to arrays that stay where they are: a call passes hardly anything.

Every method returns a function without arguments (``attention``: with the token's own) that writes to ``out``. All
arrays are contiguous float32 and are kept by what is returned.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from torch import Tensor

from flashpack.kernels.cpu.compiled import NativeKernels, NativeRecord, matrix_of
from flashpack.kernels.cpu.native import compute
from flashpack.kernels.interface import ACTIVATIONS, Activation, RecordView, StoredMatrix

Step = Callable[[], None]


class Steps:
    """Makes steps that run on the threads of ``kernels``."""

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels
        self._library = kernels.workers.library
        self._handle = kernels.workers.handle

    def products(
        self,
        x: Tensor,
        weights: Sequence[Tensor | StoredMatrix],
        biases: Sequence[Tensor | None],
        out: Sequence[Tensor],
    ) -> Step | None:
        """x [width] times the transpose of each of ``weights``, plus its bias; None if one is not known here."""
        made = [matrix_of(w, b) for w, b in zip(weights, biases, strict=True)]
        matrices = [m for m in made if m is not None]
        if len(matrices) < len(made):
            return None
        array = (compute.Matrix * len(matrices))(*matrices)
        outputs = (ctypes.c_void_p * len(out))(*(o.data_ptr() for o in out))
        call, handle, address, count = self._library.flashpack_linear, self._handle, x.data_ptr(), len(matrices)
        keep = (x, *weights, *biases, *out)

        def step() -> None:
            if call(handle, address, 1, array, count, outputs):
                raise ValueError(f"the kernels refuse a product of {len(keep)} arrays")

        return step

    def add_norm(self, x: Tensor, y: Tensor | None, weight: Tensor | None, epsilon: float, out: Tensor) -> Step:
        """x [width] += y, then ``out`` is x over its root mean square, times ``weight``."""
        arguments = (
            self._handle, x.data_ptr(), y.data_ptr() if y is not None else None,
            weight.data_ptr() if weight is not None else None, epsilon, x.numel(), out.data_ptr(),
        )  # fmt: skip
        call, keep = self._library.flashpack_add_norm, (x, y, weight, out)

        def step(_keep: object = keep) -> None:
            call(*arguments)

        return step

    def attention(
        self, shape: compute.Attention, query: Tensor, key: Tensor, value: Tensor, out: Tensor
    ) -> Callable[[Tensor, Tensor, int, Tensor, Tensor], None]:
        """A function of keys and values [KV heads, capacity, width], the token's position, cosine and sine."""
        call, handle = self._library.flashpack_attend, self._handle
        pointers = tuple(t.data_ptr() for t in (query, key, value))
        address = out.data_ptr()
        keep = (shape, query, key, value, out)

        def step(keys: Tensor, values: Tensor, position: int, cosine: Tensor, sine: Tensor) -> None:
            shape.keys, shape.values, shape.capacity = keys.data_ptr(), values.data_ptr(), keys.shape[1]
            if call(handle, ctypes.byref(shape), *pointers, position, cosine.data_ptr(), sine.data_ptr(), address):
                raise ValueError(f"the kernels refuse an attention of {len(keep)} arrays")

        return step

    def delta(self, shape: compute.Delta, inputs: Sequence[Tensor], out: Tensor) -> Callable[[Tensor, Tensor], None]:
        """A function of a convolution's window [channels, taps] and states [value heads, key width, value width], which
        it brings up to date. ``inputs``: where query, key, values, gates, betas and alphas begin."""
        call, handle = self._library.flashpack_delta, self._handle
        arguments = (*(t.data_ptr() for t in inputs), out.data_ptr())
        keep = (shape, *inputs, out)

        def step(window: Tensor, state: Tensor) -> None:
            shape.window, shape.state = window.data_ptr(), state.data_ptr()
            if call(handle, ctypes.byref(shape), *arguments):
                raise ValueError(f"the kernels refuse a recurrent layer of {len(keep)} arrays")

        return step

    def route(
        self, logits: Tensor, bias: Tensor | None, top_k: int, mode: str, divide: bool, factor: float, chosen: Tensor,
        weights: Tensor,
    ) -> Step:  # fmt: skip
        """The ``top_k`` experts of a token: int32 ``chosen`` and ``weights``. ``mode``: one of ``compute.MODES``."""
        arguments = (
            logits.data_ptr(), bias.data_ptr() if bias is not None else None, logits.numel(), top_k,
            compute.MODES[mode], int(divide), factor, chosen.data_ptr(), weights.data_ptr(),
        )  # fmt: skip
        call, keep = self._library.flashpack_route, (logits, bias, chosen, weights)

        def step(_keep: object = keep) -> None:
            if call(*arguments):
                raise FloatingPointError("a router's logits are not numbers")

        return step

    def experts(self, x: Tensor, activation: Activation, out: Tensor) -> Callable[[Sequence[RecordView], int], None]:
        """A function of records and the first row of ``out`` [.., hidden] that the first one's result goes to."""
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
        """``out`` [hidden]: the sum of the rows ``places`` of ``outputs`` times ``weights``."""
        arguments = (
            self._handle, outputs.data_ptr(), places.data_ptr(), weights.data_ptr(), 1, places.numel(), out.numel(),
            out.data_ptr(),
        )  # fmt: skip
        call, keep = self._library.flashpack_combine, (outputs, places, weights, out)

        def step(_keep: object = keep) -> None:
            call(*arguments)

        return step
