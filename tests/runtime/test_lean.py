"""The lean path for single tokens: the library's logits, its caches, and its place where parts are not known."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionLayer

import flashpack
from flashpack.kernels.cpu.native import compute
from flashpack.runtime import budget, dense, lean
from flashpack.runtime.lean.blocks import Experts, Network
from flashpack.runtime.lean.cache import RoomyLayer
from flashpack.runtime.lean.layers import LeanLayer
from tests.conftest import PackOf

pytestmark = pytest.mark.skipif(isinstance(compute.library(), str), reason=f"no native kernels: {compute.library()}")

LEAN = {
    "qwen3_moe": 3, "qwen3_moe_dense_first_tied": 3, "trained": 6, "qwen2_moe": 2, "mixtral": 2, "glm4_moe": 3,
}  # fmt: skip
"""Packs of the tests and how many of their layers have known parts."""

RECURRENT = {"qwen3_next": 4, "qwen3_5_moe": 4, "trained": 6}
"""The same of models whose layers are recurrent, but for some."""


def decode(model: PreTrainedModel, ids: Tensor, prompt: int, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits [tokens - prompt, vocabulary] of the tokens after the prompt, one by one, and the cache."""
    whole: Any = model
    with torch.inference_mode():
        cache = whole(ids[:, :prompt], use_cache=True, past_key_values=cache).past_key_values
        found = [
            whole(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0, -1]
            for i in range(prompt, ids.shape[1])
        ]
    return torch.stack(found), cache


def some_ids(count: int, vocabulary: int = 200) -> Tensor:
    """Tokens for which no router of the tests' random models has to choose between almost equal experts."""
    return torch.randint(0, vocabulary, (1, count), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", LEAN)
@pytest.mark.parametrize("stored", ["source", "q4"])
def test_tokens_have_the_librarys_logits(pack_of: PackOf, name: str, stored: str) -> None:
    pack = pack_of(name, stored, stored)
    model, reference = flashpack.load(pack), flashpack.load(pack, reference=True)
    assert model.flashpack.decoding.startswith(f"lean: {LEAN[name]} of ")
    assert reference.flashpack.decoding == "the library's: asked for"
    ids = some_ids(24)
    found, cache = decode(model, ids, 3)  # a prompt of few tokens: products with more are rounded more
    expected, plain = decode(reference, ids, 3)
    assert (found - expected).abs().max() <= 3e-3 * expected.abs().max()
    assert cache.get_seq_length() == plain.get_seq_length() == 24
    assert any(type(layer) is RoomyLayer for layer in cache.layers)
    for mine, theirs in zip(cache.layers, plain.layers, strict=True):
        if type(mine) is RoomyLayer:
            for ours, its in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                assert (ours - its).abs().max() <= 3e-3 * its.abs().max()


def test_the_library_goes_on_where_the_lean_path_stopped_and_the_other_way_round(pack_of: PackOf) -> None:
    """Several tokens at once, a shortened and a copied cache, more tokens than there was room for.

    Products of several tokens are rounded more than those of one.
    """
    model = flashpack.load(pack_of("qwen3_moe", "q4", "q4"), context=16)
    ids = some_ids(40)
    expected, _ = decode(model, ids, 39)
    _, cache = decode(model, ids[:, :20], 3)
    with torch.inference_mode():
        model(ids[:, 20:31], past_key_values=cache, use_cache=True)
        found, cache = decode(model, ids[:, 31:], 5, cache)
        assert (found[-1] - expected[-1]).abs().max() <= 3e-2 * expected[-1].abs().max()
        cache.crop(-10)
        assert cache.get_seq_length() == 30
        found, _ = decode(model, ids[:, 30:], 1, cache)
    assert (found[-1] - expected[-1]).abs().max() <= 3e-2 * expected[-1].abs().max()


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize(("stored", "tolerance"), [("source", 1e-4), ("q4", 2e-2)])
def test_states_keep_to_the_librarys_over_many_tokens(
    pack_of: PackOf, name: str, stored: str, tolerance: float
) -> None:
    """Random models' recurrent layers make much of the rounding that products with codes begin with; ``some_ids`` are
    tokens of which no router has to choose between almost equal experts with these weights, rounded to the nearest."""
    pack = pack_of(name, stored, stored, quality="fast")
    model, reference = flashpack.load(pack), flashpack.load(pack, reference=True)
    assert model.flashpack.decoding == f"lean: {RECURRENT[name]} of {RECURRENT[name]} layers"
    ids = some_ids(49)
    found, cache = decode(model, ids, 9)
    expected, plain = decode(reference, ids, 9)
    bound = tolerance * float(expected.abs().max())
    assert (found - expected).abs().max() <= bound
    best = expected.topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * bound
    assert clear.sum() > 15
    assert torch.equal(found.argmax(1)[clear], expected.argmax(1)[clear])
    pairs: list[Any] = [p for p in zip(cache.layers, plain.layers, strict=True) if type(p[1]) is LinearAttentionLayer]
    assert len(pairs) >= 3
    for mine, theirs in pairs:
        for kept in ("conv_states", "recurrent_states"):
            state, other = getattr(mine, kept)[0], getattr(theirs, kept)[0]
            assert (state - other).abs().max() <= 4 * tolerance * other.abs().max()


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe"])
def test_states_go_from_the_library_to_the_lean_path_and_back(
    pack_of: PackOf, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tokens one by one, one by one with what only the library can answer, several at once, and again; a copy of
    the cache goes its own way."""
    model: Any = flashpack.load(pack_of(name, "source", "source"))
    steps: list[int] = []
    real = lean.LeanDecoder.logits
    monkeypatch.setattr(lean.LeanDecoder, "logits", lambda *a: (steps.append(1), real(*a))[1])
    ids = some_ids(40)
    with torch.inference_mode():
        expected = model(ids).logits[0]
        first, cache = decode(model, ids[:, :12], 3)
        assert len(steps) == 9
        alone = [
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True, output_hidden_states=True).logits[0, -1]
            for i in range(12, 15)
        ]
        second, cache = decode(model, ids[:, 15:24], 4, cache)
        copied = copy.deepcopy(cache)
        decode(model, ids[:, 3:9], 2, copied)
        assert len(steps) == 9 + 5 + 4
        third, _ = decode(model, ids[:, 24:], 9, cache)
    found = torch.cat([first, torch.stack(alone), second, third])
    places = [*range(3, 15), *range(19, 24), *range(33, 40)]
    assert (found - expected[places]).abs().max() <= 1e-4 * expected.abs().max()


def test_states_whose_past_is_recorded_are_left_to_the_library(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = flashpack.load(pack_of("qwen3_next", "q4", "q4"))
    monkeypatch.setattr(lean.LeanDecoder, "logits", None)
    with torch.inference_mode():
        cache = model(some_ids(4), use_cache=True).past_key_values
        cache.activate_past_recording()
        model(some_ids(1), past_key_values=cache)
        cache.crop(-1)


@pytest.mark.parametrize(
    ("name", "kinds", "beside", "switches"),
    [
        ("qwen3_moe", [Experts] * 3, 0, 0), ("qwen3_moe_dense_first_tied", [Network, Experts, Experts], 0, 0),
        ("qwen2_moe", [Experts] * 2, 1, 1), ("qwen3_next", [Experts] * 4, 1, 1),
        ("glm4_moe", [Network, Experts, Experts], 1, 0),
    ],
)  # fmt: skip
def test_feed_forward_blocks_are_steps(
    pack_of: PackOf, name: str, kinds: list[type], beside: int, switches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one network, and experts that every token uses."""
    decoders: list[lean.LeanDecoder] = []
    real = lean._match
    monkeypatch.setattr(lean, "_match", lambda m, d, s: (decoders.append(d), real(m, d, s)))
    flashpack.load(pack_of(name, "q4", "q4"))
    blocks = [layer.block for layer in decoders[0].layers if isinstance(layer, LeanLayer)]
    assert [type(block) for block in blocks] == kinds
    experts = [block for block in blocks if isinstance(block, Experts)]
    assert all(len(e.beside) == beside and bool(e.switch) == bool(switches) for e in experts)


@pytest.mark.parametrize(
    "changed",
    [
        {"output_hidden_states": True}, {"output_attentions": False, "output_router_logits": True},
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}, {"position_ids": torch.tensor([[7]])},
        {"use_cache": False}, {"return_dict": False},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_what_is_unusual_is_left_to_the_library(
    pack_of: PackOf, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = flashpack.load(pack_of("qwen3_moe", "q4", "q4"))
    assert model.flashpack.decoding.startswith("lean")
    taken: list[int] = []
    monkeypatch.setattr(lean.LeanDecoder, "logits", lambda *_: taken.append(1))
    with torch.inference_mode():
        cache = model(some_ids(4), use_cache=True).past_key_values
        model(some_ids(1), **({"past_key_values": cache, "use_cache": True} | changed))
    model(some_ids(1), past_key_values=cache)  # with gradients
    with torch.inference_mode():
        two = model(some_ids(4).expand(2, 4), use_cache=True).past_key_values
        model(some_ids(1).expand(2, 1), past_key_values=two)
        model(some_ids(1), past_key_values=DynamicCache())
    assert not taken


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_next"])
def test_a_network_beside_experts_that_come_in_several_batches(pack_of: PackOf, name: str) -> None:
    """With fewer slots than a token asks for."""
    pack = pack_of(name, "source", "source")
    model, reference = flashpack.load(pack, memory="smallest"), flashpack.load(pack, reference=True)
    assert model.flashpack.decoding.startswith("lean")
    assert sum(model.flashpack.budget.slots.values()) < model.config.num_experts_per_tok
    ids = some_ids(14)
    found, _ = decode(model, ids, 9)
    expected, _ = decode(reference, ids, 9)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def break_norm(decoder: lean.LeanDecoder) -> None:
    decoder.board.steps.add_norm(decoder.board.x, None, None, 1.0, decoder.board.x)  # works, and is not what is wanted
    decoder._norm = lambda: decoder.board.normed.copy_(decoder.board.x)  # type: ignore[assignment,return-value]


def break_attention(decoder: lean.LeanDecoder) -> None:
    layer: Any = decoder.layers[0]
    layer.mixer.steps[-1].calls[0].numbers[0] = 0  # no matrix is multiplied with


def break_state(decoder: lean.LeanDecoder) -> None:
    layer: Any = decoder.layers[0]
    layer.mixer._update.native.epsilon = 1.0


def break_switch(decoder: lean.LeanDecoder) -> None:
    layer: Any = decoder.layers[0]
    layer.block.switch[-1].calls[0].real = 2.0  # times the weight


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("qwen3_moe", break_norm),
        ("qwen3_moe", break_attention),
        ("qwen3_next", break_state),
        ("qwen3_next", break_switch),
    ],
)
def test_a_model_whose_logits_differ_stays_the_librarys(
    pack_of: PackOf, name: str, damage: Callable[[lean.LeanDecoder], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lean._match

    def damaged(model: Any, decoder: lean.LeanDecoder, sites: Any) -> None:
        damage(decoder)
        real(model, decoder, sites)

    pack = pack_of(name, "source", "source")
    monkeypatch.setattr(lean, "_match", damaged)
    model = flashpack.load(pack)
    assert "logits differ" in model.flashpack.decoding
    ids = some_ids(8)
    expected, _ = decode(flashpack.load(pack, reference=True), ids, 5)
    found, _ = decode(model, ids, 5)
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_experts_are_guessed_a_layer_early_and_logits_stay_the_same(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most guesses are right in a model whose layers add little to the stream; a guess never changes a result."""
    pack = pack_of("qwen3_moe", "q4", "q4")
    ids = some_ids(40)
    plain = flashpack.load(pack, memory="smallest", prefetch=False)
    expected, _ = decode(plain, ids, 4)
    assert plain.flashpack.store.stats.total().guesses == 0
    monkeypatch.setattr(budget, "MIN_SLOTS", 14)  # room for guesses
    model = flashpack.load(pack, memory="smallest")
    store = model.flashpack.store
    assert store._guesses is not None
    store._guesses.gate.step = store._guesses.gate.wasteful = lambda *_: None
    store._guesses.gate.on = True
    found, _ = decode(model, ids, 4)
    assert torch.equal(found, expected)
    total = store.stats.total()
    assert total.guesses >= 36
    assert total.right_guesses > total.guesses / 3
    chosen = model.flashpack.pack.manifest.layers[0].experts
    assert chosen > 2 * model.config.num_experts_per_tok  # a guess at random would mostly be wrong


@pytest.mark.parametrize("limit", ["sliding_window", "attn_logit_softcapping", "final_logit_softcapping"])
def test_what_shows_only_in_long_contexts_or_at_large_values_is_left_to_the_library(
    pack_of: PackOf, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few tokens with small scores would be the same both ways."""

    def build(config: Any, *rest: Any) -> PreTrainedModel:
        model = real(config, *rest)
        setattr(model.config, limit, 5000)
        return model

    load = importlib.import_module("flashpack.runtime.load")
    real = load.build
    monkeypatch.setattr(load, "build", build)
    model = flashpack.load(pack_of("qwen3_moe", "q4", "q4"))
    assert model.flashpack.decoding == "the library's: no layer is made of known parts"


@pytest.mark.parametrize("place", ["linear_attn", "linear_attn.norm"])
def test_recurrent_layers_with_another_function_are_left_to_the_library(
    pack_of: PackOf, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer of four: others stay steps."""

    def build(config: Any, *rest: Any) -> PreTrainedModel:
        model = real(config, *rest)
        module: Any = model.get_submodule(f"model.layers.1.{place}")
        module.activation = "sigmoid"
        return model

    load = importlib.import_module("flashpack.runtime.load")
    real = load.build
    monkeypatch.setattr(load, "build", build)
    pack = pack_of("qwen3_next", "source", "source")
    model, reference = flashpack.load(pack), flashpack.load(pack, reference=True)
    assert model.flashpack.decoding == "lean: 3 of 4 layers"
    ids = some_ids(14)
    found, _ = decode(model, ids, 9)
    expected, _ = decode(reference, ids, 9)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_experts_stored_in_ways_the_native_kernels_do_not_know(pack_of: PackOf) -> None:
    """FP8 experts between layers that are steps."""
    pack = pack_of("qwen3_moe-fp8block", "source", "q4")
    model, reference = flashpack.load(pack), flashpack.load(pack, reference=True)
    assert model.flashpack.decoding == "lean: 3 of 3 layers"
    ids = some_ids(14)
    expected, _ = decode(reference, ids, 3)  # a prompt of few tokens: products with more are rounded more
    found, _ = decode(model, ids, 3)
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", ["deepseek_v3", "granitemoe", "olmoe", "llama4_text"])
def test_other_models_say_why_or_keep_some_layers(pack_of: PackOf, name: str) -> None:
    """Latent attention, multipliers, norms over all heads, other blocks: taken both ways, the same."""
    pack = pack_of(name, "source", "source")
    model, reference = flashpack.load(pack), flashpack.load(pack, reference=True)
    assert model.flashpack.decoding.startswith(("lean: ", "the library's: "))
    ids = some_ids(14)
    expected, _ = decode(reference, ids, 9)
    found, _ = decode(model, ids, 9)
    assert (found - expected).abs().max() <= 2e-3 * expected.abs().max()


def test_a_large_router_is_multiplied_with_as_it_is_stored(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy in float32 would be read at every token, and no budget counts it."""
    monkeypatch.setattr(dense, "SMALL_BYTES", 256)  # norms are smaller, routers are not
    model: Any = flashpack.load(pack_of("qwen3_moe", "q4", "q4"))
    assert model.flashpack.decoding == "lean: 3 of 3 layers"
    for block in model.flashpack.decoder.experts:
        assert block.router._weight.dtype == torch.bfloat16


def test_a_router_without_numbers_is_said_to_be_one(pack_of: PackOf) -> None:
    model: Any = flashpack.load(pack_of("qwen3_moe", "q4", "q4"))
    board = model.flashpack.decoder.board
    chosen, weights = torch.zeros(2, dtype=torch.int32), torch.zeros(2)
    route = board.steps.route(torch.full((4,), torch.nan), None, 2, "softmax-top", True, 1.0, chosen, weights)
    with pytest.raises(FloatingPointError, match="a router's logits are not numbers"):
        board.steps.sequence([route])()
