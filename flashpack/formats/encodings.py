"""The numpy meaning of every encoding (normative, SPEC.md section 6): stored arrays -> float32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from flashpack.formats import affine, affine_dq
from flashpack.formats.dtypes import to_float32
from flashpack.formats.floats import E2M1, E4M3, E8M0
from flashpack.formats.records import Encoding


def decode(
    encoding: Encoding, parts: Mapping[str, NDArray[np.generic]], shape: tuple[int, ...], first: int = 0
) -> NDArray[np.float32]:
    """The float32 values [..., out, in] of a matrix of this ``shape``; raw tensors may have any.

    ``parts``: the stored arrays by name, of the shapes of ``encoding.parts(shape)``, as ``NUMPY[dtype]``. For rows of
    a matrix cut by ``Encoding.part_rows``, ``first`` is ``Encoding.first_in_block`` of the first one.
    Infinite and NaN values are legal, and come without a warning.
    """
    with np.errstate(all="ignore"):
        if not encoding.quantized:
            return to_float32(parts["weight"], encoding.dtype).reshape(shape)
        scales = parts["scales"]
        if encoding.name == "affine":
            words, e = parts["weight"].view(np.uint32), encoding
            return affine.dequantize(words, scales, parts["biases"], e.bits, e.group_size, e.dtype).reshape(shape)
        if encoding.name == "affine_dq":
            words, codes = parts["weight"].view(np.uint32), parts["scales"].view(np.uint8)
            return affine_dq.dequantize(words, codes, parts["blocks"], encoding.bits, first).reshape(shape)
        if encoding.name == "fp8_e4m3":
            wide = E8M0[scales] if encoding.dtype == "E8M0" else to_float32(scales, encoding.dtype)
            values: NDArray[np.float32] = E4M3[parts["weight"]] * _spread(wide, encoding.block, shape, first)
            return values
        wide = E8M0[scales] if encoding.name == "mxfp4" else E4M3[scales]
        # The scale is rounded to float32 first, then the product with it.
        if encoding.global_scale == "multiply":
            wide = wide * parts["global"][..., None]
        elif encoding.global_scale == "divide":
            wide = wide / parts["global"][..., None]
        values = E2M1[affine.unpack_bits(parts["weight"].view(np.uint32), 4)]
        grouped = values.reshape(*wide.shape, encoding.group_size)
        grouped *= wide[..., None]
        return values.reshape(shape)


def _spread(
    scales: NDArray[np.float32], block: tuple[int, int], shape: tuple[int, ...], first: int
) -> NDArray[np.float32]:
    """The scale of each value: [..., out or 1, in or 1]."""
    for axis, size, step, before in ((-2, shape[-2], block[0], first), (-1, shape[-1], block[1], 0)):
        if step:
            scales = np.take(scales, (before + np.arange(size)) // step, axis=axis)
    return scales
