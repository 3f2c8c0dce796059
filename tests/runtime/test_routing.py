"""Recording which experts a model uses: those of transformers' own model, whichever way it is computed, and the hits
that follow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flashpack
from flashpack.errors import ContextError, FormatError, UsageError
from flashpack.formats import Pack
from flashpack.formats.checksums import hexdigest
from flashpack.formats.routing import Routing, read_routing, write_routing
from flashpack.performance.policies import Runtime
from flashpack.performance.simulate import Requests
from flashpack.runtime import budget as budgets
from flashpack.runtime.experts import RoutedExperts
from flashpack.runtime.routing import RoutingRecorder, record
from flashpack.runtime.tokenizer import encode, load_tokenizer
from tests.conftest import ROOT, TRAINED, PackOf

TEXT = ROOT / "flashpack" / "cli" / "calibration.txt"
PROMPT = "What is 922 plus 291?"
STRIDE = 32768
HOW: dict[str, Any] = {"tokens": 60, "max_tokens": 12, "memory": "smallest", "context": 50}


def with_slots(monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """Loading gives the arena so many, whatever this process takes already."""
    divide = budgets.divide
    monkeypatch.setattr(budgets, "divide", lambda *how: replace(divide(*how), slots={STRIDE: slots}))


@pytest.fixture(scope="module")
def recorded(pack_of: PackOf) -> Routing:
    with pytest.MonkeyPatch.context() as patch:
        with_slots(patch, 60)
        return record(pack_of("trained"), [TEXT], [PROMPT], **HOW)


def test_hits_follow_from_what_was_recorded(
    recorded: Routing, pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text in two contexts, and a prompt, which is a chunk, with its answer; for other sizes of the arena as well."""
    runs = [recorded]
    with_slots(monkeypatch, 36)
    runs.append(record(pack_of("trained"), [TEXT], [PROMPT], **HOW))
    for routing in runs:
        assert routing.run is not None
        requests = Requests(routing)
        assert requests.fit(routing.run.slots)
        found = requests.simulate(routing.run.slots, Runtime).total
        assert (found.found, found.asked) == (routing.run.hits, routing.run.hits + routing.run.misses)
        assert 0 < found.rate < 1
        np.testing.assert_array_equal(routing.experts, recorded.experts)  # memory changes no result
    assert runs[0].run != runs[1].run


def test_what_is_said_of_tokens(recorded: Routing, pack_of: PackOf, tmp_path: Path) -> None:
    pack = Pack(pack_of("trained"))
    tokenizer = load_tokenizer(pack.folder)
    text = encode(tokenizer, TEXT.read_text(), special=False)[:60]
    asked = int(recorded.prompt.sum())
    count = len(recorded.tokens) - 60
    assert recorded.tokens[:60].tolist() == text
    assert recorded.positions.tolist() == [*range(50), *range(10), *range(count)]
    assert not recorded.prompt[:60].any()
    assert recorded.prompt[60:].tolist() == [i < asked for i in range(count)]
    assert recorded.steps[:61].tolist() == list(range(61))
    assert recorded.steps[60:].tolist() == [60 + max(0, i - asked + 1) for i in range(count)]
    assert tokenizer.decode(recorded.tokens[60 : 60 + asked]).find(PROMPT) > 0
    assert (recorded.layers, recorded.top_k, recorded.stride_counts()) == (tuple(range(6)), 4, {STRIDE: 192})
    assert recorded.about == {
        "pack": pack.identity,
        "architecture": "Qwen3_5MoeForCausalLM",
        "texts": json.dumps([hexdigest(TEXT.read_bytes()), hexdigest(PROMPT.encode())]),
    }
    write_routing(tmp_path / "a", recorded)
    assert read_routing(tmp_path / "a").run == recorded.run


@pytest.mark.parametrize("reference", [False, True], ids=["steps", "the library"])
def test_experts_and_weights_are_those_of_transformers_own_model(pack_of: PackOf, reference: bool) -> None:
    from transformers import AutoModelForCausalLM

    routing = record(pack_of("trained", "source", "source"), [TEXT], tokens=24, reference=reference)
    model = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32).eval()
    seen: dict[int, Any] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, args, number=number: seen.__setitem__(number, [a.detach().numpy() for a in args])
        )
    with torch.inference_mode():
        model.model(input_ids=torch.from_numpy(routing.tokens.astype(np.int64))[None], use_cache=False)
    for number in range(6):
        _, experts, weights = seen[number]
        order = np.argsort(-weights, axis=1)
        expected = np.take_along_axis(experts, order, 1), np.take_along_axis(weights, order, 1)
        same = routing.experts[:, number] == expected[0]
        assert same.mean() > 0.98  # weights that are nearly equal may change places
        assert np.abs(routing.weights[:, number][same] - expected[1][same]).max() < 1e-3
        assert (np.diff(routing.weights[:, number].astype(np.float32), axis=1) <= 0).all()


def test_the_model_is_as_it_was_after_recording(pack_of: PackOf) -> None:
    model: Any = flashpack.load(pack_of("trained"), context=64)
    blocks = model.flashpack.decoder.experts
    with pytest.raises(ZeroDivisionError), RoutingRecorder(model).watching():
        raise ZeroDivisionError
    assert all(block.routed == block._routed for block in blocks)
    kinds = {type(m.flashpack) for m in model.modules() if hasattr(m, "flashpack") and m is not model}
    assert kinds == {RoutedExperts}


def test_experts_that_are_none_come_last(pack_of: PackOf) -> None:
    """Routers say with an index behind the last expert that a token has none."""
    model: Any = flashpack.load(pack_of("trained"), context=64)
    list(model.flashpack.store.batches(0, [1]))  # before recording began
    recorder = RoutingRecorder(model)
    index = torch.tensor([[32, 3, 40, 7]])
    for layer in range(6):
        recorder._note(layer, index, torch.tensor([[0.9, 0.1, 0.5, 0.4]]))
    with pytest.raises(FormatError, match="do not all take every token"):
        recorder.routing({})
    recorder.took([5], 0, 0)
    routing = recorder.routing({})
    assert routing.experts[0, 0].tolist() == [7, 3, 255, 255]
    assert routing.run is not None
    assert routing.run.hits == routing.run.misses == 0
    assert routing.weights[0, 0].tolist() == [np.float16(0.4), np.float16(0.1), 0, 0]
    with pytest.raises(UsageError, match="513 tokens at once cannot be recorded; give 512"):
        recorder._note(0, torch.zeros(513, 4, dtype=torch.int64), torch.zeros(513, 4))


def test_what_cannot_be_recorded_is_said_before_anything_runs(pack_of: PackOf, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    begun: list[int] = []
    with pytest.raises(UsageError, match=r"--text .*empty\.txt: the text is empty"):
        record(pack_of("trained"), [TEXT, empty], begin=begun.append)
    with pytest.raises(ContextError, match=r"a prompt has .* tokens, the context 8; shorten it or raise --context"):
        record(pack_of("trained"), [TEXT], [PROMPT], context=8, begin=begun.append)
    assert not begun
