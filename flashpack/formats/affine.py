"""The numpy meaning of the ``affine`` encoding (normative, SPEC.md section 6) and its baseline quantizer.

A row of I values is cut into groups of ``group_size``; a value is ``w = q * scale + bias`` with one scale and one
bias per group and ``q`` an unsigned integer of 2, 3, 4, 5, 6 or 8 bits. The integers of a row form one
little-endian bit stream, value i at bits [i*bits, (i+1)*bits), seen as uint32 words. This is MLX's layout, so
MLX checkpoints are carried over word by word.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashpack.formats import starts
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
    grouped = values.reshape(*values.shape[:-1], -1, group_size)
    # The caller sees input that is not finite, or too large, by the infinity or NaN it decodes to.
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = extremes(grouped)
        scales = from_float32((high - low) / np.float32(2**bits - 1), scale_dtype)
        biases = from_float32(low, scale_dtype)
        codes, decoded = _round(grouped, scales, biases, bits, scale_dtype)
    words = pack_bits(codes.reshape(values.shape), bits)
    return words, scales, biases, decoded.reshape(values.shape)


def quantize_starts(
    values: NDArray[np.float32], bits: int, group_size: int, scale_dtype: str
) -> tuple[NDArray[np.uint32], NDArray[np.generic], NDArray[np.generic], NDArray[np.float32]]:
    """As ``quantize``, but with the scale and bias of the least squared error that a search finds ("starts").

    Each group begins with what ``quantize`` gives it. Each of its two ``starts.fits``, in order, then takes its place
    if that makes the group's squared error smaller (by ``starts.lane_sum``, of decoded minus source): the fit's scale
    is rounded to ``scale_dtype``, the bias is fitted to that, ``(total - scale * codes) / n + middle``, and rounded
    too, and the codes are chosen for these two.
    """
    grouped = values.reshape(*values.shape[:-1], -1, group_size)
    words, scales, biases, decoded = quantize(values, bits, group_size, scale_dtype)
    codes = unpack_bits(words, bits).reshape(grouped.shape)
    decoded = decoded.reshape(grouped.shape)
    n = np.float32(group_size)
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        error = starts.lane_sum(np.square(decoded - grouped))
        low, high = extremes(grouped)
        middle = low * np.float32(0.5) + high * np.float32(0.5)
        y = grouped - middle[..., None]
        total = starts.lane_sum(y)
        for fit in starts.fits(y, total, low - middle, high - middle, bits, starts.AFFINE_ROUNDS):
            scale = from_float32(fit.scale, scale_dtype)
            bias: Any = (total - to_float32(scale, scale_dtype) * fit.codes) / n + middle
            found = (scale, from_float32(bias, scale_dtype))
            better_codes, better = _round(grouped, *found, bits, scale_dtype)
            smaller = starts.lane_sum(np.square(better - grouped))
            take = smaller < error
            error = np.where(take, smaller, error)
            scales, biases = np.where(take, found[0], scales), np.where(take, found[1], biases)
            codes = np.where(take[..., None], better_codes, codes)
            decoded = np.where(take[..., None], better, decoded)
    words = pack_bits(codes.reshape(values.shape), bits)
    return words, scales, biases, decoded.reshape(values.shape)


def extremes(grouped: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Minimum and maximum of each group.

    Which of -0 and +0 is the smaller depends on numpy's code for the CPU; adding +0 leaves +0 only.
    """
    return grouped.min(axis=-1) + np.float32(0), grouped.max(axis=-1) + np.float32(0)


def _round(
    grouped: NDArray[np.float32], scales: NDArray[np.generic], biases: NDArray[np.generic], bits: int, scale_dtype: str
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The codes nearest to [..., n], ``clip(rint((w - bias) / scale))`` where NaN counts as 0, and what they decode to.

    A constant group has scale 0: every code is then 0 and the group decodes to its bias.
    """
    scale = to_float32(scales, scale_dtype)[..., None]
    bias = to_float32(biases, scale_dtype)[..., None]
    wide = grouped - bias
    wide /= np.where(scale == 0, np.float32(1), scale)
    np.rint(np.fmin(np.fmax(wide, np.float32(0)), np.float32(2**bits - 1)), out=wide)
    codes = wide.astype(np.uint8)
    wide *= scale
    wide += bias
    return codes, wide
