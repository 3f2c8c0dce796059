"""The stored tensors of a checkpoint, taken one by one: what nothing takes is left over, never lost."""

from __future__ import annotations

import math

from flashpack.converter.tensor import Extent, Packed, SourceTensor
from flashpack.errors import FormatError, SourceError, UnsupportedError
from flashpack.formats.dtypes import ITEMSIZE
from flashpack.formats.records import Encoding


class Parts:
    """The stored tensors by name; ``used`` are those that belong to a tensor of the model."""

    def __init__(self, stored: dict[str, Extent]) -> None:
        self.stored = stored
        self.used: set[str] = set()

    def find(self, *names: str) -> str | None:
        """The first of these names that is stored."""
        return next((name for name in names if name in self.stored), None)

    def take(self, name: str) -> Extent | None:
        """A stored tensor, which is used now."""
        if name in self.stored:
            self.used.add(name)
        return self.stored.get(name)

    def need(self, name: str, of: str, *dtypes: str) -> Extent:
        """A stored tensor that ``of`` cannot do without, of one of these types."""
        extent = self.take(name)
        if extent is None:
            raise SourceError(f"tensor {of}: {name} is missing; the checkpoint is incomplete")
        return check_dtype(name, extent, *dtypes)


def check_dtype(name: str, extent: Extent, *dtypes: str) -> Extent:
    """``extent``, if it is of one of these types."""
    if extent.dtype not in dtypes:
        raise UnsupportedError(f"tensor {name} is stored as {extent.dtype}; supported here: {', '.join(dtypes)}")
    return extent


def check_shape(name: str, extent: Extent, shape: tuple[int, ...], why: str) -> Extent:
    """``extent``, if it has this shape; ``why`` says what needs it."""
    if extent.shape != shape:
        raise SourceError(f"tensor {name} has shape {list(extent.shape)}; {why} needs {list(shape)}")
    return extent


def packed(
    name: str, label: str, encoding: Encoding, shape: tuple[int, ...], found: dict[str, tuple[str, Extent]]
) -> SourceTensor:
    """A tensor of ``shape`` whose stored parts are those of ``encoding``, byte for byte.

    ``found``: part -> name and extent in the source, of the encoding's type or one of the same size. In a stack
    [E, rows, width], a single value may stand for all matrices.
    """
    try:
        needed = encoding.parts(shape)
    except FormatError as e:
        raise UnsupportedError(f"tensor {name}: {e}") from e
    parts = {}
    for part, (dtype, wanted) in needed.items():
        source, extent = found[part]
        if len(shape) > 2 and shape[0] > 1 and math.prod(extent.shape) == 1:
            wanted = wanted[1:]
        if extent.nbytes != math.prod(wanted) * ITEMSIZE[dtype]:
            raise SourceError(
                f"tensor {source} has shape {list(extent.shape)}; {label} values of shape {list(shape)} need "
                f"{list(wanted)}"
            )
        parts[part] = extent.view(dtype, *wanted)
    return SourceTensor(name, shape, Packed(label, encoding), parts)
