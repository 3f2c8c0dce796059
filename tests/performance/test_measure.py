"""Measuring: a run within a budget, processes of their own, bench and tune."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from flashpack.errors import DeviceError, MemoryBudgetError, UsageError
from flashpack.formats import Pack
from flashpack.performance import bench as benches
from flashpack.performance import measure as measures
from flashpack.performance import speed
from flashpack.performance import tune as tuning
from flashpack.performance.feed import Feed
from flashpack.performance.measure import Run, Setting, apart, length, measure
from flashpack.runtime import budget as budgets
from flashpack.runtime import load, profile
from flashpack.runtime.budget import Budget
from flashpack.runtime.memory import Usage
from flashpack.runtime.profile import Profile
from tests.cli.test_cli import in_process as flashpack
from tests.conftest import PackOf

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20


def here(work: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of ``apart``, without the time that a process takes."""
    return work(*args, **kwargs)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "apart", here)
    monkeypatch.setattr(speed, "READ_SECONDS", 0.01)
    monkeypatch.setattr(speed, "memory_rate", lambda threads: 1e9)
    monkeypatch.setattr(measures, "SPLIT_TOKENS", 3)


def test_a_run_is_counted_and_split(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "SPLIT_TOKENS", 3)
    folder = pack_of("trained")
    pack = Pack(folder)
    divide = budgets.divide

    def quarter(pack: Pack, *rest: Any) -> Budget:
        whole = divide(pack, *rest)  # the process of the tests grows by more than this pack is large
        return replace(whole, slots={stride: count // 4 for stride, count in whole.slots.items()})

    monkeypatch.setattr(budgets, "divide", quarter)
    memory = 10**10
    run = measure(Setting(folder, memory, list(range(20, 90)), 12, 8, 5, context=96))
    assert run.share == pytest.approx(0.25)
    assert 0 < run.hit_rate < 1
    assert set(run.layer_hit_rates) == {layer.index for layer in pack.manifest.layers}
    mean = sum(run.layer_hit_rates.values()) / len(run.layer_hit_rates)
    assert run.hit_rate == pytest.approx(mean)  # all layers ask for as many
    assert run.read_bytes > 0
    assert run.drive > 0
    assert 0 <= run.waited < run.seconds
    assert run.parts is not None
    assert run.parts["tokens"] == 3
    assert sum(run.parts["parts"].values()) == pytest.approx(run.parts["seconds_per_token"])
    assert run.peak[0] > 0
    assert json.loads(json.dumps(run.to_json()))["share"] == run.share
    monkeypatch.setattr(measures, "_replayed", lambda *args: 8.0)
    buffered = Profile(io="buffered")
    short = measure(Setting(folder, memory, [5, 6], 2, 2, 1, context=32, profile=buffered, split=False))
    assert short.parts is None
    assert short.drive == 4.0
    assert (short.io, "profile" in short.why) == ("buffered", True)
    assert length(10, 4, 3) == 18 + measures.SPLIT_TOKENS
    assert length(10, 4, 3, split=False) == 17


def test_a_text_is_fed_in_order_and_begins_again(pack_of: PackOf) -> None:
    model: Any = load(pack_of("trained"), context=32)
    seen: list[list[int]] = []
    forward = model.forward

    def spied(ids: Any, **options: Any) -> Any:
        cache = options["past_key_values"]
        seen.append([0 if cache is None else cache.get_seq_length(), *ids[0].tolist()])
        return forward(ids, **options)

    model.forward = spied
    feed = Feed(model, [11, 12, 13, 14, 15])
    feed(2)
    feed(1)
    feed.restart()
    assert feed(3) > 0
    feed(1)
    assert seen == [[0, 11, 12], [2, 13], [0, 14, 15, 11], [3, 12]]


def test_a_prompt_is_fed_in_the_chunks_in_which_it_is_read(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "PROMPT_CHUNK", 2)
    model: Any = load(pack_of("trained"), context=32)
    seen: list[int] = []
    forward = model.forward
    model.forward = lambda ids, **options: seen.append(ids.shape[1]) or forward(ids, **options)
    Feed(model, [11, 12, 13])(5)
    assert seen == [2, 2, 1]


def test_prompts_begin_with_an_empty_context_and_the_most_memory_counts(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashpack.performance import feed as feeding

    seen: list[tuple[int, bool]] = []

    class Seen(Feed):
        def __call__(self, tokens: int) -> float:
            seen.append((tokens, self._cache is None))
            return super().__call__(tokens)

    monkeypatch.setattr(feeding, "Feed", Seen)
    uses = iter([Usage(1, 2), Usage(5, 6), Usage(3, 4)])
    monkeypatch.setattr("flashpack.runtime.memory.usage", lambda: next(uses))
    run = measure(Setting(pack_of("trained"), 60 * 10**9, [5, 6, 7], 3, 2, 1, context=32, split=False))
    assert seen == [(3, True), (3, True), (1, False), (1, False), (1, False)]
    assert run.peak == (5, 6)


def double(value: int) -> tuple[int, int, str]:
    return 2 * value, os.getpid(), os.environ["FLASHPACK_WARM"]


def refuse() -> None:
    raise MemoryBudgetError("too little")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def left() -> None:
    os._exit(3)


def slow() -> None:
    time.sleep(300)


def test_work_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHPACK_WARM", "1")
    value, process, warm = apart(double, 21)
    assert (value, warm) == (42, "0")
    assert process != os.getpid()
    assert os.environ["FLASHPACK_WARM"] == "1"
    with pytest.raises(MemoryBudgetError, match="too little"):
        apart(refuse)
    with pytest.raises(MemoryBudgetError, match="killed, as the system does for memory"):
        apart(killed)
    with pytest.raises(RuntimeError, match="exit code 3"):
        apart(left)

    def interrupted(connection: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "recv", interrupted)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        apart(slow)
    assert time.monotonic() - begun < 60
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("quick")
def test_bench_prints_a_table_and_json(pack_of: PackOf, tmp_path: Path) -> None:
    folder = pack_of("trained")
    text = tmp_path / "own.txt"
    text.write_text(TEXT)
    options = ["--text", text, "--prompt-tokens", 8, "--tokens", 4, "--context", 64, "--memory", "60GB"]
    done = flashpack("bench", folder, *options)
    assert done.returncode == 0, done.stderr
    assert "measuring 60.00 GB" in done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| 60.0 GB")]
    assert len(table) == 1
    assert "100%" in table[0]
    assert "| attention |" in done.stdout
    assert "4 tokens of own.txt; context 64; the estimate is for even routing" in done.stdout
    data = json.loads(flashpack("bench", folder, *options, "--json").stdout)
    (row,) = data["budgets"]
    assert row["memory"] == 60 * 10**9
    assert row["agreement"] == pytest.approx(row["estimate"]["seconds"] / row["measured"]["seconds"])
    assert (row["measured"]["drive_share"] is None) == (row["measured"]["drive"] == 0)
    if row["measured"]["drive"]:
        assert row["measured"]["drive_share"] == pytest.approx(row["measured"]["drive"] / row["measured"]["seconds"])
    assert data["identity"] == Pack(folder).identity
    assert data["memory_limit_tokens_per_second"] == pytest.approx(1e9 / data["computing"]["weights"])


@pytest.mark.usefixtures("quick")
def test_bench_draws(pack_of: PackOf, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["--prompt-tokens", 8, "--tokens", 2, "--context", 64, "--memory", "60GB"]
    done = flashpack("bench", pack_of("trained"), *options, "--plot", tmp_path / "b.svg")
    assert done.returncode == 0, done.stderr
    drawn = (tmp_path / "b.svg").read_text()
    for words in ("tokens per second", "time by part", "found in memory", "estimated", "attention"):
        assert words in drawn


def test_bench_refuses_before_it_measures(pack_of: PackOf, tmp_path: Path) -> None:
    folder = pack_of("trained")
    small = flashpack("bench", folder, "--context", length(256, 64, 64) - 1)
    assert small.returncode == UsageError.exit_code
    assert f"measuring needs {length(256, 64, 64)} tokens" in small.stderr
    device = flashpack("bench", folder, "--device", "cuda", "--context", 1000)
    assert device.returncode == DeviceError.exit_code
    assert "estimating" not in device.stderr
    for wrong in (["--plot", tmp_path / "a.gif"], ["--text", tmp_path / "none"], ["--memory", "many"]):
        assert flashpack("bench", folder, *wrong).returncode == UsageError.exit_code


def test_a_budget_that_memory_is_too_small_for_leaves_the_others(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def work(function: Any, *args: Any) -> Any:
        if function is measure:
            asked.append(args[0].memory)
            if args[0].memory == 3 * 10**9 or all_of_them:
                raise MemoryBudgetError("killed")
            return NOTHING
        said.append(args)
        one: Any = speed.Estimate(2 * 10**9, None, 1, 1, 1, 1, 1)  # type: ignore[arg-type]
        nothing: Any = None
        return benches.Forecast(nothing, 1, 1, 1, nothing, 1.0, [one, replace(one, memory=3 * 10**9)], False)

    said: list[Any] = []
    all_of_them = False
    monkeypatch.setattr(benches, "apart", work)
    notes: list[str] = []
    routing: Any = object()
    found = benches.bench(pack_of("trained"), TEXT, [1], 4, 4, 64, 3, "cpu", routing, notes.append)
    assert [row.estimate.memory for row in found.rows] == [2 * 10**9]
    assert any("3.00 GB is left out: killed" in line for line in notes)
    assert said[0][1:] == ([1], 64, "cpu", routing, 3)
    all_of_them = True
    with pytest.raises(MemoryBudgetError):
        benches.bench(pack_of("trained"), TEXT, [1], 4, 4, 64)


class Machine:
    """Answers measurements by what a profile asks for; ``noise``: factors, one for each, in turn."""

    def __init__(self, **worth: float) -> None:
        self.worth, self.asked, self.noise = worth, [], [1.0]  # type: ignore[var-annotated]

    def __call__(self, work: Any, setting: Setting) -> Run:
        assert setting.profile is not None
        assert not setting.split
        rate = 10.0
        for knob, factor in self.worth.items():
            name, value = knob.split("_")
            if str(getattr(setting.profile, name)) == value:
                rate *= factor
        rate *= self.noise[len(self.asked) % len(self.noise)]
        self.asked.append(setting.profile)
        nothing: Any = None
        return replace(NOTHING, seconds=1 / rate, parts=nothing)


NOTHING = Run({}, 1.0, "", "", "", "", 1.0, 1.0, 0.0, 1.0, {}, 0.0, 0.0, None, (0, 0))


def tuned(folder: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, seconds: float = 1e9) -> tuning.Tuned:
    monkeypatch.setattr(tuning, "apart", machine)
    monkeypatch.setattr(tuning, "usable_cores", lambda: 4)
    return tuning.tune(folder, TEXT, 10**9, seconds, 4, 8)


def test_tuning_keeps_what_wins(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(io_buffered=1.2, readers_16=1.1, readers_4=0.9, prefetch_False=1.01)
    found = tuned(pack_of("trained"), machine, monkeypatch)
    assert found.profile == Profile(readers=16, io="buffered")
    assert found.gain == pytest.approx(1.32)
    assert [(t.knob, t.value) for t in found.trials if t.kept] == [("io", "buffered"), ("readers", 16)]
    refused = {(t.knob, t.value): t for t in found.trials if not t.kept}
    assert len(refused["readers", 4].after) == 1  # lost its first turn
    assert len(refused["prefetch", False].after) == tuning.TURNS  # won each, by too little
    assert ("threads", 2) in refused
    assert not found.left
    assert json.loads(json.dumps(found.to_json()))["gain"] == pytest.approx(1.32)
    # Each change is tried with what has won before it, and in turns.
    index = machine.asked.index(Profile(readers=4, io="buffered"))
    assert machine.asked[index - 1] == Profile(io="buffered")


def test_tuning_trusts_no_single_turn_and_no_sum_of_parts(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(io_direct=1.1)
    machine.noise = [1.0, 1.0, 1.0, 1.0, 1.0, 0.8]  # the third turn of the first trial loses
    found = tuned(pack_of("trained"), machine, monkeypatch)
    assert (found.profile, len(found.trials[0].after)) == (Profile(), tuning.TURNS)

    class Apart(Machine):
        """Direct reads win each trial, and lose once they are compared with nothing else at the end."""

        def __call__(self, work: Any, setting: Setting) -> Run:
            run = super().__call__(work, setting)
            assert setting.profile is not None
            end = "whole" in tried[-1] and setting.profile == Profile(io="direct")
            return replace(run, seconds=1.0) if end else run

    tried: list[str] = []
    monkeypatch.setattr(tuning, "apart", Apart(io_direct=1.1))
    dropped = tuning.tune(pack_of("trained"), TEXT, 10**9, 1e9, 4, 8, begin=tried.append)
    assert (dropped.profile, dropped.gain) == (Profile(), 1.0)
    assert dropped.trials[0].kept


def test_tuning_ends_in_time(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: clock[0])

    class Slow(Machine):
        def __call__(self, work: Any, setting: Setting) -> Run:
            clock[0] += 10
            return super().__call__(work, setting)

    found = tuned(pack_of("trained"), Slow(io_direct=1.2), monkeypatch, seconds=150)
    assert found.profile == Profile(io="direct")
    assert clock[0] <= 150
    assert len(found.left) >= 3
    assert found.trials[0].kept
    # A trial that was lost in its first turn took a third of what another may take.
    clock[0] = 0.0
    lost = tuned(pack_of("trained"), Slow(io_direct=0.9), monkeypatch, seconds=100)
    assert (len(lost.trials), clock[0]) == (1, 20)


def test_each_trial_begins_without_the_page_cache(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = Pack(pack_of("trained"))
    dropped: list[int] = []
    advise = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: dropped.append(args[3]) or advise(*args))
    machine = Machine()
    tuned(pack.folder, machine, monkeypatch)
    assert dropped == [os.POSIX_FADV_DONTNEED] * len(machine.asked) * len(pack.manifest.layers)


def test_tuning_needs_as_much_context_as_it_decodes(pack_of: PackOf) -> None:
    with pytest.raises(UsageError, match="measuring needs 16 tokens"):
        tuning.tune(pack_of("trained"), TEXT, 10**9, 60, 4, 8, context=15)


def test_what_was_found_is_used_and_forgotten(pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FLASHPACK_PROFILE", "1")
    folder = pack_of("trained")
    pack = Pack(folder)
    monkeypatch.setattr(tuning, "apart", Machine(io_buffered=1.2, readers_4=1.2, prefetch_False=1.2))
    done = flashpack("tune", folder, "--memory", "1GB", "--context", 64, "--tokens", 12)
    assert done.returncode == 0, done.stderr
    assert "kept: readers 4, io buffered, prefetch False: 1.73x" in done.stdout
    assert "threads 1: no" in done.stdout
    assert profile.read(pack) == Profile(readers=4, io="buffered", prefetch=False)
    model: Any = load(folder, context=64)
    store = model.flashpack.store
    assert (store.stats.io, len(store._pool._threads), store.prefetches) == ("buffered", 4, False)
    evidence = json.loads(profile.path_of(pack).read_text())["evidence"]
    assert evidence["gain"] == pytest.approx(1.728)
    monkeypatch.setenv("FLASHPACK_PROFILE", "0")
    assert profile.profile_of(pack) == Profile()
    assert "forgotten" in flashpack("tune", folder, "--forget").stdout
    assert not profile.path_of(pack).exists()


def test_nothing_found_leaves_no_profile(pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pack = Pack(pack_of("trained"))
    profile.write(pack, Profile(readers=3), {})
    assert profile.read(pack) == Profile(readers=3)
    monkeypatch.setattr(tuning, "apart", Machine())
    done = flashpack("tune", pack.folder, "--memory", "1GB", "--json")
    assert json.loads(done.stdout)["file"] is None
    assert profile.read(pack) is None


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"pack": "0" * 64},
        {"processors": 4096},
        {"device": -1},
        {"profile": {"readers": 0}},
        {"profile": {"readers": 65}},
        {"profile": {"readers": 4.0}},
        {"profile": {"io": "mapped"}},
        {"profile": {"prefetch": 1}},
        {"profile": {"threads": 0}},
        {"profile": {"threads": 4096}},
        {"profile": {"more": 1}},
        {"profile": []},
    ],
)
def test_an_unsound_profile_is_none(
    pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pack = Pack(pack_of("trained"))
    profile.write(pack, Profile(readers=3), {})
    path = profile.path_of(pack)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert profile.read(pack) is None


def test_a_profile_that_is_too_large_or_nowhere_is_none(
    pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pack = Pack(pack_of("trained"))
    profile.write(pack, Profile(readers=3), {})
    path = profile.path_of(pack)
    path.write_text(path.read_text() + " " * 2**20)
    assert profile.read(pack) is None

    def homeless(self: Path) -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert profile.read(pack) is None
