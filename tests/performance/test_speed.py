"""Estimates of speed: the arithmetic, and what is measured for it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from flashpack.cli import speeds
from flashpack.converter import Options
from flashpack.converter.convert import bound
from flashpack.errors import MemoryBudgetError
from flashpack.formats import Pack
from flashpack.kernels.cpu import steps
from flashpack.performance import roofline, simulate, speed
from flashpack.performance.forecast import forecast
from flashpack.performance.replay import Replay, bursts_like, largest_record
from flashpack.performance.speed import Computing, estimate, totals
from flashpack.runtime import budget as budgets
from flashpack.runtime import load
from flashpack.runtime.budget import Budget
from flashpack.runtime.profile import Profile
from flashpack.runtime.rates import Rate
from tests.cli.test_cli import in_process as flashpack
from tests.conftest import TRAINED, PackOf, source_of

TOKEN = Computing(0.010, at_once=0.009, experts=0.004, weights=10**6, kernels="k", decoding="d", io="direct", why="")


class Drive:
    """Answers as a ``Replay`` whose records take a millisecond and 1,000 bytes each."""

    def __init__(self) -> None:
        self.bursts: list[Any] = []
        self.runs = 0

    def size(self, bursts: list[Any]) -> int:
        return 1000 * sum(map(len, bursts))

    def run(self, bursts: list[Any]) -> list[float]:
        self.bursts += bursts
        self.runs += 1
        return [len(burst) / 1000 for burst in bursts]


def slots_of(pack: Pack, share: float) -> dict[int, int]:
    return {stride: int(share * count) for stride, count in budgets.stride_counts(pack.manifest).items()}


def estimated(pack: Pack, share: float, drive: Drive, top_k: int = 4, **options: Any) -> speed.Estimate:
    random.seed(1)  # which are missed is drawn
    budget = Budget(1, 2, 3, 4, slots_of(pack, share))
    replay: Any = drive
    return estimate(pack, TOKEN, 7, budget, top_k, replay, **options)


def test_a_token_takes_the_longer_of_reading_and_experts_beside_the_rest(pack_of: PackOf) -> None:
    pack, drive = Pack(pack_of("trained")), Drive()
    layers = len(pack.manifest.layers)
    found = estimated(pack, 0.5, drive)
    assert (found.memory, found.share, found.hit_rate) == (7, 0.5, 0.5)
    assert found.read_bytes == pytest.approx(1000 * layers * 4 * 0.5, rel=0.1)
    assert found.reading == pytest.approx(found.read_bytes / 10**6)
    assert found.rate == pytest.approx(10**6)
    each = TOKEN.experts / layers  # of computing in a layer: reading one record takes longer here
    nothing = 0.5**4  # of the layers miss nothing
    assert found.seconds == pytest.approx(0.006 + found.reading + nothing * layers * each, rel=0.05)
    few = estimated(pack, 0.5, Drive(), hit_rate=lambda slots: 0.98)
    assert few.reading < TOKEN.experts
    assert few.seconds > 0.010  # no layer waits for another's reads, and one that reads waits longer than it computes
    assert few.seconds == pytest.approx(0.010 + few.reading * (1 - 1000 * each), rel=0.05)
    slow = Computing(token=1.0, at_once=0.9, experts=0.9, weights=1, kernels="", decoding="", io="", why="")
    replay: Any = Drive()
    hidden = estimate(pack, slow, 7, Budget(1, 2, 3, 4, slots_of(pack, 0.5)), 4, replay)
    assert hidden.seconds == pytest.approx(1.0)  # all reading is hidden behind computing
    # Bursts are of one layer each, and ask for no expert twice.
    assert all({layer for layer, _ in burst} == {burst[0][0]} for burst in drive.bursts)
    assert all(len(set(burst)) == len(burst) for burst in drive.bursts)


def test_where_all_experts_fit_nothing_is_read_whatever_was_recorded(pack_of: PackOf) -> None:
    drive = Drive()
    found = estimated(Pack(pack_of("trained")), 1.0, drive, hit_rate=lambda slots: 0.1)
    assert (found.hit_rate, found.read_bytes, found.reading, found.rate) == (1.0, 0.0, 0.0, 0.0)
    assert found.seconds == pytest.approx(0.009)
    assert not drive.bursts
    assert found.to_json()["tokens_per_second"] == pytest.approx(1 / 0.009)


def test_totals_for_shares_of_the_experts_as_far_as_memory_goes() -> None:
    gb = 10**9
    assert totals(1 * gb, 10 * gb, gb // 2, 20 * gb, []) == [2 * gb, 35 * gb // 10, 6 * gb, 11 * gb]
    assert totals(1 * gb, 10 * gb, gb // 2, 5 * gb, []) == [2 * gb, 35 * gb // 10, 5 * gb]
    assert totals(1 * gb, 10 * gb, 3 * gb, 20 * gb, [])[0] == 3 * gb
    assert totals(1 * gb + 1, 10 * gb, 0, 20 * gb, [])[0] == 21 * gb // 10
    assert totals(1 * gb, 10 * gb, gb, 2 * gb, [7, 8]) == [7, 8]


def test_replayed_reads_are_those_of_the_pack(pack_of: PackOf) -> None:
    pack = Pack(pack_of("trained"))
    layers = [layer.index for layer in pack.manifest.layers]
    assert len(bursts_like(pack, [{layers[0]: 10**6}])[0]) == pack.manifest.layers[0].experts
    drawn = {tuple(bursts_like(pack, [{layers[0]: 5}])[0]) for _ in range(5)}
    assert len(drawn) > 1  # not the same records each time
    bursts = bursts_like(pack, [{layers[0]: 3, layers[1]: 0, layers[2]: 9}, {layers[1]: 1}])
    assert [(burst[0][0], len(burst)) for burst in bursts] == [(layers[0], 3), (layers[2], 9), (layers[1], 1)]
    replay = Replay(pack, direct=False, readers=2)
    with pack.open_shard(pack.manifest.layers[0]) as shard:
        assert replay.size(bursts[:1]) == 3 * shard.extent(0)[1]
    seen: list[tuple[int, int]] = []
    read = replay._read
    slots: list[int] = []

    def spied(one: Any) -> None:
        seen.append(one.key)
        slots.append(one.slot)
        read(one)

    replay._read = spied  # type: ignore[method-assign]
    assert [seconds > 0 for seconds in replay.run(bursts)] == [True] * len(bursts)
    assert {slot for slot in slots if slot in (0, 1)} == {0, 1} == set(slots)
    assert sorted(seen) == sorted(key for burst in bursts for key in burst)
    replay.close()
    replay.close()
    assert largest_record(pack) == max(kind.stride for kind in pack.manifest.record_kinds)


def test_a_replay_says_what_cannot_be_read(pack_copy: Any) -> None:
    pack = Pack(pack_copy("trained"))
    replay = Replay(pack, direct=False)
    path = pack.folder / pack.manifest.layers[0].path
    with open(path, "r+b") as f:
        f.truncate(4096)
    layer = pack.manifest.layers[0]
    with pytest.raises((OSError, Exception), match=layer.path):
        replay.run([[(layer.index, layer.experts - 1)]])
    replay.close()


@pytest.mark.parametrize(("name", "reference"), [("trained", False), ("trained", True), ("qwen3_moe", False)])
def test_computing_is_measured_with_all_experts_of_a_token_in_memory(
    pack_of: PackOf, name: str, reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways to decode: flashpack's, in one call once the experts are there, and the library's; with an embedding
    that is the head, too, or is not."""
    done: list[int] = []
    call = steps._FusedCall.__call__
    monkeypatch.setattr(steps._FusedCall, "__call__", lambda one: (done.append(call(one)), done[-1])[1])
    folder = pack_of(name)
    pack = Pack(folder)
    model: Any = load(folder, context=64, reference=reference, prefetch=False)
    top_k = model.config.num_experts_per_tok
    found = speed.computing(model)
    assert 0 < found.experts < found.token
    assert done == ([] if reference else (speed.WARM + speed.TOKENS - 1) * [len(pack.manifest.layers)])
    assert found.at_once > 0
    asked = {e for _, e in model.flashpack.store.resident()}
    assert asked == set(range(top_k))
    used = sum(top_k * pack.manifest.record_kinds[layer.kinds[0][0]].nbytes for layer in pack.manifest.layers)
    embedding = sum(t.nbytes for t in pack.manifest.tensors if ".embed_tokens." in t.name)
    tied = model.config.get_text_config().tie_word_embeddings
    assert found.weights == pack.dense_bytes - (0 if tied else embedding) + used
    assert speed.token_slots(pack, top_k) == {largest_record(pack): len(pack.manifest.layers) * top_k}
    assert speed.token_arena(pack, top_k) == len(pack.manifest.layers) * top_k * largest_record(pack)


def test_a_forecast_of_a_pack(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "READ_SECONDS", 0.01)
    monkeypatch.setattr(speed, "memory_rate", lambda threads: 1e9)
    found = forecast(pack_of("trained"), [], context=64)
    assert found.estimates
    assert found.context == 64
    assert found.least.total <= found.estimates[0].memory
    assert [e.share for e in found.estimates] == sorted(e.share for e in found.estimates)
    assert found.to_json()["routing"] == "even"
    with pytest.raises(MemoryBudgetError, match="too small"):
        forecast(pack_of("trained"), [found.least.total // 2], context=64)
    parts = speed.budgets_for(Pack(pack_of("trained")), found.least, found.most, [found.least.total + 10**6])
    ((total, budget),) = parts.items()
    assert (budget.kv, budget.dense, budget.work) == (found.least.kv, found.least.dense, found.least.work)
    assert budget.total <= total


def test_a_forecast_gets_the_memory_that_it_needs(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first estimate of it is too small; and the profile's readers and threads are used."""
    import torch

    from flashpack.performance import forecast as forecasts

    monkeypatch.setattr(speed, "READ_SECONDS", 0.01)
    monkeypatch.setattr(speed, "memory_rate", lambda threads: 1e9)
    monkeypatch.setattr(speed, "token_arena", lambda pack, top_k: -(2**26))
    monkeypatch.setattr(forecasts, "profile_of", lambda pack: Profile(readers=3, threads=7))
    seen: list[Any] = []
    monkeypatch.setattr(forecasts, "Replay", lambda *args: seen.append(args) or Replay(*args))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: seen.append(count))
    found = forecast(pack_of("trained"), [60 * 10**9], context=64)
    assert found.computing.token > 0
    assert 7 in seen
    assert [args[2] for args in seen if isinstance(args, tuple)] == [3]


def test_recorded_routing_makes_the_hit_rate(pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of another pack of the model; from the second half of what was recorded."""
    monkeypatch.setattr(speed, "READ_SECONDS", 0.01)
    text = tmp_path / "own.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    made = flashpack(
        "trace", pack_of("trained"), "--text", text, "--tokens", 24, "--context", 64, "--out", tmp_path / "r.routing"
    )
    assert made.returncode == 0, made.stderr
    other = pack_of("trained", experts="source", dense="source")
    options = ["--context", 64, "--memory", "59GB", "--memory", "60GB", "--trace", tmp_path / "r.routing", "--json"]
    done = flashpack("plan", other, *options)
    data = json.loads(done.stdout)
    assert data["routing"] == "recorded"
    routing = speeds.recorded(tmp_path / "r.routing", other)
    assert routing is not None
    layers = len(Pack(other).manifest.layers)
    slots = dict.fromkeys(budgets.stride_counts(Pack(other).manifest), layers * 5)
    settled, all_of_it = simulate.hit_rate(routing, slots, warmed_up=True), simulate.hit_rate(routing, slots)
    assert 0 < all_of_it < settled < 1
    monkeypatch.setattr(speed, "budgets_for", lambda *args: {1: Budget(1, 2, 3, 4, slots)})
    assert forecast(other, [], context=64, routing=routing).estimates[0].hit_rate == settled
    refused = flashpack("plan", pack_of("qwen3_moe"), "--trace", tmp_path / "r.routing")
    assert "of another model" in refused.stderr


def test_the_rate_of_memory_is_bytes_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(speed, "spare", lambda: 4 * 2**20)
    assert speed.memory_rate(2) == 2**20


def test_the_arena_and_the_weights_of_a_token_where_records_have_two_sizes(tmp_path: Path) -> None:
    import flashpack as api

    api.convert(TRAINED, tmp_path / "out", bpw=2.8, quality="fast")
    pack = Pack(tmp_path / "out")
    needed = speed.token_slots(pack, 2)
    assert sum(needed.values()) == 2 * len(pack.manifest.layers)
    counts = budgets.stride_counts(pack.manifest)
    assert len(counts) == 2
    arena = speed.token_arena(pack, 2)
    least = dict.fromkeys(counts, 0)
    assert all(budgets.spread(counts, least, arena)[stride] >= count for stride, count in needed.items())
    assert not all(budgets.spread(counts, least, arena // 2)[stride] >= count for stride, count in needed.items())
    model: Any = load(tmp_path / "out", memory="smallest", context=64)
    top_k, records = model.config.num_experts_per_tok, []
    for layer in pack.manifest.layers:
        with pack.open_shard(layer) as shard:
            records.append(sum(shard.kind(e).nbytes for e in range(layer.experts)) / layer.experts)
    assert speed._weights(model) == pack.dense_bytes + int(top_k * sum(records))  # the embedding is the head, too


def test_where_hardly_anything_is_read_measuring_ends(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "MOST_TOKENS", 20)
    drive = Drive()
    estimated(Pack(pack_of("trained")), 0.5, drive, hit_rate=lambda slots: 1 - 1e-9)
    assert drive.runs == 20


def test_a_forecast_that_memory_is_too_small_for(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashpack.performance.forecast.spare", lambda: 10**6)
    with pytest.raises(MemoryBudgetError, match=r"measuring takes .* can be taken"):
        forecast(pack_of("trained"), [], context=64)


def test_a_pack_that_does_not_exist_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "memory_rate", lambda threads: 1e10)
    asked: list[Any] = []

    def measured(folder: Path, files: Any, sizes: Any, seconds: float) -> list[Rate]:
        asked.append((folder, files, sizes))
        return [Rate(sizes[0], 1e9, 2e9, 0.5)]

    monkeypatch.setattr(roofline, "measure", measured)
    weights = roofline.Weights(dense=10**8, used=10**8, experts=10**10, record=20000)
    least = Budget(10**8, 10**8, 10**8, 10**8, {32768: 2})
    (tmp_path / "blobs").mkdir()
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        (tmp_path / "blobs" / file.name).write_bytes(b"")
        file.symlink_to(tmp_path / "blobs" / file.name)
    with pytest.raises(MemoryBudgetError, match="too small: the pack will need at least"):
        roofline.roofline(weights, files, least, 10**10, [least.total - 1])
    found = roofline.roofline(weights, files, least, 2 * 10**10, [5_400_000_000, 2 * 10**10])
    assert found is not None
    assert asked == [(tmp_path / "blobs", ["a", "b"], [32768])]
    assert found.drive == 1e9  # buffered reads came from the page cache
    half, whole = found.rows
    assert half.share == pytest.approx(0.5)
    assert half.tokens_per_second == pytest.approx(1 / (0.01 + 0.05))
    assert (whole.share, whole.tokens_per_second) == (1.0, pytest.approx(1 / 0.02))
    monkeypatch.setattr(roofline, "measure", lambda *args: [])
    assert roofline.roofline(weights, files, least, 10**10, []) is None


@pytest.mark.parametrize("name", ["trained", "qwen3_moe"])  # whose embedding is the head, too, and is not
def test_the_weights_of_a_token_are_those_of_the_pack_that_is_made(pack_of: PackOf, name: str) -> None:
    source = bound(source_of(name))
    told = roofline.weights_of(source.plan(Options()), source.model)
    source.checkpoint.folder.close()
    pack = Pack(pack_of(name))
    embedding = sum(t.nbytes for t in pack.manifest.tensors if ".embed_tokens." in t.name)
    tied = source.model.config.get_text_config().tie_word_embeddings
    assert tied == (name == "trained")
    assert told.dense == sum(t.nbytes for t in pack.manifest.tensors) - (0 if tied else embedding)
    records = sum(s * n for s, n in budgets.stride_counts(pack.manifest).items())
    assert (told.experts, told.record) == (records, largest_record(pack))
    layer = pack.manifest.layers[0]
    assert told.used == records * source.model.config.num_experts_per_tok // layer.experts


def test_a_source_that_cannot_be_read_has_no_speed(tmp_path: Path) -> None:
    weights = roofline.Weights(dense=1, used=1, experts=10, record=1)
    assert roofline.roofline(weights, [tmp_path / "none"], Budget(1, 1, 1, 1, {1: 2}), 10, []) is None


def test_the_least_memory_of_a_tuned_pack_has_room_for_its_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They need memory for compressed records."""
    import flashpack as api
    from flashpack.runtime import forecast as least_memory

    api.convert(source_of("qwen3_moe"), tmp_path / "out", codec="zstd", quality="fast")
    pack, works = Pack(tmp_path / "out"), []
    for readers in (8, 32):
        for place in ("flashpack.runtime.profile", "flashpack.runtime.forecast"):
            monkeypatch.setattr(f"{place}.profile_of", lambda pack, readers=readers: Profile(readers=readers))
        told = least_memory.smallest_of(pack, 64)[0]
        model: Any = load(tmp_path / "out", memory="smallest", context=64)
        assert told.work == model.flashpack.budget.work
        works.append(told.work)
    assert works[1] - works[0] == 24 * largest_record(pack)
