"""Stored types, by their safetensors names, and the conversions numpy lacks (bfloat16)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ITEMSIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per value of every stored type that a source or a pack may hold."""

NUMPY = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2",
    "I32": "<i4", "U32": "<u4", "F32": "<f4",
    "I64": "<i8", "U64": "<u8", "F64": "<f8",
}  # fmt: skip
"""The numpy type whose bytes equal the stored ones (bfloat16 and fp8 as unsigned integers)."""


def to_float32(stored: NDArray[np.generic], dtype: str) -> NDArray[np.float32]:
    """Widen stored BF16, F16 or F32 values (as ``NUMPY[dtype]``) to float32, exactly."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """Round float32 to BF16, F16 or F32, to nearest even; returns ``NUMPY[dtype]``.

    Infinities stay infinities; NaN is not expected (the quantizer refuses it before).
    """
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if dtype == "F16":
        return values.astype(np.float16)
    return values
