"""The size of a cache: that of the whole model, though layers that are alike are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from flashpack.runtime import experts, kv
from flashpack.skeleton import build
from tests.families.checkpoint import configuration


def model_of(family: str, **changes: Any) -> PreTrainedModel:
    experts.register()
    return build(configuration(family, **changes), experts.NAME, torch.float32)


def test_of_known_layers_the_sizes_are_the_formula() -> None:
    size = kv.cache_size(model_of("qwen3_moe", num_hidden_layers=5))
    token = 5 * 2 * 2 * 8 * 4  # layers, keys and values, KV heads, width, float32
    assert (size.first, size.more) == (token, token)
    assert size.bytes(1) == token
    assert size.bytes(100) == 100 * token


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_5_moe_text", {"layer_types": ["linear_attention", "full_attention"] * 3, "num_hidden_layers": 6}),
        ("gpt_oss", {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_hidden_layers": 6}),
        ("deepseek_v3", {"num_key_value_heads": 4, "num_hidden_layers": 4}),
        ("jamba", {"num_hidden_layers": 6}),
        ("minimax", {"num_hidden_layers": 4}),  # a cache of its own
    ],
)
def test_the_size_is_that_of_all_layers(family: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(family, **changes)
    found = kv.cache_size(model)
    assert found == kv.cache_size(model)  # nothing is left behind
    monkeypatch.setattr(kv, "_likes", lambda layers, config: list(range(len(layers))))
    assert found == kv.cache_size(model)
    assert found.first > 0
    assert found.more > 0


def test_layers_that_are_alike_are_computed_once() -> None:
    assert kv._likes(list(model_of("qwen3_moe", num_hidden_layers=5).model.layers), None) == [0] * 5
    kinds = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    model = model_of("qwen3_5_moe_text", layer_types=kinds, num_hidden_layers=4)
    layers: Sequence[nn.Module] = list(model.get_decoder().layers)  # type: ignore[no-untyped-call]
    assert kv._likes(layers, model.config) == [0, 1, 0, 1]
    seen: list[int] = []
    for i, layer in enumerate(layers):
        layer.get_submodule("mlp").register_forward_hook(lambda *_, _i=i: seen.append(_i))
    kv.cache_size(model)
    assert seen == [0, 1] * 2  # for one token and for two
    assert not any("forward" in vars(layer) for layer in layers)


def test_layers_of_other_sizes_or_settings_are_not_alike() -> None:
    def likes(*layers: nn.Module, types: list[str] | None = None) -> list[int]:
        for i, one in enumerate(layers):
            for name, value in {"layer_idx": i, **getattr(one, "changes", {})}.items():
                setattr(one, name, value)
        return kv._likes(layers, type("C", (), {"layer_types": types}))

    def layer(width: int = 4, **settings: Any) -> nn.Module:
        made: Any = nn.Sequential(nn.Linear(4, width), nn.SiLU())
        made.changes = settings
        assert isinstance(made, nn.Module)
        return made

    assert likes(layer(), layer(), layer()) == [0, 0, 0]
    assert likes(layer(), layer(layer_idx=7)) == [0, 1]  # its index is none: it is a setting
    assert likes(layer(), layer(5)) == [0, 1]
    assert likes(layer(), layer(window=8), layer(window=8), layer(window=9)) == [0, 1, 1, 3]
    assert likes(layer(), layer(), layer(types=["a"])) == [0, 0, 2]
    assert likes(layer(), layer().double()) == [0, 1]
    assert likes(layer(), nn.Sequential(nn.Linear(4, 4), nn.ReLU())) == [0, 1]
    assert likes(layer(), nn.Sequential(nn.Linear(4, 4), nn.SiLU())) == [0, 0]
    wider = layer()
    wider.register_buffer("sinks", torch.zeros(5))
    narrow = layer()
    narrow.register_buffer("sinks", torch.zeros(4))
    assert likes(layer(), wider, narrow) == [0, 1, 2]
    assert likes(layer(), layer(), types=["full", "sliding"]) == [0, 1]
    assert likes(layer(), layer(), types=["full", "full"]) == [0, 0]


def test_what_a_cache_keeps_beside_its_layers_is_no_layers() -> None:
    cache = kv.cache_of(model_of("qwen3_moe", num_hidden_layers=3), 1)
    assert kv._is_by_layer(cache, 3)
    assert not kv._is_by_layer(cache, 4)
    cache.beside = [torch.zeros(7)]
    assert not kv._is_by_layer(cache, 3)
    assert not kv._is_by_layer({"states": torch.zeros(7)}, 3)


def test_a_model_that_cannot_be_computed_so_is_computed_whole() -> None:
    model = model_of("qwen3_moe", num_hidden_layers=3)
    expected = kv.cache_size(model)
    layers = list(model.get_decoder().layers)  # type: ignore[no-untyped-call]
    ran: list[int] = []
    own = layers[2].forward

    def together(*args: Any, **named: Any) -> Any:
        if "forward" in vars(layers[1]):
            raise ValueError("the layer before has left nothing")
        ran.append(2)
        return own(*args, **named)

    layers[2].forward = together
    layers[2].unlike = 1
    assert kv._likes(layers, model.config) == [0, 0, 2]
    assert kv.cache_size(model) == expected
    assert ran == [2, 2]
    assert layers[2].forward is together
    assert "forward" not in vars(layers[1])
