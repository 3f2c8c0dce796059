"""Quantized matrices of every source format, written down from the formats' definitions: stored parts and their values.

Nothing here is shared with the code under test. Codes and scales are random, so that every code occurs; values are
computed in float64 from the definitions and are exact in float32 unless said otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Stored = tuple[str, np.ndarray]
"""safetensors type and array, as bytes of that type."""

Made = tuple[dict[str, Stored], np.ndarray]
"""Parts by the last component of their names, and float32 values [rows, columns]."""

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e4m3(codes: np.ndarray) -> np.ndarray:
    """FP8 codes -> float64: a sign, 4 bits of exponent (bias 7), 3 of fraction; 0x7f and 0xff are NaN."""
    exponent, fraction = codes >> 3 & 15, codes & 7
    value = np.where(exponent > 0, (8 + fraction) * 2.0 ** (exponent - 10.0), fraction * 2.0**-9)
    return np.where((codes & 0x7F) == 0x7F, np.nan, np.where(codes >> 7, -value, value))


def bfloat16(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float -> BF16 by cutting bits off: as stored, and as float64."""
    bits = values.astype(np.float32).view(np.uint32) >> 16
    return bits.astype(np.uint16), (bits << 16).view(np.float32).astype(np.float64)


def scales(rng: np.random.Generator, dtype: str, shape: tuple[int, ...], size: float) -> tuple[Stored, np.ndarray]:
    """Random positive scales of about ``size``: as stored, and as float64."""
    wide = rng.uniform(size / 2, size, shape)
    if dtype == "BF16":
        stored, wide = bfloat16(wide)
        return (dtype, stored), wide
    if dtype in ("U8", "F8_E8M0"):
        codes = (127 + np.floor(np.log2(wide))).astype(np.uint8)
        return (dtype, codes), 2.0 ** (codes.astype(float) - 127)
    stored = wide.astype({"F16": np.float16, "F32": np.float32}[dtype])
    return (dtype, stored), stored.astype(np.float64)


def pack(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Integers [n, m] -> I32 [n, m * bits / 32], one after the other from the lowest bit; ``order``: which of 8 comes
    first within a word."""
    if order is not None:
        codes = codes.reshape(len(codes), -1, 8)[:, :, order].reshape(len(codes), -1)
    number = [sum(int(c) << (bits * i) for i, c in enumerate(row)) for row in codes]
    size = -(-codes.shape[1] * bits // 32) * 4
    return np.array([np.frombuffer(n.to_bytes(size, "little"), "<i4") for n in number])


def nibbles(codes: np.ndarray) -> np.ndarray:
    """4-bit codes [n, m] -> uint8 [n, m / 2], the even column in the low half."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)


Make = Callable[[np.random.Generator, int, int], Made]


def fp8(name: str, dtype: str, block: tuple[int, int], shape: str = "grid") -> Make:
    """E4M3 with scales ``name``; ``block`` 0: all rows or columns. ``shape``: "grid", "scalar", "vector"."""

    def make(rng: np.random.Generator, rows: int, columns: int) -> Made:
        codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
        codes[(codes & 0x7F) == 0x7F] = 0
        grid = tuple(-(-n // (b or n)) for n, b in zip((rows, columns), block, strict=True))
        (kind, stored), wide = scales(rng, dtype, grid, 2e-3)
        for axis, (n, b) in enumerate(zip((rows, columns), block, strict=True)):
            wide = np.repeat(wide, b or n, axis=axis).take(range(n), axis=axis)
        stored = stored.reshape({"grid": grid, "scalar": (), "vector": (rows,)}[shape])
        values = e4m3(codes).astype(np.float32) * wide.astype(np.float32)
        return {"weight": ("F8_E4M3", codes), name: (kind, stored)}, values

    return make


def mlx_mxfp8(rng: np.random.Generator, rows: int, columns: int) -> Made:
    """MLX's words of FP8 codes, with scales for 32 values."""
    parts, values = fp8("scales", "U8", (1, 32))(rng, rows, columns)
    return parts | {"weight": ("U32", parts["weight"][1].view("<u4"))}, values


def mxfp4(weight: str, dtype: str, scale: str, scale_dtype: str = "U8") -> Make:
    """Names and types of the codes, in bytes or words, and of the scales."""

    def make(rng: np.random.Generator, rows: int, columns: int) -> Made:
        codes = rng.integers(0, 16, (rows, columns))
        (_, stored), wide = scales(rng, "U8", (rows, columns // 32), 0.1)
        words = nibbles(codes).view("<u4" if dtype == "U32" else np.uint8)
        return {weight: (dtype, words), scale: (scale_dtype, stored)}, (
            E2M1[codes] * np.repeat(wide, 32, axis=1)
        ).astype(np.float32)

    return make


def nvfp4(kind: str) -> Make:
    """ "divide" (compressed-tensors), "multiply" (ModelOpt), or "mlx", which has no scale of the whole matrix."""

    def make(rng: np.random.Generator, rows: int, columns: int) -> Made:
        codes = rng.integers(0, 16, (rows, columns))
        small = rng.integers(60, 90, (rows, columns // 16), dtype=np.uint8)
        whole = np.float32(rng.uniform(20, 40))
        wide = e4m3(small).astype(np.float32)
        if kind == "mlx":
            small = small - np.uint8(40)
            wide = e4m3(small).astype(np.float32)
            parts = {"weight": ("U32", nibbles(codes).view("<u4")), "scales": ("U8", small)}
        elif kind == "divide":
            wide = wide / whole
            parts = {"weight_packed": ("U8", nibbles(codes)), "weight_scale": ("F8_E4M3", small)}
            parts["weight_global_scale"] = ("F32", whole.reshape(1))
            parts["input_global_scale"] = ("F32", np.ones(1, np.float32))
        else:
            whole = np.float32(1) / whole
            wide = wide * whole
            parts = {"weight": ("U8", nibbles(codes)), "weight_scale": ("F8_E4M3", small)}
            parts["weight_scale_2"] = ("F32", whole.reshape(()))
            parts["input_scale"] = ("F32", np.float32(1).reshape(()))
        return parts, E2M1[codes].astype(np.float32) * np.repeat(wide, 16, axis=1)

    return make


@dataclass(frozen=True)
class Integers:
    """Integers with scales ``dtype`` for groups of ``group`` columns (0: all). ``zeros``: "": none are stored."""

    layout: str
    bits: int
    group: int
    dtype: str = "BF16"
    zeros: str = ""
    order: bool = False
    offset: int = 1

    def __call__(self, rng: np.random.Generator, rows: int, columns: int) -> Made:
        half, top = 2 ** (self.bits - 1), 2**self.bits
        group = self.group or columns
        count = columns // group
        codes = rng.integers(0, top, (rows, columns))
        stored, wide = scales(rng, self.dtype, (rows, count), 0.3 / top)
        # GPTQ stores 1 less: 0 would borrow from its neighbours.
        zeros = rng.integers(self.layout == "gptq", top, (rows, count)) if self.zeros else np.full((rows, count), half)
        index = np.arange(columns) // group
        if self.order:
            index = rng.permutation(index)
        values = ((codes - zeros[:, index]) * wide[:, index]).astype(np.float32)
        parts: dict[str, Stored] = {}
        if self.layout == "packed":
            parts = {"weight_packed": ("I32", pack(codes, self.bits)), "weight_scale": stored}
            parts["weight_shape"] = ("I64", np.array([rows, columns]))
            if self.zeros:
                parts["weight_zero_point"] = ("I32", pack(zeros.T, self.bits).T)
            if self.order:
                parts["weight_g_idx"] = ("I32", index.astype(np.int32))
        elif self.layout == "bytes":
            parts = {"weight": ("I8", (codes - half).astype(np.int8)), "weight_scale": stored}
            if self.zeros:
                parts["weight_zero_point"] = ("I8", (zeros - half).astype(np.int8))
        elif self.layout == "gptq":
            parts = {"qweight": ("I32", pack(codes, self.bits).T), "scales": (stored[0], stored[1].T)}
            parts["qzeros"] = ("I32", pack(zeros.T - self.offset, self.bits))
            parts["g_idx"] = ("I32", index.astype(np.int32))
        else:
            # A word holds eight rows of the matrix, and of them 0, 2, 4, 6 come first.
            eight = (0, 2, 4, 6, 1, 3, 5, 7)
            parts = {"qweight": ("I32", pack(codes.T, 4, eight)), "qzeros": ("I32", pack(zeros.T, 4, eight))}
            parts["scales"] = (stored[0], stored[1].T)
        return parts, values


def mlx_affine(bits: int, group: int, dtype: str) -> Make:
    def make(rng: np.random.Generator, rows: int, columns: int) -> Made:
        codes = rng.integers(0, 2**bits, (rows, columns))
        shape = (rows, columns // group)
        (_, s), wide = scales(rng, dtype, shape, 0.3 / 2**bits)
        (_, b), bias = scales(rng, dtype, shape, 0.1)
        parts = {"weight": ("U32", pack(codes, bits).view("<u4")), "scales": (dtype, s), "biases": (dtype, b)}
        product = (codes * np.repeat(wide, group, axis=1)).astype(np.float32)
        return parts, product + np.repeat(bias, group, axis=1).astype(np.float32)

    return make


@dataclass(frozen=True)
class Variant:
    """``config``: what config.json says; ``label``: the format's name; ``encoding``: what holds it exactly, if any."""

    make: Make
    label: str
    encoding: str | None
    config: dict[str, Any] = field(default_factory=dict)


def _ct(format: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "format": format, "config_groups": groups}}


def _quantization(method: str, **parameters: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **parameters}}


def _mlx(bits: int, group_size: int, mode: str | None = None) -> dict[str, Any]:
    return {"quantization": {"bits": bits, "group_size": group_size} | ({"mode": mode} if mode else {})}


def _int4(**more: Any) -> dict[str, Any]:
    return _ct("pack-quantized", num_bits=4, type="int", **{"symmetric": True, "strategy": "group"} | more)


def _gptq(
    bits: int = 4, group_size: int = 32, sym: bool = False, desc_act: bool = False, **more: Any
) -> dict[str, Any]:
    return _quantization("gptq", bits=bits, group_size=group_size, sym=sym, desc_act=desc_act, **more)


_FP8 = _quantization("fp8", weight_block_size=[32, 48])
_V4 = _quantization("fp8", weight_block_size=[32, 32], scale_fmt="ue8m0", expert_dtype="fp4")

VARIANTS = {
    "fp8-ragged": Variant(fp8("weight_scale_inv", "F32", (32, 48)), "fp8-block", "fp8 32x48 f32", _FP8),
    "fp8-bf16-scales": Variant(fp8("weight_scale_inv", "BF16", (32, 48)), "fp8-block", "fp8 32x48 bf16", _FP8),
    "fp8-e8m0": Variant(fp8("scale", "F8_E8M0", (32, 32)), "fp8-block", "fp8 32x32 e8m0", _V4),
    "fp8-tensor": Variant(
        fp8("weight_scale", "F32", (0, 0), "scalar"),
        "fp8-tensor",
        "fp8 0x0 f32",
        _quantization("modelopt", quant_algo="FP8"),
    ),
    "fp8-channel": Variant(
        fp8("weight_scale", "BF16", (1, 0)), "fp8-channel", "fp8 1x0 bf16", _ct("float-quantized", strategy="channel")
    ),
    "fp8-vector": Variant(
        fp8("weight_scale", "F32", (1, 0), "vector"), "fp8-channel", "fp8 1x0 f32", _quantization("fbgemm_fp8")
    ),
    "mxfp8": Variant(fp8("weight_scale", "U8", (1, 32)), "mxfp8", "fp8 1x32 e8m0", _ct("mxfp8-quantized")),
    "mxfp4-compressed": Variant(
        mxfp4("weight_packed", "U8", "weight_scale"), "mxfp4", "mxfp4", _ct("mxfp4-pack-quantized")
    ),
    "mxfp4-deepseek": Variant(mxfp4("weight", "I8", "scale", "F8_E8M0"), "mxfp4", "mxfp4", _V4),
    "nvfp4-compressed": Variant(nvfp4("divide"), "nvfp4", "nvfp4", _ct("nvfp4-pack-quantized")),
    "nvfp4-modelopt": Variant(nvfp4("multiply"), "nvfp4", "nvfp4", _quantization("modelopt", quant_algo="NVFP4")),
    "int4": Variant(Integers("packed", 4, 32), "ct-int4", "4-bit g32", _int4(group_size=32)),
    "int4-float16": Variant(Integers("packed", 4, 32, "F16"), "ct-int4", "4-bit g32", _int4(group_size=32)),
    "int4-zeros": Variant(
        Integers("packed", 4, 32, zeros="yes"), "ct-int4", "4-bit g32", _int4(group_size=32, symmetric=False)
    ),
    "int4-channel": Variant(Integers("packed", 4, 0), "ct-int4", "4-bit g64", _int4(strategy="channel")),
    "int4-g16": Variant(Integers("packed", 4, 16), "ct-int4", None, _int4(group_size=16)),
    "int4-float32": Variant(Integers("packed", 4, 32, "F32"), "ct-int4", None, _int4(group_size=32)),
    "int4-order": Variant(Integers("packed", 4, 32, order=True), "ct-int4", None, _int4(group_size=32)),
    "int8": Variant(
        Integers("packed", 8, 32), "ct-int8", "8-bit g32", _ct("pack-quantized", num_bits=8, type="int", group_size=32)
    ),
    "int8-bytes": Variant(
        Integers("bytes", 8, 0), "ct-int8", "8-bit g64", _ct("int-quantized", num_bits=8, strategy="channel")
    ),
    "int8-bytes-zeros": Variant(
        Integers("bytes", 8, 0, zeros="yes"), "ct-int8", "8-bit g64", _ct("int-quantized", num_bits=8)
    ),
    "gptq": Variant(Integers("gptq", 4, 32, "F16", "yes"), "gptq", "4-bit g32", _gptq()),
    "gptq-symmetric": Variant(Integers("gptq", 4, 32, "F16"), "gptq", "4-bit g32", _gptq(sym=True)),
    "gptq-v2": Variant(
        Integers("gptq", 4, 32, "F16", "yes", offset=0), "gptq", "4-bit g32", _gptq(checkpoint_format="gptq_v2")
    ),
    "gptq-order": Variant(Integers("gptq", 4, 32, "F16", "yes", order=True), "gptq", None, _gptq(desc_act=True)),
    "gptq-column": Variant(Integers("gptq", 8, 0, "BF16", "yes"), "gptq", "8-bit g64", _gptq(bits=8, group_size=-1)),
    "gptq-3": Variant(Integers("gptq", 3, 32, "F16", "yes"), "gptq", "3-bit g32", _gptq(bits=3)),
    "gptq-2": Variant(Integers("gptq", 2, 64, "F16", "yes"), "gptq", "2-bit g64", _gptq(bits=2, group_size=64)),
    "auto-round": Variant(
        Integers("gptq", 4, 32, "F16"),
        "gptq",
        "4-bit g32",
        _quantization(
            "auto-round", packing_format="auto_round:auto_gptq", bits=4, group_size=32, sym=True, desc_act=False
        ),
    ),
    "awq": Variant(
        Integers("awq", 4, 32, "F16", "yes"),
        "awq",
        "4-bit g32",
        _quantization("awq", bits=4, group_size=32, version="gemm", zero_point=True),
    ),
    "mlx-mxfp4": Variant(mxfp4("weight", "U32", "scales"), "mlx-mxfp4", "mxfp4", _mlx(4, 32, "mxfp4")),
    "mlx-mxfp8": Variant(mlx_mxfp8, "mlx-mxfp8", "fp8 1x32 e8m0", _mlx(8, 32, "mxfp8")),
    "mlx-nvfp4": Variant(nvfp4("mlx"), "mlx-nvfp4", "nvfp4", _mlx(4, 16, "nvfp4")),
    **{
        f"mlx-affine-{bits}": Variant(
            mlx_affine(bits, group, dtype), "mlx-affine", f"{bits}-bit g{group}", _mlx(bits, group)
        )
        for bits, group, dtype in ((2, 32, "BF16"), (3, 64, "F16"), (5, 32, "F32"), (6, 64, "BF16"), (8, 32, "F16"))
    },
}
"""Every variant can have 64 columns. With more, groups of 64 that stand for whole rows become 128."""


def write_checkpoint(folder: Path, tensors: dict[str, Stored], config: dict[str, Any]) -> Path:
    """A checkpoint of one file, byte by byte as the safetensors format says."""
    folder.mkdir(parents=True, exist_ok=True)
    header, data = {}, b""
    for name, (dtype, array) in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        shape = list(array.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
