"""Warm start: what is remembered, that damage to it is no harm, and that it never changes a result."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path

import pytest
import torch

import flashpack
from flashpack import user_cache
from flashpack.formats import Pack
from flashpack.kernels import get_kernels
from flashpack.runtime import warm
from flashpack.runtime.budget import stride_counts
from flashpack.runtime.store import ExpertStore
from tests.conftest import PackOf
from tests.runtime.test_store import record_bytes, stream, wait_for


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_ranking_is_read_as_it_was_written_hottest_first(pack_of: PackOf) -> None:
    pack = Pack(pack_of("qwen3_moe"))
    ranking = [((1, 7), 0.5), ((0, 3), 0.25), ((2, 0), 1e-6)]
    warm.write(pack, ranking)
    assert list(warm.read(pack).items()) == ranking
    assert warm.read(Pack(pack_of("mixtral"))) == {}
    path = warm.history_path(pack)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_nothing_is_written_where_nothing_was_asked_for(pack_of: PackOf, folder: Path) -> None:
    pack = Pack(pack_of("qwen3_moe"))
    warm.write(pack, [])
    assert not folder.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"version":1,"pack":"ID"}',
        '{"version":2,"pack":"ID","experts":[]}',
        '{"version":1,"pack":"0","experts":[[0,0,0.5]]}',
        '{"version":1,"pack":"ID","experts":5}',
        '{"version":1,"pack":"ID","experts":[5]}',
        '{"version":1,"pack":"ID","experts":[[0,1]]}',
        '{"version":1,"pack":"ID","experts":[[0,8,0.5]]}',
        '{"version":1,"pack":"ID","experts":[[0,-1,0.5]]}',
        '{"version":1,"pack":"ID","experts":[[3,1,0.5]]}',
        '{"version":1,"pack":"ID","experts":[[0,1,1.5]]}',
        '{"version":1,"pack":"ID","experts":[[0,1,-0.1]]}',
        '{"version":1,"pack":"ID","experts":[[0,1,NaN]]}',
        '{"version":1,"pack":"ID","experts":[[0,true,0.5]]}',
        '{"version":1,"pack":"ID","experts":[[[],1,0.5]]}',
        "[" * 100_000,
        " " * (2 * 2**20 + 1),
    ],
)
def test_a_damaged_history_is_as_good_as_none_and_is_written_anew(pack_of: PackOf, text: str) -> None:
    pack = Pack(pack_of("qwen3_moe"))
    path = warm.history_path(pack)
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("ID", pack.identity))
    assert warm.read(pack) == {}
    warm.write(pack, [((0, 1), 0.5)])
    assert warm.read(pack) == {(0, 1): 0.5}


def test_a_folder_that_cannot_be_used_is_no_error(pack_of: PackOf, folder: Path) -> None:
    pack = Pack(pack_of("qwen3_moe"))
    folder.write_text("a file where the folder should be")
    warm.write(pack, [((0, 1), 0.5)])
    assert warm.read(pack) == {}
    folder.unlink()
    warm.history_path(pack).mkdir(parents=True)  # a folder where the file should be
    warm.write(pack, [((0, 1), 0.5)])
    assert warm.read(pack) == {}
    assert len(list(warm.history_path(pack).parent.iterdir())) == 1  # no partial file stays


def test_the_folder_is_the_systems_for_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setattr("sys.platform", "linux")
    assert user_cache.folder() == tmp_path / ".cache/flashpack"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache.folder() == tmp_path / ".cache/flashpack"
    monkeypatch.setattr("sys.platform", "darwin")
    assert user_cache.folder() == tmp_path / "Library/Caches/flashpack"


def test_the_variable_decides_unless_the_caller_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [warm.wanted(w) for w in (None, True, False)] == [False, True, False]  # it is 0 in tests
    monkeypatch.delenv("FLASHPACK_WARM")
    assert [warm.wanted(w) for w in (None, True, False)] == [True, True, False]


def test_the_hottest_experts_are_read_before_anybody_asks(pack_of: PackOf) -> None:
    pack = Pack(pack_of("qwen3_moe"))
    (stride,) = stride_counts(pack.manifest)
    store = ExpertStore(pack, get_kernels("cpu"), {stride: 5})
    scores = {(1, e): 0.9 - e / 10 for e in range(8)}
    store.warm(scores)
    wait_for(store, 5)
    # The five hottest fit; hits need no read.
    assert [e for e, _ in stream(store, 1, [0, 1, 2, 3, 4])] == [0, 1, 2, 3, 4]
    total = store.stats.total()
    assert (total.hits, total.misses, total.ahead_bytes, total.bytes_read) == (5, 0, 5 * stride, 5 * stride)
    assert store.ranking()[0][0] == (1, 0)
    store.close()


def test_what_is_asked_for_while_the_store_warms_comes_right(pack_of: PackOf) -> None:
    """Demand takes queued reads over, and slots from those that have not begun."""
    pack = Pack(pack_of("qwen3_moe"))
    (stride,) = stride_counts(pack.manifest)
    rng = random.Random(4)
    for slots in (2, 3, 7, 24):
        store = ExpertStore(pack, get_kernels("cpu"), {stride: slots})
        everything = [(layer, e) for layer in range(3) for e in range(8)]
        store.warm(dict.fromkeys(rng.sample(everything, len(everything)), 0.5))
        for step in range(9):
            layer, experts = step % 3, sorted(rng.sample(range(8), 4))
            seen = []
            for expert, record in stream(store, layer, experts):
                seen.append(expert)
                weight = record.first[0].weight  # type: ignore[union-attr]
                assert weight.numpy().tobytes() == record_bytes(pack, layer, expert)[: weight.nbytes]
            assert sorted(seen) == experts
        store.close()


def test_a_read_ahead_that_fails_says_nothing_and_leaves_its_slot_free(pack_of: PackOf) -> None:
    pack = Pack(pack_of("qwen3_moe"))
    (stride,) = stride_counts(pack.manifest)
    store = ExpertStore(pack, get_kernels("cpu"), {stride: 2})
    read_into = store._records.read_into

    def failing(key: tuple[int, int], record: memoryview) -> None:
        if key == (0, 1):
            raise OSError("broken")
        read_into(key, record)

    store._records.read_into = failing  # type: ignore[method-assign]
    store.warm({(0, 1): 0.9, (0, 2): 0.8})
    wait_for(store, 2)
    assert [e for e, _ in stream(store, 0, [2, 3])] == [2, 3]
    with pytest.raises(OSError, match="broken"):
        list(stream(store, 0, [1]))
    store.close()


def test_a_second_load_begins_with_what_the_first_used_and_computes_the_same_bits(pack_of: PackOf) -> None:
    pack = pack_of("trained")
    ids = torch.randint(0, 4096, (1, 12), generator=torch.Generator().manual_seed(3))

    def run(keep: bool) -> tuple[torch.Tensor, int]:
        model = flashpack.load(pack, memory="smallest", context=64, warm=keep)
        store = model.flashpack.store
        if keep and warm.read(Pack(pack)):
            wait_for(store, 1)
        with torch.inference_mode():
            logits = model(ids).logits
        found = store.stats.total().ahead_bytes
        del model, store
        gc.collect()
        return logits, found

    (plain, none), (first, cold), (second, hot) = run(False), run(True), run(True)
    assert torch.equal(plain, first)
    assert torch.equal(plain, second)
    assert (none, cold) == (0, 0)
    assert hot > 0
    remembered = json.loads(warm.history_path(Pack(pack)).read_text())
    assert remembered["experts"][0][2] >= remembered["experts"][-1][2] > 0
