"""Section 6 of SPEC.md: what a matrix is stored as, and its values; pack_rules.py and read_pack.py build on it."""

from typing import Any

import numpy as np

SIZES = {"U8": 1, "U32": 4, "I32": 4, "I64": 8, "BF16": 2, "F16": 2, "F32": 4}
FLOATS = ("BF16", "F16", "F32")
PARTS = ("weight", "scales", "biases", "blocks", "global")
FEATURES = ("mxfp4", "nvfp4", "fp8_e4m3", "affine_dq")  # encodings that a pack must list


class PackError(Exception):
    """The pack cannot be read or trusted; `code` is one of section 11."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


def need(condition: bool, message: str, code: str = "format") -> None:
    if not condition:
        raise PackError(code, message)


def stored_parts(encoding: Any, shape: list[int]) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of each array that a matrix [out, in] is stored as."""
    name, odd = encoding["name"], f"no matrix: {encoding} {shape}"
    need(name in ("raw", "affine", *FEATURES), f"the encoding {name} is unknown", "version")
    need(len(shape) == 2, odd)
    out, width = shape
    if name == "raw":
        need(encoding.get("dtype") in FLOATS, odd)
        return {"weight": (encoding["dtype"], shape)}
    if name == "affine":
        bits, group, dtype = (encoding.get(key) for key in ("bits", "group_size", "scale_dtype"))
        need(bits in (2, 3, 4, 5, 6, 8) and group in (32, 64, 128) and dtype in FLOATS and width % group == 0, odd)
        scales = (dtype, [out, width // group])
        return {"weight": ("U32", [out, width * bits // 32]), "scales": scales, "biases": scales}
    if name == "affine_dq":
        numbers = [encoding.get(key) for key in ("bits", "group_size", "scale_dtype")]
        need(
            numbers[0] in (2, 3, 4) and numbers[1:] == [32, "BF16"] and width % 32 == 0 and out * width % 256 == 0, odd
        )
        return {"weight": ("U32", [out, width * numbers[0] // 32]), "scales": ("U8", [out, width // 32]),
                "blocks": ("BF16", [out * width // 256, 3])}  # fmt: skip
    if name == "fp8_e4m3":
        block, dtype = encoding.get("block"), encoding.get("scale_dtype")
        need(isinstance(block, list) and len(block) == 2 and dtype in (*FLOATS, "E8M0"), odd)
        need(all(type(n) is int and 0 <= n <= 65536 for n in block), odd)
        blocks = [-(-size // n) if n else 1 for size, n in zip(shape, block, strict=True)]
        return {"weight": ("U8", shape), "scales": ("U8" if dtype == "E8M0" else dtype, blocks)}
    group, scaled = (32, "none") if name == "mxfp4" else (16, encoding.get("global_scale"))
    need(scaled in ("none", "multiply", "divide") and width % group == 0, odd)
    parts = {"weight": ("U32", [out, width // 8]), "scales": ("U8", [out, width // group])}
    return parts if scaled == "none" else parts | {"global": ("F32", [1])}


def integers(weight: np.ndarray, bits: int) -> np.ndarray:
    """The integers in the bit stream of each row."""
    data = weight.view("<u1")
    first = np.arange(data.shape[1] * 8 // bits) * bits  # first bit of each value; its last is in that byte or the next
    low, high = data[:, first // 8], data[:, np.minimum(first // 8 + 1, data.shape[1] - 1)]
    return (low.astype("<u2") | high.astype("<u2") << 8) >> (first % 8).astype("<u2") & (2**bits - 1)


def e2m1(codes: np.ndarray) -> np.ndarray:
    return np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], "<f4")[codes]


def e4m3(codes: np.ndarray) -> np.ndarray:
    exponent, fraction = (codes >> 3 & 15).astype(int), (codes & 7) / 8
    values = np.where(exponent == 0, fraction * 2**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    return np.where(codes & 127 == 127, np.nan, np.where(codes >> 7, -values, values)).astype("<f4")


def e8m0(codes: np.ndarray) -> np.ndarray:
    return np.where(codes == 255, np.nan, 2.0 ** (codes.astype(int) - 127)).astype("<f4")


def decode(encoding: Any, parts: dict[str, np.ndarray]) -> np.ndarray:
    """The float32 matrix [out, in] of its parts, floats among them as float32. Every step is rounded to float32."""
    name, weight, scales = encoding["name"], parts["weight"], parts.get("scales")
    if scales is None:
        return weight
    with np.errstate(all="ignore"):  # nothing is said about the range of scales
        if name == "affine":
            scales, biases = (np.repeat(parts[part], encoding["group_size"], axis=1) for part in PARTS[1:3])
            return integers(weight, encoding["bits"]).astype("<f4") * scales + biases  # two steps
        if name == "affine_dq":
            d, c, m = np.repeat(parts["blocks"], 8, axis=0).T  # of each group
            scale, bias = d * (scales.ravel() & 15), c + m * (scales.ravel() >> 4)
            own = (np.repeat(numbers.reshape(scales.shape), 32, axis=1) for numbers in (scale, bias))
            return integers(weight, encoding["bits"]).astype("<f4") * next(own) + next(own)
        if name == "mxfp4":
            return e2m1(integers(weight, 4)) * np.repeat(e8m0(scales), 32, axis=1)
        if name == "nvfp4":
            scales, scaled = e4m3(scales), encoding["global_scale"]
            if scaled != "none":
                scales = scales * parts["global"] if scaled == "multiply" else scales / parts["global"]
            return e2m1(integers(weight, 4)) * np.repeat(scales, 16, axis=1)
        scales = e8m0(scales) if encoding["scale_dtype"] == "E8M0" else scales
        rows, columns = (
            np.arange(size) // (n or size) for size, n in zip(weight.shape, encoding["block"], strict=True)
        )
        return e4m3(weight) * scales[rows][:, columns]
