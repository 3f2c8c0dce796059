"""The smallest memory budget of a pack that does not exist yet, from the model's shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashpack.runtime import budget as budgets
from flashpack.runtime import experts
from flashpack.runtime.kv import kv_bytes
from flashpack.runtime.load import context_length, working_bytes
from flashpack.runtime.reads import READ_THREADS
from flashpack.skeleton import library_errors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flashpack.runtime.budget import Budget
    from flashpack.skeleton import ExpertsModule


def smallest_budget(
    model: PreTrainedModel,
    sites: list[ExpertsModule],
    strides: dict[int, int],
    dense_bytes: int,
    compressed: bool,
    base: int,
    context: int | None = None,
) -> tuple[Budget, int]:
    """What ``load(..., memory="smallest")`` will take for a pack of ``model``, and the tokens of context.

    ``model``: on the meta device, in float32. ``strides``: experts by record size. ``dense_bytes``: of the dense files.
    ``base``: anonymous memory of a process before it loads.
    """
    experts.register()
    context = context_length(model.config.get_text_config(decoder=True), context)
    model.set_experts_implementation(experts.NAME)
    with library_errors("the model of config.json cannot be computed"):
        kv = kv_bytes(model, context)
    work = working_bytes(model, sites, "config.json")
    work += READ_THREADS * max(strides) if compressed else 0
    return budgets.smallest(base, dense_bytes, kv, work, strides), context
