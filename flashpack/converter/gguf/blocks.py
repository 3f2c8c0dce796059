"""GGUF's quantized types: which become an encoding of the pack exactly, and which are decoded.

A block holds the scale of 32 values, in float16, and their integers; the first half of the values in the low halves
of its bytes, the other half in the high ones. Scales have 11 bits, so ``q * scale`` and ``zero * scale`` are exact in
float32, and the affine encoding gives the very same values: with a bias of ``-zero * scale`` for Q4_0, Q5_0 and Q8_0,
and with the stored minimum for Q4_1 and Q5_1, added and rounded in the same order.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flashpack.converter.tensor import Arrays, Plain, WeightFormat
from flashpack.converter.weights.integers import Codes, Integers
from flashpack.errors import SourceError, UnsupportedError
from flashpack.formats import affine
from flashpack.formats.records import MXFP4, Encoding

_PLAIN = ("F32", "F16", "BF16")
_ZEROS = {"Q4_0": (4, 8), "Q5_0": (5, 16), "Q8_0": (8, 128)}
_MINIMA = {"Q4_1": 4, "Q5_1": 5}
_DECODED = (
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
    "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
)  # fmt: skip
_GROUP = 32


def weight_format(kind: str, name: str) -> WeightFormat:
    """How values of the ggml type ``kind`` are stored; ``name`` is the tensor's, for errors. All have one part,
    "weight": the values, or the bytes [..., bytes of a row]."""
    if kind in _PLAIN:
        return Plain(kind)
    label = f"gguf-{kind.lower()}"
    if kind in _ZEROS:
        bits, zero = _ZEROS[kind]
        return Centred(label, bits, _GROUP, "F16", zero, Encoding("affine", "F16", bits, _GROUP))
    if kind in _MINIMA:
        return Shifted(label, _MINIMA[kind])
    if kind == "MXFP4":
        return Mxfp4()
    if kind not in _DECODED:
        raise UnsupportedError(f"tensor {name} is stored as {kind}, which is not supported")
    if importlib.util.find_spec("gguf") is None:
        raise UnsupportedError(
            f"tensor {name} is stored as {kind}, which the gguf package decodes: pip install 'flashpack-moe[gguf]'"
        )
    return Decoded(kind)


@dataclass(frozen=True)
class Centred(Integers):
    """Q4_0, Q5_0, Q8_0: a scale and integers around ``zero``."""

    def codes(self, arrays: Arrays) -> Codes:
        blocks = _blocks(arrays, {4: 18, 5: 22, 8: 34}[self.bits])
        scales = blocks[..., :2].copy().view("<f2")[..., 0].astype(np.float32)
        if self.bits == 8:
            codes = (blocks[..., 2:] ^ np.uint8(0x80)).reshape(len(blocks), -1)  # signed, seen from -128
        else:
            codes = _codes(blocks[..., 2:], self.bits)
        return Codes(affine.pack_bits(codes, self.bits), scales, np.full((1, 1), self.zero, np.float32))


@dataclass(frozen=True)
class Shifted(WeightFormat):
    """Q4_1, Q5_1: a scale, a minimum, and integers."""

    name: str
    bits: int

    @property
    def label(self) -> str:
        return self.name

    @property
    def encoding(self) -> Encoding | None:
        return Encoding("affine", "F16", self.bits, _GROUP)

    def stored(self, arrays: Arrays) -> Arrays:
        blocks = _blocks(arrays, {4: 20, 5: 24}[self.bits])
        pairs = blocks[..., :4].copy().view("<f2")
        words = affine.pack_bits(_codes(blocks[..., 4:], self.bits), self.bits)
        return {"weight": words, "scales": pairs[..., 0], "biases": pairs[..., 1]}


@dataclass(frozen=True)
class Mxfp4(WeightFormat):
    """A power of two and 32 small floats. ggml keeps them doubled, and halves the scale: the same values."""

    @property
    def label(self) -> str:
        return "gguf-mxfp4"

    @property
    def encoding(self) -> Encoding | None:
        return MXFP4

    def stored(self, arrays: Arrays) -> Arrays:
        blocks = _blocks(arrays, 17)
        scales = np.ascontiguousarray(blocks[..., 0])
        if (scales == 255).any():
            raise SourceError("an MXFP4 scale is 255, which is no number; the file is damaged")
        return {"weight": affine.pack_bits(_codes(blocks[..., 1:], 4), 4), "scales": scales}


@dataclass(frozen=True)
class Decoded(WeightFormat):
    """What no encoding of a pack holds: decoded by the gguf package."""

    kind: str

    @property
    def label(self) -> str:
        return f"gguf-{self.kind.lower()}"

    @property
    def rounds_to(self) -> str:
        return {"Q5_K": "q5", "Q6_K": "q6"}.get(self.kind, "")

    def values(self, arrays: Arrays) -> NDArray[np.float32]:
        import gguf

        with np.errstate(all="ignore"):
            values: NDArray[np.float32] = gguf.dequantize(arrays["weight"], gguf.GGMLQuantizationType[self.kind])
        return values


def _blocks(arrays: Arrays, size: int) -> NDArray[np.uint8]:
    """[rows, blocks, bytes of a block]."""
    stored = arrays["weight"].view(np.uint8)
    return stored.reshape(len(stored), -1, size)


def _codes(stored: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The integers [rows, values] of blocks without their scales: the fifth bits, if any, and 16 bytes of halves."""
    halves = stored[..., -16:]
    codes = np.concatenate([halves & np.uint8(15), halves >> np.uint8(4)], axis=-1)
    if bits == 5:
        codes |= np.unpackbits(stored[..., :4], axis=-1, bitorder="little") << np.uint8(4)
    return codes.reshape(len(stored), -1)
