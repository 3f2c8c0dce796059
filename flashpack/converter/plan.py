"""From a bound checkpoint to the exact contents of the pack: pure, printable, executed later.

A plan says for every record and dense tensor where its bytes come from and how they will be stored. ``--dry-run``
prints it; ``execute`` carries it out.
"""

from __future__ import annotations

import math
import platform
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from threading import Semaphore
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashpack.converter.folder import GGUF
from flashpack.converter.names import Bindings
from flashpack.converter.options import CALIBRATED, CANDIDATES, QUANTIZERS, Options, by_projection, encoding_of
from flashpack.converter.source import Checkpoint
from flashpack.converter.stack import ExpertStack
from flashpack.converter.tensor import SourceTensor
from flashpack.formats import constants as C
from flashpack.formats.calibration import Calibration, open_calibration
from flashpack.formats.entries import Layer, Matrix
from flashpack.formats.header import TensorSpec
from flashpack.formats.layout import ShardLayout, dense_header, dense_spec
from flashpack.formats.records import PROJECTIONS, Encoding, Projection, RecordKind
from flashpack.skeleton import ExpertsModule, matrix_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flashpack.converter.allocation import Allocation
    from flashpack.converter.calibrated import LayerCalibration

ROUNDED_EXPERTS, ROUNDED_DENSE = "q4", "q8"
"""What values are rounded to where neither the source nor the user says otherwise."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

DENSE_FILE_BYTES = 4 * 2**30
"""A dense file is closed when it reaches this size, so that an interrupted conversion keeps the earlier ones."""


@dataclass(frozen=True)
class LayerPlan:
    """One shard: the layer, each expert's record kind, and the source of each projection and bias ("gate", "gate.bias",
    ...).

    ``numbers``: each expert's kind among ``Plan.kinds``. ``quantizer``: how values are rounded, but for those that are
    ``calibrated``, which ``calibration`` begins.
    """

    layer: Layer
    kinds: tuple[RecordKind, ...]
    numbers: tuple[int, ...]
    sources: dict[str, ExpertStack]
    quantizer: str
    calibration: Callable[[], LayerCalibration] | None = field(default=None, compare=False)

    @cached_property
    def calibrated(self) -> LayerCalibration | None:
        """What the layer's experts were given, if that decides how they are rounded."""
        return self.calibration() if self.calibration else None

    def weights(self) -> list[tuple[int, Encoding]]:
        """(number of values, encoding) of all matrices, those of one encoding together."""
        counts: dict[Encoding, int] = {}
        for kind, count in Counter(self.kinds).items():
            for p in kind.projections:
                counts[p.encoding] = counts.get(p.encoding, 0) + count * math.prod(p.shape)
        return [(n, encoding) for encoding, n in counts.items()]

    def table(self) -> NDArray[np.uint32]:
        """[experts, 2] rows (kind, row), as the shard has it."""
        rows: Counter[int] = Counter()
        table = np.empty((len(self.numbers), 2), dtype="<u4")
        for expert, number in enumerate(self.numbers):
            table[expert] = number, rows[number]
            rows[number] += 1
        return table


@dataclass(frozen=True)
class DensePlan:
    """One dense tensor or matrix: source and target encoding; parts that are stored, in order."""

    name: str
    source: SourceTensor
    encoding: Encoding
    quantizer: str

    def tensor_names(self) -> dict[str, str]:
        """Part -> name of the stored tensor."""
        if not self.encoding.quantized:
            return {"weight": self.name}
        return Matrix(self.name, (self.source.shape[0], self.source.shape[1]), self.encoding).tensor_names()

    def specs(self) -> list[TensorSpec]:
        """The stored tensors, in order."""
        names = self.tensor_names()
        parts = self.encoding.parts(self.source.shape)
        return [dense_spec(names[part], dtype, shape) for part, (dtype, shape) in parts.items()]


@dataclass
class Plan:
    """Everything a conversion will do."""

    checkpoint: Checkpoint
    options: Options
    model: dict[str, Any]
    recipe: dict[str, Any]
    source_format: str
    allocation: Allocation | None = None
    calibration: Calibration | None = None
    calibrating: Semaphore | None = None
    """As many experts as may be calibrated at once."""
    kinds: list[RecordKind] = field(default_factory=list)
    layers: list[LayerPlan] = field(default_factory=list)
    dense_files: dict[str, list[DensePlan]] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def dense(self) -> list[DensePlan]:
        return [t for tensors in self.dense_files.values() for t in tensors]

    def file_sizes(self) -> dict[str, int]:
        """Size of every file the conversion writes, except the manifest; an upper bound if compressed. Bytes."""
        kinds = tuple(self.kinds)
        sizes = {p.layer.path: ShardLayout.largest(p.layer, kinds).size for p in self.layers}
        for path, tensors in self.dense_files.items():
            specs = [s for t in tensors for s in t.specs()]
            sizes[path] = dense_header(specs, path)[1].size
        for name in self.copies:
            sizes[name] = self.checkpoint.folder.size(name)
        return sizes

    def rounded_weights(self) -> int:
        """Values of experts that are not carried over."""
        return sum(
            count * math.prod(projection.shape)
            for p in self.layers
            for kind, count in Counter(p.kinds).items()
            for projection in kind.projections
            if p.sources[projection.name].matrix(0).encoding != projection.encoding
        )

    def calibrated_at_once(self) -> tuple[int, int]:
        """How many experts ``calib_memory`` holds while they are calibrated (one goes even if it does not), and the
        bytes that each takes at most."""
        from flashpack.converter.calibrated import expert_bytes

        each = max(expert_bytes({p.name: p.shape for p in kind.projections}) for kind in self.kinds)
        return max(1, self.options.calib_memory // each), each

    def source_bytes(self) -> dict[str, int]:
        """Bytes of the source behind each shard and dense file."""
        sizes = {
            # The experts of a layer are alike.
            p.layer.path: p.layer.experts * sum(s.matrix(0).nbytes for s in p.sources.values())
            for p in self.layers
        }
        for path, tensors in self.dense_files.items():
            sizes[path] = sum(t.source.nbytes for t in tensors)
        return sizes

    def projections(self, sources: dict[str, ExpertStack], chosen: dict[str, str]) -> list[Projection]:
        """The matrices of an expert, for a choice by projection."""
        found = []
        for name in PROJECTIONS:
            if name in sources:
                source = sources[name].matrix(0)
                shape = (source.shape[0], source.shape[1])
                encoding = _choose(self, chosen[name], source, f"experts' {name} projection", ROUNDED_EXPERTS)
                bias = ""
                if f"{name}.bias" in sources:
                    bias = _kept(sources[f"{name}.bias"].matrix(0)).dtype
                found.append(Projection(name, shape, encoding, bias))
        return found

    def notice(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)


def make_plan(
    checkpoint: Checkpoint,
    options: Options,
    model: PreTrainedModel,
    sites: list[ExpertsModule],
    bindings: Bindings,
    source_format: str,
    allocation: Allocation | None = None,
) -> Plan:
    """Choose encodings, lay out records and dense files. Reads no tensor data.

    Where ``options`` ask for a width of each expert, ``allocation`` says which; without it all get the narrowest.
    """
    import transformers

    quantized = source_format != "plain"
    recipe = {
        "experts": _resolve(options.experts, quantized, ROUNDED_EXPERTS),
        "dense": _resolve(options.dense, quantized, ROUNDED_DENSE),
        "group_size": options.group_size,
        "quantizer": options.quantizer,
        "source_format": source_format,
    }
    if options.bpw:
        recipe |= {"experts": "mixed", "bpw": options.bpw, "allocation": allocation.digest if allocation else ""}
    identity = {
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        "name_schema": C.NAME_SCHEMA,
        "transformers": transformers.__version__,
    }
    calibration = None
    if options.calib:
        widths = {site.layer: site.projections()["up"][1] for site in sites}
        calibration = open_calibration(options.calib, type(model).__name__, widths)
        recipe |= {"calibration": calibration.digest, "producer": _producer()}
    plan = Plan(checkpoint, options, identity, recipe, source_format, allocation, calibration)
    plan.copies = checkpoint.copied_files()
    if not any(name in plan.copies for name in _TOKENIZERS):
        plan.notice("the checkpoint has no tokenizer: its pack will answer no prompt, only token ids from Python")
    if checkpoint.tensors is None and any(name.endswith(GGUF) for name in checkpoint.folder.files()):
        plan.notice("the folder's GGUF files are not read; name one of them to convert it")
    plan.dropped = bindings.dropped
    for name in bindings.initialized:
        plan.notice(f"the checkpoint lacks {name}, as it may; stored as transformers initializes it")
    for site in sites:
        _plan_layer(plan, site, bindings.experts[site.name])
    if calibration is not None:
        plan.calibrating = Semaphore(plan.calibrated_at_once()[0])
    _plan_dense(plan, model, sites, bindings.dense)
    if quantized and (recipe["experts"] != "source" or recipe["dense"] != "source"):
        plan.notice("the source is quantized already: an explicit width rounds its values a second time")
    return plan


def _resolve(choice: str, quantized: bool, default: str) -> str:
    if choice != "auto":
        return choice
    return "source" if quantized else default


def _plan_layer(plan: Plan, site: ExpertsModule, sources: dict[str, ExpertStack]) -> None:
    known: dict[tuple[str, ...], RecordKind] = {}

    def kind_for(chosen: dict[str, str]) -> RecordKind:
        key = tuple(chosen[name] for name in PROJECTIONS)
        if key not in known:
            known[key] = RecordKind(tuple(plan.projections(sources, chosen)))
        return known[key]

    if plan.allocation is not None:
        kinds = [kind_for(widths) for widths in plan.allocation.layers[site.layer]]
    else:
        chosen = CANDIDATES[0] if plan.options.bpw else plan.recipe["experts"]
        kinds = [kind_for(by_projection(chosen))] * site.num_experts
    for kind in known.values():
        if kind not in plan.kinds:
            plan.kinds.append(kind)
    numbers = tuple(map(plan.kinds.index, kinds))
    layer = Layer(
        site.layer,
        site.name,
        f"{C.EXPERTS_FOLDER}/layer-{site.layer:04}.safetensors",
        tuple(sorted(Counter(numbers).items())),
        plan.options.codec,
    )
    plan.layers.append(LayerPlan(layer, tuple(kinds), numbers, sources, _uncalibrated(plan), _calibration(plan, site)))


def _calibration(plan: Plan, site: ExpertsModule) -> Callable[[], LayerCalibration] | None:
    opened = plan.calibration
    if opened is None:
        return None

    def begin() -> LayerCalibration:
        from flashpack.converter.calibrated import LayerCalibration

        refined = plan.recipe["quantizer"] == QUANTIZERS["max"]
        return LayerCalibration(opened.layer(site.layer), site.activation(), refined, _device(), plan.calibrating)

    return begin


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _producer() -> str:
    """What calibrated bytes depend on beside source and recipe."""
    import torch

    return f"torch {torch.__version__.partition('+')[0]}, {_device()}, {platform.machine()}"


def _uncalibrated(plan: Plan) -> str:
    """The quantizer of what no calibration is for."""
    quantizer: str = plan.recipe["quantizer"]
    return QUANTIZERS["default"] if quantizer in CALIBRATED else quantizer


def _plan_dense(plan: Plan, model: PreTrainedModel, sites: list[ExpertsModule], dense: dict[str, SourceTensor]) -> None:
    files: list[list[DensePlan]] = [[]]
    size = 0
    for name, source in dense.items():
        tensor = DensePlan(name, source, _dense_encoding(plan, model, sites, name, source), _uncalibrated(plan))
        nbytes = sum(s.nbytes for s in tensor.specs())
        if files[-1] and size + nbytes > DENSE_FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += nbytes
    plan.dense_files = {f"dense-{i:05}.safetensors": tensors for i, tensors in enumerate(files, 1)}


def _dense_encoding(
    plan: Plan, model: PreTrainedModel, sites: list[ExpertsModule], name: str, source: SourceTensor
) -> Encoding:
    if matrix_module(model, name) is None or source.add:
        # A parameter that the model computes with directly: stored plain. Decoding to float32 loses nothing.
        exact = source.encoding is not None and not source.encoding.quantized
        return _kept(source) if exact else Encoding("raw", "F32")
    if not _worth_quantizing(sites, name, source.shape):
        return _kept(source)
    return _choose(plan, plan.recipe["dense"], source, re.sub(r"\.\d+\.", ".*.", name), ROUNDED_DENSE)


def _worth_quantizing(sites: list[ExpertsModule], name: str, shape: tuple[int, ...]) -> bool:
    """Big matrices are; routers, and gates with few outputs, keep their type: they decide much and weigh little."""
    rows, width = shape
    blocks = {site.name.rpartition(".")[0]: site for site in sites}
    inside = re.match(r"(.+?)\.(gate|router)\.\w+\.", name)
    if inside is not None and inside[1] in blocks:
        return False  # a router that has its matrices in modules of their own
    block = blocks.get(name.removesuffix(".weight").rpartition(".")[0])
    is_router = block is not None and rows >= block.num_experts and rows < 2 * block.num_experts
    return not is_router and rows * 32 > width


def _kept(source: SourceTensor) -> Encoding:
    """The encoding that holds the source's values exactly."""
    return source.encoding or Encoding("raw", "F32")


def _choose(plan: Plan, choice: str, source: SourceTensor, what: str, rounded: str) -> Encoding:
    """The encoding for ``choice``: the largest group that divides the width, or the source's type if none does.

    ``rounded``: the choice instead of "source" where no encoding of a pack holds the source's values.
    """
    if choice == "source":
        if source.encoding is not None:
            return source.encoding
        choice = max(rounded, source.format.rounds_to)
        plan.notice(f"{what}: no encoding of a pack holds {source.format} exactly; decoded and rounded to {choice}")
    width = source.shape[-1]
    if choice.startswith("dq"):
        if width % C.DQ_GROUP == 0 and math.prod(source.shape) % C.DQ_BLOCK == 0:
            return encoding_of(choice, C.DQ_GROUP)
        plan.notice(f"{what}: {list(source.shape)} values are not blocks of {C.DQ_BLOCK}; {choice[1:]} in its place")
        choice = choice[1:]
    fits = [g for g in C.GROUP_SIZES if g <= plan.options.group_size and width % g == 0]
    if not fits:
        kept = _kept(source)
        plan.notice(f"{what}: {width} input values are no multiple of 32; kept as {kept}")
        return kept
    if fits[-1] != plan.options.group_size:
        plan.notice(f"{what}: {plan.options.group_size} does not divide {width} input values; groups of {fits[-1]}")
    return encoding_of(choice, fits[-1])


def bits_per_weight(encodings: list[tuple[int, Encoding]]) -> float:
    """Mean stored bits per value of (number of values, encoding) pairs; padding is not counted."""
    total = sum(n for n, _ in encodings)
    return sum(n * e.bits_per_weight() for n, e in encodings) / total if total else 0.0
