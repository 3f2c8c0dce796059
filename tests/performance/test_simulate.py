"""Simulated hits against those of the store itself; sizes of memory; what is said of a text."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import flashpack
from flashpack.errors import MemoryBudgetError, UsageError
from flashpack.formats import Pack
from flashpack.formats.routing import RecordedRun, Routing
from flashpack.kernels import get_kernels
from flashpack.performance.compare import check, compare, sizes_of
from flashpack.performance.policies import Belady, Lru, Runtime
from flashpack.performance.simulate import Hits, Requests, busiest_tenth, hit_rate, overlap
from flashpack.runtime.budget import stride_counts
from flashpack.runtime.routing import record_sizes
from flashpack.runtime.store import ExpertStore
from tests.conftest import TRAINED, PackOf
from tests.performance.routings import PAGE, made_up

STEPS = (6, *[1] * 25, 3, *[1] * 25)


def run(pack: Pack, routing: Routing, slots: dict[int, int]) -> tuple[Hits, Hits]:
    """Hits of decoded tokens and of prompts that the store itself has, asked as the runtime asks it."""
    store = ExpertStore(pack, get_kernels("cpu"), slots, "never")
    found, asked = [0, 0], [0, 0]
    ends = np.flatnonzero(np.diff(routing.steps, append=-1)) + 1
    for begin, end in zip([0, *ends], ends, strict=False):
        before = store.stats.total()
        for at, layer in enumerate(routing.layers):
            chosen = {int(e) for e in routing.experts[begin:end, at].ravel() if e != routing.none}
            for _ in store.batches(layer, sorted(chosen)):
                pass
        counted = store.stats.total().less(before)
        kind = int(routing.prompt[begin])
        found[kind] += counted.hits
        asked[kind] += counted.hits + counted.misses
    store.close()
    return Hits(found[0], asked[0]), Hits(found[1], asked[1])


def of_pack(pack: Pack, seed: int, top_k: int) -> Routing:
    sizes = record_sizes(pack)
    layers = [layer.index for layer in pack.manifest.layers]
    routing = made_up(seed, STEPS, layers, sizes.shape[1], top_k)
    return replace(routing, record_bytes=sizes)


@pytest.mark.parametrize("slots", [18, 24, 40, 96])
def test_hits_are_those_of_the_store(pack_of: PackOf, slots: int) -> None:
    """Decoded tokens and chunks of prompts; a chunk of 6 tokens asks for at most 18 of 32 experts."""
    pack = Pack(pack_of("trained"))
    routing = of_pack(pack, slots, top_k=4)
    routing.experts[7, 2, 1:] = routing.none  # a token may use fewer
    (stride,) = routing.stride_counts()
    requests = Requests(routing)
    assert requests.fit({stride: slots})
    simulated = requests.simulate({stride: slots}, Runtime)
    assert (simulated.decoded, simulated.prompt) == run(pack, routing, {stride: slots})
    assert 0 < simulated.decoded.rate < 1
    assert hit_rate(routing, slots) == hit_rate(routing, {stride: slots}) == simulated.decoded.rate


def test_records_of_two_sizes_have_a_cache_each(tmp_path: Path) -> None:
    flashpack.convert(TRAINED, tmp_path / "pack", bpw=2.8)
    pack = Pack(tmp_path / "pack")
    routing = of_pack(pack, 3, top_k=4)
    counts = routing.stride_counts()
    assert counts == stride_counts(pack.manifest)
    assert len(counts) == 2
    for rng in map(random.Random, range(4)):
        slots = {stride: rng.randint(18, count) for stride, count in counts.items()}
        assert Requests(routing).fit(slots)
        simulated = Requests(routing).simulate(slots, Runtime)
        assert (simulated.decoded, simulated.prompt) == run(pack, routing, slots)
    with pytest.raises(UsageError, match="of 2 sizes"):
        hit_rate(routing, 3)


def test_a_store_with_too_few_slots_is_followed_nearly(pack_of: PackOf) -> None:
    """What stays in memory of a chunk that does not fit depends on which read is done first."""
    pack = Pack(pack_of("trained"))
    routing = of_pack(pack, 5, top_k=4)
    (stride,) = routing.stride_counts()
    assert not Requests(routing).fit({stride: 9})
    simulated = Requests(routing).simulate({stride: 9}, Runtime).total
    found = [hits.found for hits in run(pack, routing, {stride: 9})]
    assert abs(simulated.found - sum(found)) <= 0.02 * simulated.asked


def test_sizes_in_per_cent_and_bytes() -> None:
    beside = 10**8
    routing = made_up(run=RecordedRun({PAGE: 24}, beside, 0, 0))  # 24 experts
    assert sizes_of(routing, "50%, 100 %,12.5%") == [{PAGE: 12}, {PAGE: 24}, {PAGE: 3}]
    assert sizes_of(routing, f"{beside + 10 * PAGE},1GB") == [{PAGE: 10}, {PAGE: 24}]
    assert sizes_of(routing, "0.1%") == [{PAGE: 2}]  # the least that works
    with pytest.raises(MemoryBudgetError, match=r"0\.10 GB is too small: the recorded process needs 0\.10 GB"):
        sizes_of(routing, str(beside + PAGE))
    for wrong in ("0%", "101%", "5 apples", "", "10%,,"):
        with pytest.raises(UsageError):
            sizes_of(routing, wrong)
    unsized = replace(routing, record_bytes=np.ones((3, 8), np.uint32))
    for unknown in (replace(routing, run=None), unsized):
        with pytest.raises(UsageError, match="give --memory in per cent"):
            sizes_of(unknown, "1GB")


def test_rows_say_what_they_are_of() -> None:
    routing = made_up(1, STEPS, run=RecordedRun({PAGE: 24}, 10**8, 99, 1))
    done: list[int] = []
    rows = compare(routing, sizes_of(routing, "25%,100%"), done.append)
    assert [(row.share, row.arena, row.memory) for row in rows] == [
        (0.25, 6 * PAGE, 10**8 + 6 * PAGE),
        (1.0, 24 * PAGE, 10**8 + 24 * PAGE),
    ]
    assert sum(done) == 2 * len(rows[0].found)
    requests = Requests(routing)
    assert rows[0].found["LRU"] == requests.simulate({PAGE: 6}, Lru)
    assert rows[0].found["Belady"] == requests.simulate({PAGE: 6}, Belady)
    total = rows[0].found["LRU"].total
    assert total.asked == sum(len(keys) for _, keys in requests.by_size[PAGE])


def test_a_recorded_run_is_checked() -> None:
    routing = made_up(1, STEPS)
    assert check(routing) is None
    found = Requests(routing).simulate({PAGE: 12}, Runtime).total
    for slots, hits, exact in ((12, found.found, True), (12, found.found + 1, True), (3, 5, False)):
        checked = check(replace(routing, run=RecordedRun({PAGE: slots}, 0, hits, found.asked - hits)))
        assert checked is not None
        assert (checked.run, checked.exact, checked.slots) == (hits, exact, slots)
        assert slots == 3 or checked.simulated == found.found


def test_overlap_and_busiest_tenth() -> None:
    """By their definitions, on sets."""
    routing = made_up(2, (1,) * 30, experts=20)
    routing.experts[::3, 0, 1] = routing.none
    routing.positions[15:] -= 15  # a context begins
    shares, busiest = [], []
    for at in range(3):
        used = [{int(e) for e in row if e != routing.none} for row in routing.experts[:, at]]
        shares += [len(a & b) / len(b) for i, (a, b) in enumerate(pairwise(used)) if i != 14]
        uses = sorted((sum(e in one for one in used) for e in range(20)), reverse=True)
        busiest.append(sum(uses[:2]) / sum(uses))
    assert overlap(routing) == pytest.approx(np.mean(shares))
    assert busiest_tenth(routing) == pytest.approx(np.mean(busiest))
