"""Where the time of decoding went: nothing is lost or counted twice, and the answer is the same."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

import flashpack
from flashpack.kernels.cpu.compiled import NativeKernels
from flashpack.kernels.cpu.native import compute
from flashpack.runtime.generate import Result, generate
from flashpack.runtime.lean.blocks import Experts
from flashpack.runtime.lean.board import Board, NotLean
from flashpack.runtime.lean.layers import MIXERS
from flashpack.runtime.timing import Parts, Split, Timing
from flashpack.runtime.tokenizer import load_tokenizer
from tests.cli.test_cli import in_process as command
from tests.conftest import PackOf

native = pytest.mark.skipif(isinstance(compute.library(), str), reason=f"no native kernels: {compute.library()}")

PROMPT = list(range(40, 60))


def run(pack: Any, timed: bool = True, tokens: int = 24, **options: Any) -> Result:
    model = flashpack.load(pack, **options)
    return generate(model, load_tokenizer(pack), PROMPT, tokens, timing=Timing(model) if timed else None)


def split_of(result: Result) -> Split:
    assert result.split is not None
    return result.split


def used(parts: Parts) -> set[str]:
    return {name for name in Parts.__annotations__ if getattr(parts, name)}


@native
@pytest.mark.parametrize("memory", [None, "smallest"])
def test_each_layer_is_split_and_the_answer_is_the_same(pack_of: PackOf, memory: str | None) -> None:
    pack = pack_of("trained")
    plain, timed = run(pack, False, memory=memory), run(pack, memory=memory)
    assert (timed.text, timed.generated_tokens) == (plain.text, 24)
    assert plain.split is None
    split = split_of(timed)
    assert (split.tokens, split.left, split.waited) == (23, 0, False)
    assert sorted(split.layers) == list(range(6))
    for i, parts in split.layers.items():
        mixer = "attention" if i in (2, 5) else "recurrent"
        assert {mixer, "router", "sums"} <= used(parts) <= {mixer, "router", "sums", "hits", "waits", "misses"}
        assert min(getattr(parts, name) for name in Parts.__annotations__) >= 0
    assert split.whole == pytest.approx(timed.generate_seconds / 23)
    assert sum(seconds for seconds, _ in split.total.values()) + split.rest == pytest.approx(split.whole)
    assert 0 < split.rest < split.whole
    assert split.total["router"][1] == 6
    assert split.total["attention"][1] == 2
    if memory == "smallest":
        assert split.hit_rate == 0
        assert split.total["waits"][0] > 0


@native
def test_only_what_was_decoded_is_counted(pack_of: PackOf) -> None:
    """The prompt's experts are read and computed before the count begins; the statistics of the run keep them."""
    result = run(pack_of("trained"))
    split, total = split_of(result), result.store["total"]
    assert split.read * split.tokens < total["bytes_read"]
    for name, key in (("waits", "wait_seconds"), ("misses", "miss_seconds")):
        assert split.total.get(name, (0, 0))[0] * split.tokens < total[key]


@native
def test_time_goes_to_the_part_that_took_it(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that does its work when it is waited for, by a clock on which nothing else takes time."""
    pack = pack_of("trained")
    model: Any = flashpack.load(pack)
    asked, clock = 0.0, 0.0

    def wait(kernels: NativeKernels) -> None:
        nonlocal asked, clock
        asked, clock = 0.0, clock + asked

    def slow(seconds: float, part: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal asked
            asked += seconds
            return part(*args)

        return call

    monkeypatch.setattr(NativeKernels, "wait", wait)
    for layer in model.flashpack.decoder.layers:
        layer.mixing.append(slow(1.0, lambda: None))
        layer.choosing.append(slow(2.0, lambda: None))
        layer.block.compute = slow(4.0, layer.block.compute)
        layer.block.combine = slow(8.0, layer.block.combine)
    steps = model.flashpack.decoder.board.steps
    monkeypatch.setattr(steps, "sequence", lambda some: lambda: [step() for step in some], raising=False)
    timing = Timing(model)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    split = split_of(generate(model, load_tokenizer(pack), PROMPT, 12, timing=timing))
    assert len(split.layers) == 6
    for parts in split.layers.values():
        assert (parts.attention + parts.recurrent, parts.router, parts.sums) == pytest.approx((1, 2, 8))
        assert parts.hits + parts.misses >= 4  # in one batch, or in more
        assert (parts.waits, parts.blocks) == (0, 0)
    assert split.rest == pytest.approx(0)


def test_of_the_librarys_layers_the_experts_are_known(pack_of: PackOf) -> None:
    pack = pack_of("trained")
    split = split_of(run(pack, reference=True))
    assert split.left == 6
    assert all(used(parts) <= {"hits", "waits", "misses", "sums"} for parts in split.layers.values())
    assert sorted(split.layers) == list(range(6))
    assert split.rest > 0


@native
def test_layers_of_both_kinds_and_a_block_without_experts(pack_of: PackOf) -> None:
    pack = pack_of("qwen3_moe_dense_first_tied")
    model = flashpack.load(pack)
    timing = Timing(model)
    whole: Any = model
    with torch.inference_mode():
        cache = whole(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
        timing.start()
        whole(torch.tensor([[4]]), past_key_values=cache, use_cache=True)
    split = timing.split(1, 1.0)
    assert used(split.layers[0]) == {"attention", "blocks"}
    assert {"attention", "router", "sums"} <= used(split.layers[1])
    assert split.left == 0


@native
def test_layers_and_blocks_that_stay_the_librarys(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four layers the library computes all but the experts, of one more the block."""
    real = Experts.__init__

    def refused(experts: Experts, board: Board, module: Any) -> None:
        real(experts, board, module)
        if experts.layer == 5:
            raise NotLean("another kind")

    monkeypatch.delitem(MIXERS, "linear_attn")
    monkeypatch.setattr(Experts, "__init__", refused)
    split = split_of(run(pack_of("trained")))
    assert split.left == 5
    experts = {"hits", "waits", "misses", "sums"}
    for i, parts in split.layers.items():
        assert used(parts) - experts == {2: {"attention", "router"}, 5: {"attention"}}.get(i, set())
        assert parts.sums > 0
    assert sorted(split.layers) == list(range(6))


def test_the_command_shows_it(pack_of: PackOf) -> None:
    options = ("run", pack_of("trained"), "--raw", "-p", "The os module", "--timing")
    done = command(*options, "--max-tokens", "6")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("[prompt 3 tokens")
    assert lines[1].startswith("milliseconds per token, mean of 5; ")
    assert lines[2].split() == ["token", "layer", "layers", "share"]
    assert any(line.startswith("experts: sums, and the store itself") for line in lines)
    shown = {line[:42].strip(): float(line[42:].split()[0]) for line in lines[3:-1]}
    assert sum(shown.values()) == pytest.approx(2 * shown["all"], abs=0.01)
    assert lines[-1].startswith("experts in memory ")
    result = json.loads(command(*options, "--max-tokens", "6", "--json").stdout)
    assert result["text"] == done.stdout.removesuffix("\n")
    assert result["timing"]["tokens"] == 5
    assert sum(result["timing"]["parts"].values()) == pytest.approx(result["timing"]["seconds_per_token"])
    alone = command(*options, "--max-tokens", "1")
    assert alone.stderr.splitlines()[-1] == "--timing: no token was decoded after the first"
