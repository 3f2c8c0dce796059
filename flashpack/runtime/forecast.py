"""The smallest memory budget of a pack that is not loaded, or does not exist yet, from the model's shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashpack.runtime import budget as budgets
from flashpack.runtime import experts
from flashpack.runtime.kv import cache_size
from flashpack.runtime.load import context_length, working_bytes
from flashpack.runtime.memory import usage
from flashpack.runtime.profile import profile_of
from flashpack.runtime.reads import READ_THREADS
from flashpack.runtime.topk import experts_per_token
from flashpack.skeleton import build, find_experts, library_errors, read_config, use_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flashpack.formats import Pack
    from flashpack.runtime.budget import Budget
    from flashpack.skeleton import ExpertsModule


def smallest_of(pack: Pack, context: int | None = None) -> tuple[Budget, int, int]:
    """What ``load(pack, memory="smallest")`` will take, the tokens of context, and the experts of a token and layer.

    Raises ``FlashpackError`` where the runtime refuses the model.
    """
    m = pack.manifest
    config = read_config(pack.folder, m.model["architecture"])
    top_k = experts_per_token(config)
    model = build(config, most=len(m.tensors) + 2 * len(m.layers))
    compressed = any(layer.codec != "raw" for layer in m.layers)
    counts, base = budgets.stride_counts(m), usage().anonymous
    readers = profile_of(pack).readers
    least, tokens = smallest_budget(
        model, find_experts(model), counts, pack.dense_bytes, compressed, base, context, readers
    )
    return least, tokens, top_k


def smallest_budget(
    model: PreTrainedModel,
    sites: list[ExpertsModule],
    strides: dict[int, int],
    dense_bytes: int,
    compressed: bool,
    base: int,
    context: int | None = None,
    readers: int = READ_THREADS,
) -> tuple[Budget, int]:
    """What ``load(..., memory="smallest")`` will take for a pack of ``model``, and the tokens of context.

    ``model``: on the meta device, in float32. ``strides``: experts by record size. ``dense_bytes``: of the dense files.
    ``base``: anonymous memory of a process before it loads. ``readers``: reads in flight.
    """
    experts.register()
    context = context_length(model.config.get_text_config(decoder=True), context)
    use_experts(model, experts.NAME)
    with library_errors("the model of config.json cannot be computed"):
        kv = cache_size(model).bytes(context)
    work = working_bytes(model, sites, "config.json")
    work += readers * max(strides) if compressed else 0
    return budgets.smallest(base, dense_bytes, kv, work, strides), context
