"""Encodings of a pack in the layouts of compressed-tensors: the stored arrays under other names, without rounding.

https://github.com/vllm-project/compressed-tensors defines the layouts, by what its compressors write and read:

| encoding | format | condition |
|---|---|---|
| affine, 2, 4 or 8 bits | pack-quantized | biases are ``-zero * scale`` with whole numbers ``zero`` |
| mxfp4 | mxfp4-pack-quantized | |
| nvfp4 | nvfp4-pack-quantized | the scale of the matrix divides, or there is none |
| fp8_e4m3 | float-quantized | one float scale for the matrix, or for each row |
| fp8_e4m3 | fp8 | one float scale for each square block |

``fp8`` is no format of compressed-tensors but the layout of DeepSeek-V3, which engines load more widely.

A value of pack-quantized is ``(q - 2**(bits - 1) - zero_point) * scale``: ``q`` lie in words as in the pack's affine
encoding, and zero points are there only where they are not all 0 ("symmetric").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashpack.export.content import Stored
from flashpack.formats import affine
from flashpack.formats.dtypes import from_float32, to_float32
from flashpack.formats.records import Encoding

PACKED_BITS = (2, 4, 8)
"""Widths of which a word holds a whole number: others have been packed in more than one way."""

FP8_BLOCKS = "fp8"
"""The format of a ``Scheme`` that is not of compressed-tensors."""

_FP8_STRATEGIES = {(0, 0): "tensor", (1, 0): "channel"}
"""What compressed-tensors calls a block that is the whole matrix, or a row."""

Part = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Scheme:
    """What ``quantization_config`` says of some modules: ``format``, ``weights`` and ``activations``, as the entries
    of a config group have them."""

    format: str
    weights: tuple[tuple[str, Any], ...]
    activations: tuple[tuple[str, Any], ...] = ()

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return bool(dict(self.weights).get("symmetric", True))

    def to_json(self, targets: list[str]) -> dict[str, Any]:
        """The config group of the modules ``targets``."""
        return {
            "format": self.format,
            "input_activations": _plain(self.activations) if self.activations else None,
            "output_activations": None,
            "targets": targets,
            "weights": _plain(self.weights),
        }


def scheme_of(encoding: Encoding) -> Scheme | None:
    """The scheme that may hold values of this ``encoding``; None if none does. See ``fits`` for affine integers."""
    match encoding.name:
        case "affine" if encoding.bits in PACKED_BITS:
            # A zero point that is not in the middle makes biases that need float32, where values are carried over.
            symmetric = encoding.dtype != "F32"
            return _scheme("pack-quantized", encoding.bits, "int", "group", encoding.group_size, symmetric)
        case "mxfp4":
            return _scheme("mxfp4-pack-quantized", 4, "float", "group", 32, scale_dtype="torch.uint8")
        case "nvfp4" if encoding.global_scale != "multiply":
            return _scheme("nvfp4-pack-quantized", 4, "float", "tensor_group", 16, scale_dtype="torch.float8_e4m3fn")
        case "fp8_e4m3" if encoding.dtype != "E8M0":
            rows, columns = encoding.block
            if rows == columns and rows > 1:
                return Scheme(FP8_BLOCKS, (("weight_block_size", encoding.block),))
            if encoding.block in _FP8_STRATEGIES:
                return _fp8(_FP8_STRATEGIES[encoding.block])
    return None


def fits(stored: Stored) -> bool:
    """Whether the layout of its scheme holds exactly the values of ``stored``."""
    return stored.encoding.name != "affine" or _zeros(stored) is not None


def scale_type(stored: Stored) -> str | None:
    """The type for the scales of affine integers: BF16 or F16; None where neither holds them.

    Where biases need float32, the pack has scales of that type, too.
    """
    if stored.encoding.dtype != "F32":
        return stored.encoding.dtype
    scales = to_float32(stored.parts["scales"], "F32")
    with np.errstate(all="ignore"):
        return next(
            (t for t in ("BF16", "F16") if np.array_equal(to_float32(from_float32(scales, t), t), scales)), None
        )


def parts_of(encoding: Encoding, shape: tuple[int, ...], scales: str) -> dict[str, Part]:
    """The tensors of a matrix [out, in] whose encoding has a scheme: their names in the module -> (dtype, shape).

    ``scales``: the ``scale_type`` of affine integers.
    """
    rows, width = shape
    match encoding.name:
        case "affine":
            groups = width // encoding.group_size
            found: dict[str, Part] = {
                "weight_packed": ("I32", (rows, width * encoding.bits // 32)),
                "weight_scale": (scales, (rows, groups)),
                "weight_shape": ("I64", (2,)),
            }
            if encoding.dtype == "F32":
                found["weight_zero_point"] = ("I32", (-(-rows * encoding.bits // 32), groups))
            return found
        case "mxfp4":
            return {"weight_packed": ("U8", (rows, width // 2)), "weight_scale": ("U8", (rows, width // 32))}
        case "nvfp4":
            return {
                "weight_packed": ("U8", (rows, width // 2)),
                "weight_scale": ("F8_E4M3", (rows, width // 16)),
                "weight_global_scale": ("F32", (1,)),
            }
    grid = (1,) if encoding.block == (0, 0) else encoding.parts(shape)["scales"][1]
    return {"weight": ("F8_E4M3", (rows, width)), _fp8_scale(encoding): (encoding.dtype, grid)}


def arrays_of(stored: Stored) -> dict[str, NDArray[np.generic]]:
    """The bytes of ``parts_of``. Of what ``fits``."""
    parts, encoding = stored.parts, stored.encoding
    match encoding.name:
        case "affine":
            zeros, kind = _zeros(stored), scale_type(stored)
            assert zeros is not None
            assert kind is not None
            scales = from_float32(to_float32(parts["scales"], encoding.dtype), kind)
            found = {"weight_packed": parts["weight"], "weight_scale": scales}
            found["weight_shape"] = np.array(stored.shape, dtype="<i8")
            if encoding.dtype == "F32":
                found["weight_zero_point"] = _pack_zeros(zeros, encoding.bits)
            return found
        case "mxfp4":
            return {"weight_packed": parts["weight"], "weight_scale": parts["scales"]}
        case "nvfp4":
            whole = parts.get("global", np.ones(1, dtype="<f4"))
            return {"weight_packed": parts["weight"], "weight_scale": parts["scales"], "weight_global_scale": whole}
    return {"weight": parts["weight"], _fp8_scale(encoding): parts["scales"]}


def _fp8_scale(encoding: Encoding) -> str:
    return "weight_scale" if encoding.block in _FP8_STRATEGIES else "weight_scale_inv"


def _zeros(stored: Stored) -> NDArray[np.uint8] | None:
    """The code [out, groups] whose value is 0, for each group; None where there is none in the range of codes.

    Where ``bias == -zero * scale`` without rounding, ``q * scale + bias`` and ``(q - zero) * scale`` are one number,
    rounded to float32 once: codes have 8 bits at most, and scales that were carried over 11.
    """
    encoding = stored.encoding
    scales = to_float32(stored.parts["scales"], encoding.dtype)
    biases = to_float32(stored.parts["biases"], encoding.dtype)
    middle = 2 ** (encoding.bits - 1)
    with np.errstate(all="ignore"):
        zeros = np.where(scales == 0, np.float32(middle), np.rint(-biases / scales))
        if encoding.dtype != "F32":
            zeros = np.full_like(scales, middle)
        exact = (scales.astype(np.float64) * -zeros == biases) & (zeros >= 0) & (zeros < 2 * middle)
    return zeros.astype(np.uint8) if exact.all() and scale_type(stored) is not None else None


def _pack_zeros(zeros: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """[out, groups] -> [out * bits / 32 rounded up, groups]: the codes of a column one after the other in words."""
    per_word = 32 // bits
    filled = np.pad(zeros, ((0, -len(zeros) % 32), (0, 0)))
    words = affine.pack_bits(np.ascontiguousarray(filled.T), bits)[:, : -(-len(zeros) // per_word)]
    return np.ascontiguousarray(words.T)


def _scheme(
    format: str, bits: int, kind: str, strategy: str, group: int, symmetric: bool = True, **more: str
) -> Scheme:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": group, "symmetric": symmetric}
    return Scheme(format, tuple((weights | {"dynamic": False} | more).items()))


def _fp8(strategy: str) -> Scheme:
    """As llm-compressor's FP8_DYNAMIC: vLLM has kernels for experts in fp8 only where activations are rounded, too."""
    common: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True}
    weights = common | {"strategy": strategy, "dynamic": False}
    activations = common | {"strategy": "token", "dynamic": True}
    return Scheme("float-quantized", tuple(weights.items()), tuple(activations.items()))


def _plain(pairs: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in pairs}
