"""The dense part: mapped tensors in place of parameters, packed modules in place of Linear and Embedding.

Stored weights stay in the mapped file; for another device than the processor the files are read into memory of that
device, as they are. What is not of the model's type is widened per operation, never copied
whole, except small parameters (norms, biases, convolutions), which are converted once.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from flashpack.errors import FormatError
from flashpack.formats import Pack
from flashpack.formats.entries import Matrix
from flashpack.formats.files import pread_into
from flashpack.kernels import Kernels, StoredMatrix
from flashpack.skeleton import ExpertsModule, matrix_module, tied_names

SMALL_BYTES = 2**17
"""Parameters up to this size are converted to the model's type once, larger ones at each use."""

_READ_BYTES = 64 * 2**20
"""Read at a time for another device than the processor."""

_TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "U32": torch.int32,
}


class PackedLinear(nn.Module):
    """``nn.Linear`` over a stored matrix [out, in]."""

    def __init__(self, kernels: Kernels, weight: Tensor | StoredMatrix, dtype: torch.dtype) -> None:
        super().__init__()
        self._kernels = kernels
        self._dtype = dtype
        self.matrix = weight
        self.out_features, self.in_features = weight.shape
        self.bias: nn.Parameter | None = None

    @property
    def weight(self) -> Tensor:
        """The values [out, in], decoded at each use: some models multiply by small projections themselves."""
        device = (self.matrix if isinstance(self.matrix, Tensor) else self.matrix.weight).device
        return self._kernels.embedding(torch.arange(self.out_features, device=device), self.matrix, self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y = self._kernels.linear(x, self.matrix)
        return y if self.bias is None else y + self.bias


class PackedEmbedding(nn.Module):
    """``nn.Embedding`` over a stored matrix [vocabulary, hidden]."""

    def __init__(self, kernels: Kernels, weight: Tensor | StoredMatrix, dtype: torch.dtype) -> None:
        super().__init__()
        self._kernels = kernels
        self._dtype = dtype
        self.matrix = weight
        self.num_embeddings, self.embedding_dim = weight.shape

    @property
    def weight(self) -> Tensor:
        """Without values: some models ask their embedding for its device and type."""
        stored = self.matrix if isinstance(self.matrix, Tensor) else self.matrix.weight
        return torch.empty(0, dtype=self._dtype, device=stored.device)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., hidden]."""
        return self._kernels.embedding(ids, self.matrix, self._dtype)


class _Widen(nn.Module):
    """A parametrization: the parameter appears in ``dtype`` whenever the model reads it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, stored: Tensor) -> Tensor:
        return stored.to(self._dtype)


def as_stored(module: nn.Module, name: str) -> Any:
    """A parameter of ``module`` in the type in which it is stored; None if there is none."""
    if parametrize.is_parametrized(module, name):
        modules: Any = module.parametrizations
        return modules[name].original
    return getattr(module, name, None)


def check(model: PreTrainedModel, pack: Pack, sites: list[ExpertsModule]) -> None:
    """Compare names and shapes of the meta-device ``model`` with the dense tensors of the manifest; reads no data.

    Raises ``FormatError`` if they do not agree.
    """
    experts = {f"{site.name}.{name}" for site in sites for name in site.parameters}
    matrices = {m.name: m for m in pack.manifest.matrices}
    tied = tied_names(model)
    used: set[str] = set()
    for name, parameter in model.state_dict().items():
        if name in experts:
            continue
        stored = tied.get(name, name)
        matrix = matrices.get(stored)
        names = matrix.tensor_names().values() if matrix else [stored]
        for n in names:
            if n not in pack.tensors:
                raise FormatError(f"{pack.folder}: lacks tensor {n}")
        shape = matrix.shape if matrix else pack.tensors[stored].shape
        if shape != tuple(parameter.shape):
            raise FormatError(
                f"{pack.folder}: {stored} has shape {list(shape)}, the model needs {list(parameter.shape)}"
            )
        if matrix and matrix_module(model, name) is None:
            raise FormatError(f"{pack.folder}: {name} is quantized, but the model computes with it directly")
        used.update(names)
    unused = set(pack.tensors) - used
    if unused:
        raise FormatError(f"{pack.folder}: tensor {sorted(unused)[0]} has no place in {type(model).__name__}")


def fill(model: PreTrainedModel, pack: Pack, sites: list[ExpertsModule], kernels: Kernels, dtype: torch.dtype) -> None:
    """Give every parameter of the meta-device ``model`` its stored values; the experts' are removed.

    ``check`` comes first.
    """
    for site in sites:
        for name in site.parameters:
            delattr(site.module, name)
    matrices = {m.name: m for m in pack.manifest.matrices}
    tied = tied_names(model)
    stored = _Stored(pack, kernels)
    modules: dict[str, nn.Module] = {}
    for name in list(model.state_dict()):
        value = stored.value(matrices.get(tied.get(name, name)), tied.get(name, name))
        module = matrix_module(model, name)
        if isinstance(module, nn.Linear):
            if isinstance(value, StoredMatrix):
                value = replace(value, coarse=_coarse(model, name))
            modules[name] = PackedLinear(kernels, value, _parameter_dtype(model, name, dtype))
        elif module is not None:
            modules[name] = PackedEmbedding(kernels, value, dtype)
        else:
            assert isinstance(value, Tensor)
            _set_parameter(model, name, value, _parameter_dtype(model, name, dtype))
    for name, module in modules.items():
        stem = name.removesuffix(".weight")
        old = model.get_submodule(stem)
        if isinstance(module, PackedLinear) and isinstance(old, nn.Linear):
            module.bias = old.bias  # set above, as a parameter of its own
        model.set_submodule(stem, module.eval())
    for module in model.modules():  # computed buffers
        module._buffers = {n: None if b is None else b.to(kernels.device) for n, b in module._buffers.items()}
    model.requires_grad_(False)


def _coarse(model: PreTrainedModel, name: str) -> bool:
    """Whether what a matrix is multiplied with may be rounded as it is for experts (``StoredMatrix.coarse``).

    Not for the head, whose results are the model's. And not in recurrent layers, which hold convolutions: their states
    add up what a prompt's tokens are rounded by, and random ones make hundreds of times as much of it.
    """
    holder, _, leaf = name.removesuffix(".weight").rpartition(".")
    model_: Any = model
    module = model.get_submodule(holder)
    recurrent = any(isinstance(m, nn.Conv1d) for m in module.children())
    return not recurrent and getattr(module, leaf) is not model_.get_output_embeddings()


class _Stored:
    """The dense files of a pack for kernels: mapped where these compute on the processor, else read file by file."""

    def __init__(self, pack: Pack, kernels: Kernels) -> None:
        self._pack, self._kernels = pack, kernels
        self._files: dict[str, Tensor] = {}

    def value(self, matrix: Matrix | None, name: str) -> Tensor | StoredMatrix:
        """The stored value of a parameter."""
        if matrix is None:
            return self._tensor(name)
        return StoredMatrix.of(matrix.encoding, {part: self._tensor(n) for part, n in matrix.tensor_names().items()})

    def _tensor(self, name: str) -> Tensor:
        if not self._kernels.asynchronous:
            return _mapped(self._pack, name)
        entry = self._pack.tensors[name]
        file = self._files.get(entry.path)
        if file is None:
            file = self._files[entry.path] = self._read(entry.path)
        data = file[entry.offset : entry.offset + entry.nbytes]
        return data.view(_TORCH[entry.dtype]).view(entry.shape)

    def _read(self, path: str) -> Tensor:
        size = self._pack.files[path].size
        place = self._kernels.arena(size)
        fd = self._pack.open_dense(path)
        try:
            for start in range(0, size, _READ_BYTES):
                room = place.room(start, min(_READ_BYTES, size - start))
                pread_into(fd, room, start, f"{self._pack.folder}/{path}")
                place.landed(start, room)
        finally:
            os.close(fd)
        return place.tensor


def _mapped(pack: Pack, name: str) -> Tensor:
    """A stored tensor over the mapped file; U32 words as int32, which torch has shifts for."""
    array = pack.map_tensor(name)
    dtype = pack.tensors[name].dtype
    with warnings.catch_warnings():
        # The mapping is read-only and so must the tensor be: nothing here writes to weights.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        if dtype == "U32":
            return torch.from_numpy(array.view("<i4"))
        if dtype == "BF16":
            return torch.from_numpy(array.view("<i2")).view(torch.bfloat16)
        return torch.from_numpy(array)


def _parameter_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type transformers would load a parameter in: the model's, but float32 where the class insists."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    keep = (getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    parts = name.split(".")
    return torch.float32 if any(k in parts for k in (*strict, *keep)) else dtype


def _set_parameter(model: PreTrainedModel, name: str, value: Tensor, dtype: torch.dtype) -> None:
    stem, _, leaf = name.rpartition(".")
    module = model.get_submodule(stem)
    if not value.is_floating_point():
        dtype = value.dtype  # tables of indices
    widen = value.dtype != dtype and value.nbytes > SMALL_BYTES
    if value.dtype != dtype and not widen:
        value = value.to(dtype)
    if leaf in module._buffers:
        module._buffers[leaf] = value.to(dtype)
        return
    module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    if widen:
        parametrize.register_parametrization(module, leaf, _Widen(dtype), unsafe=True)
