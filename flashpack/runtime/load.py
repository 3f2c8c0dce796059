"""``load``: a pack becomes a transformers model whose experts come from the store."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashpack.errors import FormatError, UnsupportedError, UsageError
from flashpack.formats import Pack
from flashpack.formats.header import parse_json
from flashpack.kernels import best_device, check_device, get_kernels
from flashpack.runtime import topk
from flashpack.runtime.memory import parse_size, spare, usage
from flashpack.skeleton import build, find_experts, library_errors, read_config

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PretrainedConfig, PreTrainedModel

    from flashpack.kernels.cpu.arena import PrefaultedMemory
    from flashpack.runtime.budget import Budget
    from flashpack.runtime.lean import LeanDecoder
    from flashpack.runtime.profile import Profile
    from flashpack.runtime.store import ExpertStore
    from flashpack.skeleton import ExpertsModule

DEFAULT_CONTEXT = 8192
"""Tokens of context reserved by default, if the model has as many."""

_BUFFER_BYTES = 64 * 2**20
"""What computed buffers (rotary frequencies) may take beside as much as the dense part."""

_EARLY_LEAST, _EARLY = 2**26, 2**30
"""Bytes of an arena that may be taken before experts are asked for, and of one that is too small for that."""

CHECKS = ("first", "always", "never")
"""When an expert's record is compared with its digest: when it is first read, at every read, or not at all."""

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens")
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
             "repetition_penalty")  # fmt: skip
_LENGTHS = ("max_new_tokens", "max_length")


@dataclass(frozen=True)
class Runtime:
    """What ``load`` adds to a model, as ``model.flashpack``."""

    pack: Pack
    store: ExpertStore
    budget: Budget
    context: int
    prefix_memory: int
    """Bytes for ``PrefixCache``, which ``budget`` counts as KV cache."""
    kernels: str
    notices: list[str]
    """``Kernels.notices``."""
    decoding: str
    decoder: LeanDecoder | None
    """What decodes where it is not the library."""
    experts_per_token: tuple[int, int]
    """Used, and what the model was trained with."""
    prefer_cached: float | None
    profile: Profile


def load(
    pack: str | os.PathLike[str],
    device: str | None = None,
    memory: int | str | None = None,
    dtype: torch.dtype | str | None = None,
    context: int | None = None,
    check: str = "first",
    expect: str | None = None,
    reference: bool = False,
    warm: bool | None = None,
    prefetch: bool = True,
    experts_per_token: int | None = None,
    prefer_cached: float | None = None,
    sequences: int = 1,
    prefix_memory: int | None = None,
    profile: Profile | None = None,
) -> PreTrainedModel:
    """Open a pack as a transformers causal language model; its ``generate`` works.

    ``device``: "cpu" or "mps" (Metal); default: "mps" where this machine has it.
    ``memory``: bytes the whole process may use, also as "2GB", "2GiB" or "smallest"; default: from what is
    available. ``dtype``: type of activations, float32 by default on CPU; stored weights stay mapped and are widened
    per operation. ``context``: tokens of KV cache to reserve. ``check``: when an expert is compared with its digest:
    ``"first"`` time it is read, ``"always"`` or ``"never"``. ``expect``: the identity the pack must have.
    ``reference``: computed by torch and transformers alone, slowly: what everything faster is compared with.
    ``warm``: whether to begin with the experts that earlier runs used most, and to remember those of this one (in the
    user's cache folder); default: unless the environment variable FLASHPACK_WARM is 0.
    ``prefetch``: whether experts that the next layer will probably ask for are read while this one's are computed, as
    long as that is faster. Two options make the output another than the model's own. ``experts_per_token``: fewer than
    the model was trained with. ``prefer_cached``: decoding takes experts that are in memory in place of absent ones if
    the router gives them at least this share of their weight, between 0 and 1; then the output depends on what is in
    memory, and nothing is read ahead. ``sequences``: how many the caller computes in one call, so that there is room
    for them. ``prefix_memory``: bytes for texts that were read before (``PrefixCache``), at least what one recurrent
    state takes; default: none. ``profile``: how files are read; default: what ``tune`` found best here, unless the
    environment variable FLASHPACK_PROFILE is 0. The model carries its ``Runtime`` as ``.flashpack``.

    Raises ``FormatError``, ``IntegrityError``, ``IdentityError``, ``MemoryBudgetError``, ``DeviceError`` or
    ``UsageError``.
    """
    if device is not None:
        check_device(device)
    if check not in CHECKS:
        raise UsageError(f"--check {check}: choose from {', '.join(CHECKS)}")
    if prefer_cached is not None and not 0 < prefer_cached < 1:
        raise UsageError(f"--prefer-cached {prefer_cached}: a share of a weight, between 0 and 1")
    if prefer_cached is not None and reference:
        raise UsageError("--prefer-cached: the library decodes with --reference; leave out one of them")
    opened = Pack(pack, expect)
    opened.check_copies()  # transformers reads them by name
    opened.read_ahead()  # while libraries are imported and the model is built

    import torch

    from flashpack.runtime import budget as budgets
    from flashpack.runtime import dense, experts, lean
    from flashpack.runtime import warm as history
    from flashpack.runtime.kv import cache_size
    from flashpack.runtime.profile import profile_of
    from flashpack.runtime.records import scratch_bytes
    from flashpack.runtime.store import ExpertStore
    from flashpack.runtime.threads import confine

    profile = profile or profile_of(opened)
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(f"dtype {dtype} is not float32, bfloat16 or float16")
    kernels = get_kernels(device or best_device(), torch.get_num_threads(), reference)
    experts.register()
    parameters = len(opened.manifest.tensors) + 2 * len(opened.manifest.layers)
    try:
        config = read_config(opened.folder, opened.manifest.model["architecture"])
        own_top_k = topk.experts_per_token(config)
        if experts_per_token is not None:
            topk.use_fewer(config, experts_per_token)
        model = build(config, experts.NAME, dtype, parameters)
        if type(model).__name__ != opened.manifest.model["architecture"]:
            raise FormatError(
                f"{opened.folder}: config.json describes {type(model).__name__}, the manifest "
                f"{opened.manifest.model['architecture']}"
            )
        sites = find_experts(model)
    except UnsupportedError as e:
        raise FormatError(f"{opened.folder}: {str(e).removeprefix(f'{opened.folder}/')}") from e
    # Nothing is allocated before everything that config.json describes has been found in the pack.
    _check_layers(opened, sites)
    try:
        dense.check(model, opened, sites)
    except FormatError as e:
        if experts_per_token is None:
            raise
        raise UsageError(f"--experts-per-token {experts_per_token}: the pack does not fit such a model: {e}") from e
    config = config.get_text_config(decoder=True)
    work = sequences * working_bytes(model, sites, str(opened.folder)) + scratch_bytes(opened, profile.readers)
    context = context_length(config, context)
    with _prefaulting(None if kernels.asynchronous else _prefaulted(opened, memory)) as early:
        with library_errors(f"{opened.folder}: the model of config.json cannot be computed"):
            measured = cache_size(model)
            prefix_memory = 0 if prefix_memory is None else max(prefix_memory, measured.bytes(1))
            cache = sequences * measured.bytes(context) + prefix_memory
            kind: Any = type(model)
            own_cache = None if kind._supports_default_dynamic_cache() else measured.kind
            if experts_per_token is not None:
                topk.check_fewer(model, sites, experts_per_token)
            _fill_buffers(model, opened.dense_bytes)
        base = usage().anonymous
        dense.fill(model, opened, sites, kernels, dtype)
    if not kernels.asynchronous:  # else the dense part is memory of the process, which the budget counts as such
        base = usage().anonymous - (early.taken if early else 0)
    total = parse_size(memory) if memory not in (None, "smallest") else memory
    # Memory that a GPU uses is wired; what is left to the page cache caches experts, too (docs/metal.md).
    unasked = spare() // 2 if kernels.asynchronous else spare() + (early.taken if early else 0)
    budget = budgets.divide(opened, base, cache, work, total, unasked)
    ahead = (
        prefetch and profile.prefetch and prefer_cached is None and not kernels.asynchronous
    )  # guesses cost a wait for the device
    store = ExpertStore(opened, kernels, budget.slots, check, ahead, profile, early)
    if early is not None:
        early.take(min(budget.arena, _EARLY))
    remembered = opened if history.wanted(warm) else None
    if remembered:
        store.warm(history.read(opened))
    for site in sites:
        module: Any = site.module
        module.flashpack = experts.RoutedExperts(store, kernels, site)
    _generation_config(model, opened.folder, context, budgets.PROMPT_CHUNK)
    if own_cache is not None:
        _give_cache(model, own_cache)
    if not kernels.asynchronous:
        confine(model, torch.get_num_threads())
    decoding, decoder = "the library's: asked for", None
    if not reference:
        decoding, decoder = lean.install(model, kernels, sites, context, prefer_cached)
    used = own_top_k if experts_per_token is None else experts_per_token
    runtime: Any = Runtime(
        opened, store, budget, context, prefix_memory, kernels.name, kernels.notices, decoding, decoder,
        (used, own_top_k), prefer_cached, profile,
    )  # fmt: skip
    model.flashpack = runtime
    weakref.finalize(model, _finish, store, remembered)
    return model


def _prefaulted(pack: Pack, memory: int | str | None) -> tuple[PrefaultedMemory, int] | None:
    """Memory for experts, and how much of what the arena will probably get may be taken before the model is made."""
    from flashpack.kernels.cpu.arena import PrefaultedMemory
    from flashpack.runtime.budget import stride_counts

    if memory == "smallest":
        return None
    total = spare() if memory is None else parse_size(memory)
    size = min(total, sum(stride * count for stride, count in stride_counts(pack.manifest).items()))
    return (PrefaultedMemory(size), min(total // 4, _EARLY)) if size >= _EARLY_LEAST else None


@contextmanager
def _prefaulting(memory: tuple[PrefaultedMemory, int] | None) -> Iterator[PrefaultedMemory | None]:
    """Take memory meanwhile; when it is over, in whatever way, no more is taken."""
    if memory is None:
        yield None
        return
    early, most = memory
    early.take(most)
    try:
        yield early
    finally:
        early.stop()


def _finish(store: ExpertStore, remembered: Pack | None) -> None:
    """The model is not used any more."""
    if remembered:
        from flashpack.runtime import warm as history

        history.write(remembered, store.ranking())
    store.close()


def _check_layers(pack: Pack, sites: list[ExpertsModule]) -> None:
    """The experts of the model class and of the pack must be the same modules with the same shapes."""
    layers = {layer.module: layer for layer in pack.manifest.layers}
    names = {site.name for site in sites}
    if names != set(layers):
        odd = sorted(names ^ set(layers))[0]
        raise FormatError(f"{pack.folder}: config.json and manifest disagree about the experts {odd}")
    for site in sites:
        layer = layers[site.name]
        for kind, _ in layer.kinds:
            projections = pack.manifest.record_kinds[kind].projections
            if {p.name: p.shape for p in projections} != site.projections():
                raise FormatError(f"{pack.folder}: experts of layer {layer.index} have other shapes than the model")
            if any(bool(p.bias) != site.has_bias for p in projections):
                raise FormatError(f"{pack.folder}: experts of layer {layer.index} have other biases than the model")
        if layer.experts != site.num_experts or layer.index != site.layer:
            raise FormatError(f"{pack.folder}: layer {layer.index} has {layer.experts} experts, not {site.num_experts}")


def working_bytes(model: PreTrainedModel, sites: list[ExpertsModule], where: str) -> int:
    """Working space of a prompt chunk; ``model`` has its own modules still. ``where`` is for errors."""
    from torch import nn

    from flashpack.runtime.budget import work_bytes

    config = model.config.get_text_config(decoder=True)
    hidden, top_k = _numbers(config, where, sites)
    widths = [m.out_features for m in model.modules() if type(m) is nn.Linear]
    return work_bytes(hidden, top_k, config.vocab_size, max((w for w in widths if w < 16 * hidden), default=hidden))


def _numbers(config: PretrainedConfig, where: str, sites: list[ExpertsModule]) -> tuple[int, int]:
    """Width of the hidden states, or of the experts' if they are wider, and experts per token; both checked."""
    hidden = getattr(config, "hidden_size", None)
    top_k = topk.experts_per_token(config)
    if type(hidden) is not int:
        raise FormatError(f"{where}: config.json: hidden_size {hidden!r} is not a number")
    if type(top_k) is not int or not 1 <= top_k <= min(s.num_experts for s in sites):
        raise FormatError(f"{where}: config.json: {top_k!r} experts per token, of {sites[0].num_experts}")
    return max(hidden, *(s.projections()["down"][0] for s in sites)), top_k


def context_length(config: object, wanted: int | None) -> int:
    """Tokens of context: those ``wanted``, or the default."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        limit = DEFAULT_CONTEXT
    if type(limit) is not int or limit < 1:
        raise FormatError(f"config.json: max_position_embeddings {limit!r} is not a number of tokens")
    if wanted is None:
        return min(limit, DEFAULT_CONTEXT)
    if not 0 < wanted <= limit:
        raise UsageError(f"--context {wanted}: the model has {limit} positions")
    return wanted


def _fill_buffers(model: PreTrainedModel, dense_bytes: int) -> None:
    """Compute the buffers no checkpoint holds (rotary frequencies), as transformers does after loading."""
    import torch

    size = sum(buffer.nbytes for _, buffer in model.named_non_persistent_buffers())
    if size > dense_bytes + _BUFFER_BYTES:
        raise FormatError(f"config.json asks for {size} bytes of buffers, the dense part has {dense_bytes}")
    owners = {}
    for name, buffer in model.named_non_persistent_buffers():
        stem, _, leaf = name.rpartition(".")
        module = model.get_submodule(stem)
        empty = torch.empty_like(buffer, device="cpu")
        module._buffers[leaf] = empty.fill_(float("nan")) if empty.is_floating_point() else empty.zero_()
        owners[stem] = module
    with torch.no_grad():
        for module in owners.values():
            model._init_weights(module)  # type: ignore[no-untyped-call]
    for name, buffer in model.named_non_persistent_buffers():
        if buffer.is_floating_point() and buffer.isnan().any():
            raise FormatError(f"transformers does not say how to compute {name} of {type(model).__name__}")


def _give_cache(model: PreTrainedModel, kind: type[Cache]) -> None:
    """Where ``forward`` makes a cache of the family's own kind: ``generate`` needs it earlier, to read in chunks."""
    prepare: Any = model._prepare_cache_for_generation

    def prepared(generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> None:
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = kind()
        prepare(generation_config, model_kwargs, *rest)

    patched: Any = model
    patched._prepare_cache_for_generation = prepared


def _generation_config(model: PreTrainedModel, folder: Path, context: int, chunk: int) -> None:
    """Stop tokens and sampling defaults of generation_config.json, or else of config.json.

    Nothing else: other fields choose caches, number of beams or methods that transformers fetches code for.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    data: Any = model.generation_config.to_dict()
    if path.is_file():
        data = parse_json(path.read_bytes(), str(path))
    if not isinstance(data, dict):
        raise FormatError(f"{path}: not a JSON object")
    taken = {k: data[k] for k in (*_TOKENS, *_SAMPLING, *_LENGTHS) if data.get(k) is not None}
    for name, value in taken.items():
        kinds = (int, float, bool) if name in _SAMPLING else (int,)
        values = value if isinstance(value, list) and name in _TOKENS else [value]
        if not all(type(v) in kinds and abs(v) < 2**63 for v in values):
            raise FormatError(f"{path}: {name} is {str(value)[:40]!r}")
    for name in set(_LENGTHS) & set(taken):
        taken[name] = max(1, min(taken[name], context))
    with library_errors(str(path)):
        model.generation_config = GenerationConfig(**taken)  # type: ignore[no-untyped-call]
    model.generation_config.prefill_chunk_size = chunk
