"""From a bound checkpoint to the exact contents of the pack: pure, printable, executed later.

A plan says for every record and dense tensor where its bytes come from and how they will be stored. ``--dry-run``
prints it; ``execute`` carries it out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashpack.converter.folder import GGUF
from flashpack.converter.names import Bindings
from flashpack.converter.source import Checkpoint
from flashpack.converter.stack import ExpertStack
from flashpack.converter.tensor import SourceTensor
from flashpack.errors import UsageError
from flashpack.formats import constants as C
from flashpack.formats.entries import Layer, Matrix
from flashpack.formats.header import TensorSpec
from flashpack.formats.layout import ShardLayout, dense_header, dense_spec
from flashpack.formats.records import PROJECTIONS, Encoding, Projection, RecordKind
from flashpack.skeleton import ExpertsModule, matrix_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERT_CHOICES = ("auto", "source", "q8", "q6", "q5", "q4", "q3", "q2")
DENSE_CHOICES = ("auto", "source", "q8", "q4")
ROUNDED_EXPERTS, ROUNDED_DENSE = "q4", "q8"
"""What values are rounded to where neither the source nor the user says otherwise."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

DENSE_FILE_BYTES = 4 * 2**30
"""A dense file is closed when it reaches this size, so that an interrupted conversion keeps the earlier ones."""


@dataclass(frozen=True)
class Options:
    """What the user may choose. ``auto`` carries a quantized source over, else q4 for experts and q8 for dense."""

    experts: str = "auto"
    dense: str = "auto"
    group_size: int = 64
    codec: str = "raw"

    def __post_init__(self) -> None:
        if self.codec not in C.CODECS:
            raise UsageError(f"--codec {self.codec}: choose from {', '.join(C.CODECS)}")
        if self.experts not in EXPERT_CHOICES:
            raise UsageError(f"--experts {self.experts}: choose from {', '.join(EXPERT_CHOICES)}")
        if self.dense not in DENSE_CHOICES:
            raise UsageError(f"--dense {self.dense}: choose from {', '.join(DENSE_CHOICES)}")
        if self.group_size not in C.GROUP_SIZES:
            raise UsageError(f"--group-size {self.group_size}: choose from {', '.join(map(str, C.GROUP_SIZES))}")


@dataclass(frozen=True)
class LayerPlan:
    """One shard: the layer, its record kind, and the source of each projection and bias ("gate", "gate.bias", ...)."""

    layer: Layer
    kind: RecordKind
    sources: dict[str, ExpertStack]


@dataclass(frozen=True)
class DensePlan:
    """One dense tensor or matrix: source and target encoding; parts that are stored, in order."""

    name: str
    source: SourceTensor
    encoding: Encoding

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
) -> Plan:
    """Choose encodings, lay out records and dense files. Reads no tensor data."""
    import transformers

    quantized = source_format != "plain"
    recipe = {
        "experts": _resolve(options.experts, quantized, ROUNDED_EXPERTS),
        "dense": _resolve(options.dense, quantized, ROUNDED_DENSE),
        "group_size": options.group_size,
        "quantizer": "minmax",
        "source_format": source_format,
    }
    identity = {
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        "name_schema": C.NAME_SCHEMA,
        "transformers": transformers.__version__,
    }
    plan = Plan(checkpoint, options, identity, recipe, source_format)
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
    _plan_dense(plan, model, sites, bindings.dense)
    if quantized and (recipe["experts"] != "source" or recipe["dense"] != "source"):
        plan.notice("the source is quantized already: an explicit width rounds its values a second time")
    return plan


def _resolve(choice: str, quantized: bool, default: str) -> str:
    if choice != "auto":
        return choice
    return "source" if quantized else default


def _plan_layer(plan: Plan, site: ExpertsModule, sources: dict[str, ExpertStack]) -> None:
    projections = []
    for name in PROJECTIONS:
        if name in sources:
            source = sources[name].matrix(0)
            shape = (source.shape[0], source.shape[1])
            encoding = _choose(plan, plan.recipe["experts"], source, f"experts' {name} projection", ROUNDED_EXPERTS)
            bias = ""
            if f"{name}.bias" in sources:
                bias = _kept(sources[f"{name}.bias"].matrix(0)).dtype
            projections.append(Projection(name, shape, encoding, bias))
    kind = RecordKind(tuple(projections))
    if kind not in plan.kinds:
        plan.kinds.append(kind)
    layer = Layer(
        site.layer,
        site.name,
        f"{C.EXPERTS_FOLDER}/layer-{site.layer:04}.safetensors",
        ((plan.kinds.index(kind), site.num_experts),),
        plan.options.codec,
    )
    plan.layers.append(LayerPlan(layer, kind, sources))


def _plan_dense(plan: Plan, model: PreTrainedModel, sites: list[ExpertsModule], dense: dict[str, SourceTensor]) -> None:
    files: list[list[DensePlan]] = [[]]
    size = 0
    for name, source in dense.items():
        tensor = DensePlan(name, source, _dense_encoding(plan, model, sites, name, source))
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
    fits = [g for g in C.GROUP_SIZES if g <= plan.options.group_size and width % g == 0]
    if not fits:
        kept = _kept(source)
        plan.notice(f"{what}: {width} input values are no multiple of 32; kept as {kept}")
        return kept
    if fits[-1] != plan.options.group_size:
        plan.notice(f"{what}: {plan.options.group_size} does not divide {width} input values; groups of {fits[-1]}")
    return Encoding("affine", "BF16", int(choice[1:]), fits[-1])


def bits_per_weight(encodings: list[tuple[int, Encoding]]) -> float:
    """Mean stored bits per value of (number of values, encoding) pairs; padding is not counted."""
    total = sum(n for n, _ in encodings)
    return sum(n * e.bits_per_weight() for n, e in encodings) / total if total else 0.0
