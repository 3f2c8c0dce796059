"""The model class on the meta device: the converter's checklist of names and shapes, the runtime's frame.

Shared by ``converter`` and ``runtime``, which never import each other. Everything model-specific is transformers'
own: configuration, modules, names. The only structure flashpack looks for is the experts module, known by the
attributes that transformers' ``use_experts_implementation`` gives it.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashpack.errors import FlashpackError, FormatError, UnsupportedError
from flashpack.formats import constants as C
from flashpack.formats.header import parse_json

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from flashpack.kernels import Activation

_COUNT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
    "ffn_config",
)
_SAME = {"kimi_k2": "deepseek_v3", "kimi_vl": "kimi_k25"}
"""Checkpoints with code of their own whose language model is, to the letter, that of a family of transformers."""

_DROPPED = {
    "attn_implementation",
    "auto_map",
    "dtype",
    "experts_implementation",
    "id2label",
    "label2id",
    "num_labels",
    "quantization",
    "quantization_config",
    "torch_dtype",
}
_LOOPS = ("layer", "depth", "chunk")
"""Numbers named so are counts that transformers makes lists of, or pads to; names differ between families."""

_HOOK_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")


@dataclass(frozen=True)
class ExpertsModule:
    """The routed experts of one layer: module path, layer index and the shapes of its parameters.

    ``parameters``: gate_up_proj (or up_proj) [E, 2I, H] and down_proj [E, H, I], or with the last two exchanged
    (``is_transposed``); biases [E, 2I] and [E, H]. Rows of gate and up alternate unless ``is_concatenated``.
    """

    name: str
    layer: int
    module: nn.Module
    num_experts: int
    parameters: dict[str, tuple[int, ...]]
    is_transposed: bool
    is_concatenated: bool

    @property
    def has_gate(self) -> bool:
        return "gate_up_proj" in self.parameters

    @property
    def has_bias(self) -> bool:
        return "down_proj_bias" in self.parameters

    def projections(self) -> dict[str, tuple[int, int]]:
        """Shape [out, in] of each matrix of an expert: gate, up and down, or up and down."""
        first = self._shape("gate_up_proj" if self.has_gate else "up_proj")
        down = {"down": self._shape("down_proj")}
        if not self.has_gate:
            return {"up": first} | down
        half = (first[0] // 2, first[1])
        return {"gate": half, "up": half} | down

    def activation(self) -> Activation:
        """The module's own, for gate rows that come before the rows of up."""
        import torch

        from flashpack.kernels.activations import recognize

        module: Any = self.module
        function = module._apply_gate if self.has_gate else module.act_fn
        if self.has_gate and not self.is_concatenated:
            alternating = function

            def function(x: torch.Tensor) -> Any:
                return alternating(torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2))

        return recognize(function, self.has_gate, getattr(module, "limit", None))

    def _shape(self, parameter: str) -> tuple[int, int]:
        _, rows, width = self.parameters[parameter]
        return (width, rows) if self.is_transposed else (rows, width)


def read_config(folder: Path, architecture: str | None = None) -> PretrainedConfig:
    """The language model's configuration from ``folder/config.json``: that of the class ``architecture``, or else the
    first of ``language_configs``."""
    configs = language_configs(_read_json(folder), str(folder / "config.json"))
    named = (c for c in configs if any(k.__name__ == architecture for k in _writers(c)[1]))
    return next(named, configs[0])


def read_whole_config(folder: Path) -> PretrainedConfig:
    """Like ``read_config``, with the parts that are no text model (vision, audio)."""
    return _whole_config(_read_json(folder), str(folder / "config.json"))


def language_configs(data: Any, path: str) -> list[PretrainedConfig]:
    """What the language model may be built from, of the JSON of a config.json, which messages call ``path``.

    The text model's configuration first, then the whole one and its parts, where a class with eyes and ears writes
    text. Never runs code. Raises ``UnsupportedError`` for whatever transformers makes no sense of.
    """
    from transformers import PretrainedConfig

    with library_errors(path, UnsupportedError):
        whole = _whole_config(data, path)
        text = whole.get_text_config(decoder=True)
        others = [whole, *(getattr(whole, name) for name in whole.sub_configs)]
    if not isinstance(text, PretrainedConfig):
        raise UnsupportedError(f"{path}: its text_config belongs to no model_type")
    found = [text] if _writers(text)[1] else []
    found += [c for c in others if isinstance(c, PretrainedConfig) and c is not text and _writers(c)[1] and _usual(c)]
    return found or [text]


def _usual(config: PretrainedConfig) -> bool:
    """Whether the parts for images and sound are of the family's own kinds. They are made, though never used, and
    other kinds might fetch a model."""
    usual = type(config)()
    expected = {name: (kind, type(getattr(usual, name)), type(None)) for name, kind in config.sub_configs.items()}
    text = config.get_text_config(decoder=True)
    return all(getattr(config, n) is text or type(getattr(config, n)) in kinds for n, kinds in expected.items())


def _writers(config: PretrainedConfig) -> tuple[Any, tuple[type[PreTrainedModel], ...]]:
    """transformers' factory of models of ``config`` that continue text, and their classes; none: no such model."""
    import transformers
    from transformers import GenerationMixin

    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText):
        found: Any = auto._model_mapping.get(type(config), ())
        kinds: tuple[Any, ...] = found if isinstance(found, tuple) else (found,)
        if kinds and all(issubclass(k, GenerationMixin) for k in kinds):
            return auto, kinds
    return None, ()


def _read_json(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise UnsupportedError(f"{path}: missing; flashpack needs the checkpoint's config.json")
    try:
        with library_errors(str(path)):
            return parse_json(path.read_bytes(), str(path))
    except FormatError as e:
        raise UnsupportedError(str(e)) from e


def _whole_config(data: Any, path: str) -> PretrainedConfig:
    import transformers
    from transformers import CONFIG_MAPPING

    try:
        with library_errors(path):
            data = _inert(data, path)
    except FormatError as e:
        raise UnsupportedError(str(e)) from e
    kind = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(kind, str):
        raise UnsupportedError(f"{path}: names no model_type")
    if kind == "mistral" and "layer_types" in data:
        kind = "ministral"  # as transformers' AutoConfig does
    kind = _SAME.get(kind, kind)
    if kind not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"{path}: model_type {kind!r} is not supported by transformers {transformers.__version__}"
        )
    with library_errors(f"{path}: not a configuration of model_type {kind!r}", UnsupportedError):
        config: PretrainedConfig = CONFIG_MAPPING[kind].from_dict(data | {"model_type": kind})
    return config


def _inert(value: Any, what: str) -> Any:
    """The JSON of a configuration without what makes transformers fetch, import or choose code, or loop for long.

    Dropped: fields whose name starts with an underscore (transformers' own state), references to code, choices
    that flashpack makes itself, labels of classifiers. How the weights were quantized is the manifest's to say.
    """
    if isinstance(value, list):
        return [_inert(v, what) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])  # how transformers writes them
    for key, v in value.items():
        if isinstance(v, (int, float)) and abs(v) > C.MAX_LAYERS and any(k in key for k in _LOOPS):
            raise FormatError(f"{what}: {key} is {v:g}, more than {C.MAX_LAYERS}")
    return {k: _inert(v, what) for k, v in value.items() if not k.startswith("_") and k not in _DROPPED}


def build(
    config: PretrainedConfig,
    experts_implementation: str = "eager",
    dtype: torch.dtype | None = None,
    most: int | None = None,
) -> PreTrainedModel:
    """The causal language model of ``config`` with every parameter on the meta device, in ``dtype`` (float32).

    Parts for images and sound are taken out: the checkpoint's tensors for them are among those that the model ignores.
    ``most``: how many parameters there are; a configuration that asks for far more is refused while it is built.
    """
    import torch

    from flashpack.adapters import adapt

    what = f"model_type {config.model_type!r}"
    if config.is_encoder_decoder:
        raise UnsupportedError(f"{what} is an encoder with a decoder; flashpack runs decoders only")
    auto, kinds = _writers(config)
    if not kinds:
        raise UnsupportedError(f"{what} has no causal language model")
    with library_errors(f"{what} cannot be built from config.json", UnsupportedError), _at_most(most):
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(
                config, dtype=dtype or torch.float32, experts_implementation=experts_implementation
            )
        adapt(model)
        _keep_text(model)
        model.train(False)
    return model


def use_experts(model: PreTrainedModel, implementation: str) -> None:
    """Compute the experts with ``implementation``, a name in transformers' hook; stand-ins (``adapters``), too."""
    from flashpack.adapters import Experts

    model.set_experts_implementation(implementation)
    for module in model.modules():
        if isinstance(module, Experts):
            module.config._experts_implementation = implementation


def _keep_text(model: PreTrainedModel) -> None:
    """Take out what lies beside the text model: towers for images and sound, and their projections."""
    if model.config.get_text_config(decoder=True) is model.config:
        return
    whole: Any = model
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    path = next(name for name, module in model.named_modules() if module is decoder)
    removed = []
    for depth, child in enumerate(path.split(".")):
        stem = ".".join(path.split(".")[:depth])
        module = model.get_submodule(stem)
        parts = {n: m for n, m in module.named_children() if n != child and m is not head}
        for name in (*parts, *[n for n, _ in module.named_parameters(recurse=False)]):
            delattr(module, name)
            setattr(module, name, None)
            removed.append(re.escape(f"{stem}.{name}".removeprefix(".")))
    ignored: Any = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = [*ignored, *(rf"^{name}(\.|$)" for name in removed)]


@contextlib.contextmanager
def _at_most(parameters: int | None) -> Iterator[None]:
    """Stops a model's constructor of this thread when it has made many more parts than ``parameters`` explain."""
    if parameters is None:
        yield
        return
    from torch.nn.modules import module as torch_module

    thread, made, limit = threading.get_ident(), 0, 1024 + 8 * parameters

    def count(*_: Any) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > limit:
            raise UnsupportedError(
                f"config.json describes a model of more than {limit} parts, but there are {parameters} tensors"
            )

    hooks = [
        torch_module.register_module_module_registration_hook(count),
        torch_module.register_module_parameter_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def library_errors(what: str, error: type[FlashpackError] = FormatError) -> Iterator[None]:
    """Turns what a library raises over untrusted files into ``error``, in one line that begins with ``what``."""
    try:
        yield
    except FlashpackError:
        raise
    except BaseException as e:
        # A panic of the tokenizers library is no Exception.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise error(f"{what}: {type(e).__name__}: {_one_line(e)}") from e


def find_experts(model: PreTrainedModel) -> list[ExpertsModule]:
    """All experts modules, in layer order; refuses what flashpack does not understand, by name."""
    family = model.config.model_type
    found = []
    for name, module in model.named_modules():
        if not all(hasattr(module, a) for a in _HOOK_ATTRIBUTES):
            continue
        shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
        first = "gate_up_proj" if module.has_gate else "up_proj"
        expected = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if module.has_bias else set())
        if set(shapes) != expected:
            raise UnsupportedError(f"model_type {family!r}: expert parameters {sorted(shapes)} are not understood")
        layer = re.findall(r"(?:^|\.)(\d+)(?=\.)", name)
        if len(layer) != 1:
            raise FormatError(f"{name}: no single layer number in the module's name")
        layout: Any = module
        found.append(
            ExpertsModule(
                name,
                int(layer[0]),
                module,
                shapes["down_proj"][0],
                shapes,
                bool(layout.is_transposed),
                bool(layout.is_concatenated) or not layout.has_gate,
            )
        )
    if not found:
        if any(getattr(model.config, key, None) for key in _COUNT_KEYS):
            raise UnsupportedError(
                f"model_type {family!r} has experts, but not behind transformers' experts hook; not supported yet"
            )
        raise UnsupportedError(f"model_type {family!r} is not a Mixture-of-Experts model: nothing to stream")
    found.sort(key=lambda e: e.layer)
    for one, other in itertools.pairwise(found):
        if one.layer == other.layer:
            raise UnsupportedError(
                f"model_type {family!r} is not supported: two kinds of experts in a layer, {one.name} and {other.name}"
            )
    return found


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that share another's storage: name -> name of the parameter that is stored."""
    state = model.state_dict()
    tied: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    return {name: stored for name, stored in tied.items() if name in state}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def matrix_module(model: PreTrainedModel, name: str) -> nn.Module | None:
    """The Linear or Embedding whose weight ``name`` is, if flashpack may replace it by a packed one.

    Subclasses do something else with their weight (scale it, say) and are left alone.
    """
    from torch import nn

    stem, _, leaf = name.rpartition(".")
    module = model.get_submodule(stem)
    return module if leaf == "weight" and type(module) in (nn.Linear, nn.Embedding) else None
