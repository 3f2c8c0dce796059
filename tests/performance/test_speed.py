"""Estimates of speed: the arithmetic, and what is measured for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flashpack.errors import MemoryBudgetError
from flashpack.formats import Pack
from flashpack.performance import speed, unconverted
from flashpack.performance.forecast import forecast
from flashpack.performance.replay import Replay, bursts_like, largest_record
from flashpack.performance.speed import Computing, estimate, totals
from flashpack.runtime import budget as budgets
from flashpack.runtime import load
from flashpack.runtime.budget import Budget
from flashpack.runtime.rates import Rate
from tests.conftest import PackOf

TOKEN = Computing(token=0.010, experts=0.004, weights=10**6, kernels="k", decoding="d", io="direct")


class Drive:
    """Answers as a ``Replay`` whose records take a millisecond and 1,000 bytes each."""

    def __init__(self) -> None:
        self.bursts: list[Any] = []

    def size(self, bursts: list[Any]) -> int:
        return 1000 * sum(map(len, bursts))

    def run(self, bursts: list[Any]) -> float:
        self.bursts += bursts
        return sum(map(len, bursts)) / 1000


def slots_of(pack: Pack, share: float) -> dict[int, int]:
    return {stride: int(share * count) for stride, count in budgets.stride_counts(pack.manifest).items()}


def estimated(pack: Pack, share: float, drive: Drive, top_k: int = 4, **options: Any) -> speed.Estimate:
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
    assert found.seconds == pytest.approx(0.006 + found.reading)
    assert found.reading > TOKEN.experts
    few = estimated(pack, 0.5, Drive(), hit_rate=lambda slots: 0.98)
    assert few.reading < TOKEN.experts
    assert few.seconds == pytest.approx(0.010)
    # Bursts are of one layer each, in the order of the layers, and ask for no expert twice.
    order = [burst[0][0] for burst in drive.bursts]
    assert all({layer for layer, _ in burst} == {burst[0][0]} for burst in drive.bursts)
    assert order[:layers] == sorted(order[:layers])
    assert all(len(set(burst)) == len(burst) for burst in drive.bursts)


def test_where_all_experts_fit_nothing_is_read_whatever_was_recorded(pack_of: PackOf) -> None:
    drive = Drive()
    found = estimated(Pack(pack_of("trained")), 1.0, drive, hit_rate=lambda slots: 0.1)
    assert (found.hit_rate, found.read_bytes, found.reading, found.rate) == (1.0, 0.0, 0.0, 0.0)
    assert found.seconds == pytest.approx(0.010)
    assert not drive.bursts
    assert found.to_json()["tokens_per_second"] == pytest.approx(100)


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
    bursts = bursts_like(pack, [{layers[0]: 3, layers[1]: 0, layers[2]: 9}, {layers[1]: 1}])
    assert [(burst[0][0], len(burst)) for burst in bursts] == [(layers[0], 3), (layers[2], 9), (layers[1], 1)]
    replay = Replay(pack, direct=False, readers=2)
    with pack.open_shard(pack.manifest.layers[0]) as shard:
        assert replay.size(bursts[:1]) == 3 * shard.extent(0)[1]
    seen: list[tuple[int, int]] = []
    read = replay._read
    replay._read = lambda one: (seen.append(one.key), read(one))[1]  # type: ignore[method-assign, func-returns-value]
    assert replay.run(bursts) > 0
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


@pytest.mark.parametrize("reference", [False, True])
def test_computing_is_measured_with_all_experts_of_a_token_in_memory(pack_of: PackOf, reference: bool) -> None:
    """Both ways to decode: flashpack's and the library's."""
    folder = pack_of("trained")
    pack = Pack(folder)
    model: Any = load(folder, context=64, reference=reference, prefetch=False)
    top_k = model.config.num_experts_per_tok
    found = speed.computing(model)
    assert 0 < found.experts < found.token
    asked = {e for _, e in model.flashpack.store.resident()}
    assert asked == set(range(top_k))
    used = sum(top_k * pack.manifest.record_kinds[layer.kinds[0][0]].nbytes for layer in pack.manifest.layers)
    embedding = sum(t.nbytes for t in pack.manifest.tensors if t.name.endswith("embed_tokens.weight"))
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

    monkeypatch.setattr(unconverted, "measure", measured)
    weights = unconverted.Weights(dense=10**8, used=10**8, experts=10**10, record=20000)
    least = Budget(10**8, 10**8, 10**8, 10**8, {32768: 2})
    (tmp_path / "blobs").mkdir()
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        (tmp_path / "blobs" / file.name).write_bytes(b"")
        file.symlink_to(tmp_path / "blobs" / file.name)
    found = unconverted.at_best(weights, files, least, 2 * 10**10, [5_400_000_000, 2 * 10**10])
    assert found is not None
    assert asked == [(tmp_path / "blobs", ["a", "b"], [32768])]
    assert found.drive == 1e9  # buffered reads came from the page cache
    half, whole = found.rows
    assert half.share == pytest.approx(0.5)
    assert half.tokens_per_second == pytest.approx(1 / (0.01 + 0.05))
    assert (whole.share, whole.tokens_per_second) == (1.0, pytest.approx(1 / 0.02))
    monkeypatch.setattr(unconverted, "measure", lambda *args: [])
    assert unconverted.at_best(weights, files, least, 10**10, []) is None


def test_a_source_that_cannot_be_read_has_no_speed(tmp_path: Path) -> None:
    weights = unconverted.Weights(dense=1, used=1, experts=10, record=1)
    assert unconverted.at_best(weights, [tmp_path / "none"], Budget(1, 1, 1, 1, {1: 2}), 10, []) is None
