"""Experts per token: what the model was trained with, and fewer of them if somebody asks for that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashpack.errors import UsageError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from flashpack.skeleton import ExpertsModule

_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")


def experts_per_token(config: PretrainedConfig) -> Any:
    """What config.json says of the text model, whatever its type; 1 if it says nothing."""
    found = _place(config)
    return 1 if found is None else getattr(*found)


def use_fewer(config: PretrainedConfig, wanted: int) -> None:
    """Have a model of ``config`` that is not built yet choose ``wanted`` experts per token. Raises ``UsageError``."""
    found = _place(config)
    own = experts_per_token(config)
    if found is None or type(own) is not int:
        raise UsageError("--experts-per-token: config.json of this model does not say how many it uses")
    if not 1 <= wanted <= own:
        raise UsageError(f"--experts-per-token {wanted}: from 1 to {own}, the number that this model was trained with")
    setattr(*found, wanted)


def check_fewer(model: PreTrainedModel, sites: list[ExpertsModule], wanted: int) -> None:
    """Raise ``UsageError`` unless the experts of ``model``, which is on the meta device, are asked for ``wanted``.

    There are routers with a fixed number, whatever config.json says.
    """
    from torch import Tensor

    from flashpack.runtime.kv import cache_of

    numbers: set[int] = set()

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = [t for t in (*arguments, *named.values()) if isinstance(t, Tensor)]
        numbers.update(t.shape[-1] for t in tensors if not t.is_floating_point())

    hooks = [site.module.register_forward_pre_hook(note, with_kwargs=True) for site in sites]
    cache_of(model, 1)  # takes a token through it
    for hook in hooks:
        hook.remove()
    if numbers != {wanted}:
        raise UsageError(f"--experts-per-token: routers of {type(model).__name__} do not take their number from config")


def _place(config: PretrainedConfig) -> tuple[Any, str] | None:
    """The configuration, and the name in it, of the number of experts per token."""
    text = config.get_text_config(decoder=True)
    for place in (text, getattr(text, "ffn_config", None)):
        for key in _KEYS:
            if getattr(place, key, None) is not None:
                return place, key
    return None
