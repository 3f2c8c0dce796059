"""The numpy meaning of the ``affine`` encoding (normative, SPEC.md section 6) and its baseline quantizer.

A row of I values is cut into groups of ``group_size``; a value is ``w = q * scale + bias`` with one scale and one
bias per group and ``q`` an unsigned integer of 2, 3, 4, 5, 6 or 8 bits. The integers of a row form one
little-endian bit stream, value i at bits [i*bits, (i+1)*bits), seen as uint32 words. This is MLX's layout, so
MLX checkpoints are carried over word by word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flashpack.formats.dtypes import from_float32, to_float32


def pack_bits(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """uint8 [..., I] with values < 2**bits -> uint32 [..., I*bits/32]. I must be a multiple of 32."""
    lead = codes.shape[:-1]
    stream: NDArray[np.uint8]
    if bits == 8:
        stream = np.ascontiguousarray(codes)
    elif bits == 4:
        stream = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    elif bits == 2:
        stream = codes[..., 0::4].copy()
        for i in (1, 2, 3):
            stream |= codes[..., i::4] << np.uint8(2 * i)
    else:  # 8 values fill exactly `bits` bytes
        eight = codes.reshape(*lead, -1, 8).astype(np.uint64)
        word = np.zeros(eight.shape[:-1], dtype="<u8")
        for i in range(8):
            word |= eight[..., i] << np.uint64(bits * i)
        stream = word[..., None].view(np.uint8)[..., :bits]
    return np.ascontiguousarray(stream).reshape(*lead, -1).view("<u4")


def unpack_bits(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """uint32 [..., W] -> uint8 [..., W*32/bits]; the inverse of ``pack_bits``."""
    lead = words.shape[:-1]
    stream = np.ascontiguousarray(words).view(np.uint8)
    mask = np.uint8((1 << bits) - 1)
    if bits in (2, 4, 8):
        parts = [(stream >> np.uint8(shift)) & mask for shift in range(0, 8, bits)]
        return np.stack(parts, axis=-1).reshape(*lead, -1)
    chunks = stream.reshape(*lead, -1, bits)
    word = np.zeros((*chunks.shape[:-1], 8), dtype=np.uint8)
    word[..., :bits] = chunks
    eight = word.view("<u8")
    shifts = np.arange(8, dtype=np.uint64) * np.uint64(bits)
    codes: NDArray[np.uint8] = ((eight >> shifts) & np.uint64(mask)).astype(np.uint8)
    return codes.reshape(*lead, -1)


def dequantize(
    words: NDArray[np.uint32],
    scales: NDArray[np.generic],
    biases: NDArray[np.generic],
    bits: int,
    group_size: int,
    scale_dtype: str,
) -> NDArray[np.float32]:
    """Stored arrays (uint32 [..., I*bits/32]; scales and biases [..., I/group_size] as stored) -> float32 [..., I].

    The product is rounded to float32 before the bias is added.
    """
    codes = unpack_bits(words, bits)
    grouped = codes.reshape(*codes.shape[:-1], -1, group_size).astype(np.float32)
    grouped *= to_float32(scales, scale_dtype)[..., None]
    grouped += to_float32(biases, scale_dtype)[..., None]
    return grouped.reshape(codes.shape)


def quantize(
    values: NDArray[np.float32], bits: int, group_size: int, scale_dtype: str
) -> tuple[NDArray[np.uint32], NDArray[np.generic], NDArray[np.generic], NDArray[np.float32]]:
    """Round to nearest between each group's minimum and maximum ("minmax").

    ``bias = min`` and ``scale = (max - min) / (2**bits - 1)``, both rounded to ``scale_dtype`` first; then
    ``q = clip(rint((w - bias) / scale))``. A minimum or maximum of -0 counts as +0. Only exactly rounded elementwise
    float32 operations are used, so the result is the same on every CPU. ``values`` is float32 [..., I], finite, I a
    multiple of ``group_size``.

    Returns words uint32 [..., I*bits/32], scales and biases [..., I/group_size] as stored, and the decoded
    values float32 [..., I].
    """
    levels = np.float32(2**bits - 1)
    grouped = values.reshape(*values.shape[:-1], -1, group_size)
    # The caller sees input that is not finite, or too large, by the infinity or NaN it decodes to.
    with np.errstate(invalid="ignore", over="ignore"):
        # Which of -0 and +0 is the smaller depends on numpy's code for the CPU; adding +0 leaves +0 only.
        low = grouped.min(axis=-1) + np.float32(0)
        span = (grouped.max(axis=-1) + np.float32(0)) - low
        scales = from_float32(span / levels, scale_dtype)
        biases = from_float32(low, scale_dtype)
        scale = to_float32(scales, scale_dtype)[..., None]
        bias = to_float32(biases, scale_dtype)[..., None]
        codes = grouped - bias
        # A constant group has scale 0: every code is then 0 and the group decodes to its bias.
        codes /= np.where(scale == 0, np.float32(1), scale)
        np.rint(codes, out=codes)
        np.clip(codes, 0, levels, out=codes)
        words = pack_bits(codes.astype(np.uint8).reshape(values.shape), bits)
        codes *= scale
        codes += bias
    return words, scales, biases, codes.reshape(values.shape)
