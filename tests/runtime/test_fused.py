"""A token in one call of the kernels: the same bits as layer by layer, whatever is in memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import flashpack
from flashpack.errors import CancelledError
from flashpack.formats.records import MXFP4
from flashpack.kernels import get_kernels
from flashpack.kernels.cpu.native import compute
from flashpack.runtime import dense
from flashpack.runtime.lean.board import NotLean
from flashpack.runtime.lean.fused import FusedToken
from flashpack.runtime.routing import RoutingRecorder
from flashpack.runtime.timing import Timing
from tests.conftest import PackOf
from tests.kernels.test_reference import random_matrix, stored_matrix
from tests.runtime.test_lean import decode, some_ids
from tests.runtime.test_prefer import load_with

pytestmark = pytest.mark.skipif(isinstance(compute.library(), str), reason=f"no native kernels: {compute.library()}")

WHOLE = ["qwen3_moe", "qwen3_moe_dense_first_tied", "trained", "qwen2_moe", "mixtral", "glm4_moe", "qwen3_next"]
"""All their layers are steps: with a dense first layer, shared experts with and without a switch, recurrent layers."""


def loaded(pack: Any, **options: Any) -> Any:
    model: Any = flashpack.load(pack, warm=False, **options)
    assert model.flashpack.decoder.fused is not None
    return model


def counted(model: Any) -> list[int]:
    """How many layers each fused call from now on does."""
    fused, done = model.flashpack.decoder.fused, []
    real = fused._fused

    def call() -> int:
        done.append(real())
        return done[-1]

    fused._fused = call
    return done


def layer_by_layer(model: Any, ids: Tensor, prompt: int) -> Tensor:
    decoder = model.flashpack.decoder
    fused, decoder.fused = decoder.fused, None
    try:
        return decode(model, ids, prompt)[0]
    finally:
        decoder.fused = fused


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("stored", ["source", "q4"])
def test_logits_are_those_of_layer_by_layer_to_the_bit(pack_of: PackOf, name: str, stored: str) -> None:
    model = loaded(pack_of(name, stored, stored), prefetch=False)
    ids = some_ids(24)
    expected = layer_by_layer(model, ids, 3)
    layers, done = len(model.flashpack.decoder.layers), counted(model)
    found, cache = decode(model, ids, 3)
    assert torch.equal(found, expected)
    assert cache.get_seq_length() == 24
    assert done == [layers] * 21  # all experts were read the first time
    with torch.inference_mode():
        cache = model(ids[:, :3], use_cache=True).past_key_values
        model.flashpack.store.stats.reset()
        for i in range(3, 24):
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
    total = model.flashpack.store.stats.total()
    assert total.misses == 0
    assert 0 < total.hit_seconds < 10


@pytest.mark.parametrize("slots", [150, 100, 4])
def test_what_is_missing_is_read_and_the_rest_of_the_token_goes_on(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """Of 192 experts there are most, some, or not even a token's. Each is counted once, as layer by layer."""
    pack, ids = pack_of("trained", "q4", "q4"), some_ids(60)
    whole = loaded(pack, prefetch=False)
    model, by_layer = (load_with(slots, pack, monkeypatch, None) for _ in range(2))
    done = counted(model)
    found, _ = decode(model, ids, 3)
    assert torch.equal(found, layer_by_layer(whole, ids, 3))
    assert torch.equal(found, layer_by_layer(by_layer, ids, 3))
    assert len(done) == 57
    assert len(set(done)) > (1 if slots > 4 else 0)
    if slots == 150:
        assert max(done) == 6
    mine, theirs = model.flashpack.store.stats, by_layer.flashpack.store.stats
    assert mine.steps == theirs.steps
    for layer, own in mine.layers.items():
        other = theirs.layers[layer]
        assert (own.hits, own.misses, own.reads) == (other.hits, other.misses, other.reads)
        assert own.misses > 0


def test_while_experts_are_read_ahead_layers_are_called_one_by_one(pack_of: PackOf) -> None:
    model = loaded(pack_of("trained"), prefetch=True)
    store, done = model.flashpack.store, counted(model)
    ids = some_ids(40)
    gate = store._guesses.gate
    gate.on, gate.step = True, lambda seconds: None
    with torch.inference_mode():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        model(ids[:, 4:5], past_key_values=cache, use_cache=True)
        assert not done
        for i in range(5, 40):
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        before = len(done)
        decode(model, ids, 4)  # nothing is missing any more
    assert len(done) >= before + 35


def test_whoever_replaces_a_part_has_layers_called_one_by_one(pack_of: PackOf) -> None:
    model = loaded(pack_of("trained"), prefetch=False)
    decoder, ids = model.flashpack.decoder, some_ids(8)
    fused = decoder.fused
    recorder = RoutingRecorder(model)
    with recorder.watching():
        assert decoder.fused is None
        decode(model, ids, 3)
    assert decoder.fused is fused
    assert [len(x) for x in recorder._layers[0].experts] == [3, 1, 1, 1, 1, 1]
    timing = Timing(model)
    assert decoder.fused is None
    decode(model, ids, 3)
    assert timing.split(5, 1.0).total["attention"][0] > 0
    preferring: Any = flashpack.load(pack_of("trained"), prefer_cached=0.5)
    assert preferring.flashpack.decoder.fused is None


def test_a_cancelled_token_computes_nothing(pack_of: PackOf) -> None:
    model = loaded(pack_of("qwen3_moe", "q4", "q4"), prefetch=False)
    _, cache = decode(model, some_ids(6), 3)
    done = counted(model)
    model.flashpack.store.cancelled = lambda: True
    with torch.inference_mode(), pytest.raises(CancelledError):
        model(some_ids(1), past_key_values=cache, use_cache=True)
    assert not done
    assert cache.get_seq_length() == 6


def test_a_model_that_is_gone_leaves_no_memory(pack_of: PackOf) -> None:
    """Collected once, as before another model is loaded, the arena is free."""
    model = loaded(pack_of("qwen3_moe", "q4", "q4"))
    decode(model, some_ids(6), 3)
    store = weakref.ref(model.flashpack.store)
    del model
    gc.collect()
    assert store() is None


def test_a_router_without_numbers_is_said_to_be_one(pack_of: PackOf) -> None:
    model = loaded(pack_of("qwen3_moe", "q4", "q4"), prefetch=False)
    _, cache = decode(model, some_ids(6), 3)
    cache.layers[1].room()[0].fill_(torch.nan)
    with torch.inference_mode(), pytest.raises(FloatingPointError, match="a router's logits are not numbers"):
        model(some_ids(1), past_key_values=cache, use_cache=True)


def test_what_is_no_step_leaves_the_layers_one_by_one(pack_of: PackOf) -> None:
    """A head or an embedding of another kind, a layer that is the library's, kernels without fusion."""
    decoder = loaded(pack_of("qwen3_moe", "q4", "q4")).flashpack.decoder
    board, layers, store = decoder.board, decoder.layers, decoder.experts[0].store
    embedding, norm, head = decoder._decoder.embed_tokens, decoder._norm, decoder._head
    FusedToken(board, layers, store, embedding, norm, head)
    plain = torch.nn.Linear(8, 8)
    for arguments in ((layers, store, plain, norm, head), (layers, store, embedding, norm, plain)):
        with pytest.raises(NotLean, match="the embedding or the head"):
            FusedToken(board, *arguments)
    with pytest.raises(NotLean, match="a layer is the library's"):
        FusedToken(board, [*layers, object()], store, embedding, norm, head)  # type: ignore[list-item]
    shape = 8, len(board.x)
    stored = stored_matrix(random_matrix(*shape, MXFP4, 0)[0], MXFP4, shape)
    odd = dense.PackedEmbedding(get_kernels("cpu"), stored, torch.float32)
    with pytest.raises(NotLean, match="the embedding is stored"):
        FusedToken(board, layers, store, odd, norm, head)
