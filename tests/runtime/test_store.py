"""The expert store: right bytes in the right order of events, pins, errors, counts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashpack.errors import FormatError, IntegrityError
from flashpack.formats import Pack
from flashpack.kernels import get_kernels
from flashpack.kernels.interface import RecordView, StoredMatrix
from flashpack.runtime.budget import stride_counts
from flashpack.runtime.store import ExpertStore
from tests.conftest import PackOf
from tests.formats.test_verify import flip

CPU = get_kernels("cpu")


def open_store(path: Path, slots: int, check: str = "first") -> tuple[Pack, ExpertStore]:
    pack = Pack(path)
    return pack, ExpertStore(pack, CPU, dict.fromkeys(stride_counts(pack.manifest), slots), check)


def record_bytes(pack: Pack, layer: int, expert: int) -> bytes:
    entry = pack.layer(layer)
    with pack.open_shard(entry) as shard:
        offset, stride = shard.extent(expert)
    return (pack.folder / entry.path).read_bytes()[offset : offset + stride]


def stream(store: ExpertStore, layer: int, experts: list[int]) -> Iterator[tuple[int, RecordView]]:
    for batch in store.batches(layer, experts):
        yield from batch


@pytest.mark.parametrize("slots", [1, 2, 5, 64])
def test_every_expert_comes_once_with_its_own_bytes(pack_of: PackOf, slots: int) -> None:
    pack, store = open_store(pack_of("qwen3_moe"), slots)
    rng = random.Random(slots)
    for _ in range(40):
        layer = rng.randrange(3)
        experts = sorted(rng.sample(range(8), rng.randint(1, 8)))
        seen = []
        for expert, record in stream(store, layer, experts):
            seen.append(expert)
            raw = record_bytes(pack, layer, expert)
            down = record.down
            first = record.first[0]
            assert isinstance(down, StoredMatrix)
            assert isinstance(first, StoredMatrix)
            assert down.weight.numpy().tobytes() in raw
            assert first.weight.numpy().tobytes() == raw[: first.weight.nbytes]
        assert sorted(seen) == experts
    store.close()


def test_counts_hits_misses_and_bytes(pack_of: PackOf) -> None:
    pack, store = open_store(pack_of("qwen3_moe"), 4)
    stride = pack.manifest.record_kinds[0].stride
    list(stream(store, 0, [0, 1, 2]))
    list(stream(store, 0, [1, 2, 3]))
    stats = store.stats.layers[0]
    assert (stats.hits, stats.misses, stats.reads, stats.bytes_read) == (2, 4, 4, 4 * stride)
    assert store.stats.hit_rate == 2 / 6
    list(stream(store, 0, [4]))  # evicts 0, the least recently used
    list(stream(store, 0, [1, 2, 3, 4]))
    assert store.stats.layers[0].hits == 6
    store.stats.reset()
    assert store.stats.total().misses == 0


def test_a_watcher_knows_at_any_time_where_records_are(pack_of: PackOf) -> None:
    """Also of what was there before it came; and before a slot is read into, that its record is gone."""
    pack, store = open_store(pack_of("qwen3_moe"), 5)
    list(stream(store, 0, [0, 1]))
    here: dict[tuple[int, int], RecordView] = {}
    read_into = store._records.read_into

    def watcher(key: tuple[int, int], record: RecordView | None) -> None:
        if record is None:
            del here[key]
        else:
            here[key] = record

    def reads(key: tuple[int, int], record: memoryview) -> None:
        assert key not in here
        assert len(here) < 5
        read_into(key, record)

    store.watch(watcher)
    store._records.read_into = reads  # type: ignore[method-assign]
    assert set(here) == {(0, 0), (0, 1)}
    rng = random.Random(3)
    for _ in range(40):
        layer, experts = rng.randrange(3), sorted(rng.sample(range(8), 3))
        list(stream(store, layer, experts))
        assert {(layer, e) for e in experts} <= set(here) <= set(store.resident())
    for (layer, expert), record in here.items():
        down = record.down
        assert isinstance(down, StoredMatrix)
        assert down.weight.numpy().tobytes() in record_bytes(pack, layer, expert)
    store.close()


def test_a_step_begins_with_all_that_has_been_read(pack_of: PackOf) -> None:
    """Also what nobody has waited for."""
    _, store = open_store(pack_of("qwen3_moe"), 5)
    here: list[tuple[int, int]] = []
    store.watch(lambda key, record: here.append(key))
    store.warm({(0, 3): 0.5, (2, 1): 0.25})
    while store._pool.landed.qsize() < 2:
        time.sleep(0.001)
    assert here == []
    store.begin()
    assert sorted(here) == [(0, 3), (2, 1)]
    store.close()


def test_what_was_found_and_used_counts_as_a_request(pack_of: PackOf) -> None:
    _, store = open_store(pack_of("qwen3_moe"), 6)
    list(stream(store, 0, [0, 1]))
    list(stream(store, 1, [2]))
    store.begin()
    store.begin()  # by a token that came to nothing, as it were
    store.found(0, [1], 0.5)
    store.found(1, [2], 0.25)
    stats = store.stats
    assert stats.steps == 2
    store.begin()
    list(stream(store, 0, [1]))
    assert stats.steps == 3
    list(stream(store, 0, [1]))
    assert stats.steps == 4
    assert [(stats.layers[i].hits, stats.layers[i].misses) for i in (0, 1)] == [(3, 2), (1, 1)]
    assert stats.layers[0].hit_seconds >= 0.5
    assert store.used() == [(0, 1)]
    store.close()


def test_tells_what_the_step_under_way_has_used(pack_of: PackOf) -> None:
    _, store = open_store(pack_of("qwen3_moe"), 6)
    list(stream(store, 0, [0, 1]))
    list(stream(store, 1, [2]))
    assert sorted(store.used()) == [(0, 0), (0, 1), (1, 2)]
    list(stream(store, 0, [3]))
    assert store.used() == [(0, 3)]
    assert sorted(store.resident()) == [(0, 0), (0, 1), (0, 3), (1, 2)]
    store.close()


def test_hits_come_before_misses(pack_of: PackOf) -> None:
    _, store = open_store(pack_of("qwen3_moe"), 8)
    list(stream(store, 0, [5, 6]))
    assert [e for e, _ in stream(store, 0, [1, 5, 6])] == [5, 6, 1]


def test_a_failed_read_is_an_error_and_leaves_nothing_behind(pack_copy: Callable[..., Path]) -> None:
    path = pack_copy("qwen3_moe")
    pack, store = open_store(path, 2)
    shard = path / pack.layer(1).path
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=r"layer-0001.safetensors: file ends"):
        list(stream(store, 1, list(range(8))))
    shard.write_bytes(whole)
    for _ in range(2):
        assert [e for e, _ in stream(store, 1, [7])] == [7]
        assert sorted(e for e, _ in stream(store, 1, [0, 1, 2, 3])) == [0, 1, 2, 3]


def test_an_abandoned_stream_releases_its_slots(pack_of: PackOf) -> None:
    _, store = open_store(pack_of("qwen3_moe"), 2)
    for _ in range(5):
        for _expert, _record in stream(store, 0, [0, 1, 2, 3]):
            break
    assert sorted(e for e, _ in stream(store, 0, [4, 5, 6, 7])) == [4, 5, 6, 7]


def test_a_damaged_expert_stops_the_run_and_is_named_with_the_command_that_mends_it(
    pack_copy: Callable[..., Path],
) -> None:
    path = pack_copy("qwen3_moe")
    pack, store = open_store(path, 8)
    with pack.open_shard(pack.layer(1)) as shard:
        offset, _ = shard.extent(5)
    flip(path / pack.layer(1).path, offset + 9)
    assert len(list(stream(store, 1, [0, 1, 2]))) == 3
    with pytest.raises(IntegrityError, match=rf"layer 1, expert 5: .* 'flashpack repair {path} --from") as caught:
        list(stream(store, 1, [0, 5]))
    assert caught.value.exit_code == 5
    # The slot of the damaged record is free again, and what is asked for next is served.
    assert sorted(e for e, _ in stream(store, 1, [0, 1, 2, 3, 4, 6, 7])) == [0, 1, 2, 3, 4, 6, 7]
    with pytest.raises(IntegrityError):
        list(stream(store, 1, [5]))


@pytest.mark.parametrize(("check", "later"), [("first", True), ("always", False), ("never", True)])
def test_damage_after_the_first_read_is_seen_only_if_every_read_is_checked(
    pack_copy: Callable[..., Path], check: str, later: bool
) -> None:
    path = pack_copy("qwen3_moe")
    pack, store = open_store(path, 1, check)
    with pack.open_shard(pack.layer(0)) as shard:
        places = {e: shard.extent(e)[0] for e in (2, 3)}
    list(stream(store, 0, [2]))
    for place in places.values():
        flip(path / pack.layer(0).path, place)
    # One slot: 3 evicts nothing that is checked before it is read, 2 must be read again.
    for expert, good in ((3, check == "never"), (4, True), (2, later)):
        if good:
            assert [e for e, _ in stream(store, 0, [expert])] == [expert]
        else:
            with pytest.raises(IntegrityError, match=f"expert {expert}"):
                list(stream(store, 0, [expert]))


def wait_for(store: ExpertStore, records: int) -> None:
    """Until so many reads that nobody waits for have landed (or failed)."""
    deadline = time.monotonic() + 30
    while store._pool.landed.qsize() < records:
        assert time.monotonic() < deadline
        time.sleep(0.005)
