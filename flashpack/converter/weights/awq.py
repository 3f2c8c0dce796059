"""AWQ in the "gemm" layout: 4-bit integers packed along the rows of the matrix, interleaved within each word.

``X.qweight`` is I32 [columns, rows / 8], ``X.qzeros`` I32 [groups, rows / 8], ``X.scales`` [groups, rows].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashpack.converter.tensor import Arrays, Extent, SourceTensor
from flashpack.converter.weights.declared import Declared
from flashpack.converter.weights.gptq import unpacked
from flashpack.converter.weights.integers import Codes, Integers, affine_target
from flashpack.converter.weights.parts import Parts, check_dtype, check_shape
from flashpack.errors import UnsupportedError
from flashpack.formats import affine
from flashpack.formats.dtypes import to_float32

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which 4 bits of a word hold the rows 0 to 7 of it."""


@dataclass(frozen=True)
class Awq(Integers):
    """Rows lie across the file: a matrix is read whole."""

    @property
    def align(self) -> int:
        return 0

    def codes(self, arrays: Arrays) -> Codes:
        words = affine.pack_bits(np.ascontiguousarray(_rows(arrays["qweight"]).T).astype(np.uint8), self.bits)
        zeros = _rows(arrays["qzeros"]).T.astype(np.float32)
        return Codes(words, to_float32(np.ascontiguousarray(arrays["scales"].T), self.dtype), zeros)


def _rows(words: NDArray[np.generic]) -> NDArray[np.int32]:
    """I32 [n, rows / 8] -> integers [n, rows]."""
    eight = unpacked(words, 4).reshape(len(words), -1, 8)
    return eight[:, :, _ORDER].reshape(len(words), -1)


def read_awq(stem: str, weight: Extent, parts: Parts, declared: Declared) -> SourceTensor:
    """The matrix ``stem.weight`` of ``stem.qweight``."""
    name = f"{stem}.qweight"
    config = declared.config
    version = config.get("version", config.get("format", "gemm"))
    if not isinstance(version, str) or version.lower() != "gemm":
        raise UnsupportedError(f"tensor {name}: AWQ version {version!r} is not supported; gemm is")
    if config.get("backend", "autoawq") != "autoawq":
        raise UnsupportedError(f"tensor {name}: AWQ backend {config['backend']!r} is not supported; autoawq is")
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise UnsupportedError(f"tensor {name}: AWQ of {bits!r} bits is not supported; 4 bits are")
    check_dtype(name, weight, "I32")
    zeros = parts.need(f"{stem}.qzeros", name, "I32")
    scales = parts.need(f"{stem}.scales", name, "F16", "BF16", "F32")
    if len(weight.shape) != 2:
        raise UnsupportedError(f"tensor {name} has shape {list(weight.shape)}: no matrix")
    width, rows = weight.shape[0], weight.shape[1] * 8
    group = declared.integer("q_group_size" if "q_group_size" in config else "group_size", name)
    group = group if group > 0 else width
    groups = -(-width // group)
    why = f"{name} in groups of {group}, as config.json says,"
    check_shape(f"{stem}.scales", scales, (groups, rows), why)
    check_shape(f"{stem}.qzeros", zeros, (groups, rows // 8), why)
    if width % 8:
        raise UnsupportedError(f"tensor {name}: {width} columns are no multiple of 8")
    target = affine_target(4, width, group, scales.dtype, None)
    format = Awq("awq", 4, group, scales.dtype, None, target)
    return SourceTensor(f"{stem}.weight", (rows, width), format, {"qweight": weight, "qzeros": zeros, "scales": scales})
