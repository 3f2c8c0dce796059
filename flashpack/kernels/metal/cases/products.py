"""Products with matrices of every encoding, and rows of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flashpack.formats.records import Encoding
from flashpack.kernels.interface import Kernels, StoredMatrix
from flashpack.kernels.metal.cases.case import DECODED, PRODUCT, REFERENCE, SAME, Case, Pairs
from flashpack.kernels.metal.cases.samples import ENCODINGS, MANY, ODD_WIDTH, ROWS, WIDTH, Samples, to


@dataclass(frozen=True)
class Product:
    """``tokens`` times a matrix."""

    encoding: Encoding
    tokens: int
    tolerance: ClassVar = PRODUCT
    alone: ClassVar = True

    @property
    def name(self) -> str:
        return f"product, {self.encoding}, {self.tokens} tokens"

    def run(self, kernels: Kernels) -> Pairs:
        matrix, x = _operands(self.encoding, self.tokens)
        return [(_linear(kernels, x, matrix), REFERENCE.linear(x, matrix))]


@dataclass(frozen=True)
class Company:
    """A token's product with a matrix, computed alone and beside others: the same bits."""

    encoding: Encoding
    tolerance: ClassVar = SAME
    alone: ClassVar = False

    @property
    def name(self) -> str:
        return f"product alone and beside others, {self.encoding}"

    def run(self, kernels: Kernels) -> Pairs:
        matrix, x = _operands(self.encoding, MANY)
        together = _linear(kernels, x, matrix)
        return [(_linear(kernels, x[i : i + 1], matrix), together[i : i + 1]) for i in (0, 4, MANY - 1)]


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix, by number."""

    encoding: Encoding
    tolerance: ClassVar = DECODED
    alone: ClassVar = True

    @property
    def name(self) -> str:
        return f"rows, {self.encoding}"

    def run(self, kernels: Kernels) -> Pairs:
        matrix, _ = _operands(self.encoding, 1)
        ids = torch.tensor([[0, ROWS - 1, 3], [3, 17, 64]])
        found = kernels.embedding(ids.to(kernels.device), to(kernels.device, matrix), torch.float32)
        return [(found.cpu(), REFERENCE.embedding(ids, matrix, torch.float32))]


def _operands(encoding: Encoding, tokens: int) -> tuple[Tensor | StoredMatrix, Tensor]:
    samples = Samples(encoding.bits + encoding.group_size)
    width = WIDTH if encoding.group_size else ODD_WIDTH
    return samples.matrix(encoding, ROWS, width), samples.normal(tokens, width)


def _linear(kernels: Kernels, x: Tensor, matrix: Tensor | StoredMatrix) -> Tensor:
    return kernels.linear(x.to(kernels.device), to(kernels.device, matrix)).cpu()


def cases() -> Iterator[Case]:
    for encoding in ENCODINGS:
        yield Product(encoding, 1)
        yield Product(encoding, MANY)
        yield Rows(encoding)
        yield Company(encoding)
