"""Conversion by workers in other processes: the same pack, whatever becomes of the workers."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

import flashpack
from flashpack.converter import elsewhere, units
from flashpack.errors import OutputError, SourceError, UsageError
from flashpack.formats.constants import JOURNAL, MANIFEST
from tests.conftest import PackOf, contents
from tests.converter.test_conversion import SourceCopy


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes of a Dask cluster on this machine."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=logging.CRITICAL
    ) as found:
        yield found


def slow_down() -> int:
    """In a worker: every expert takes a while, so that a kill hits it at work."""
    from flashpack.converter import units

    real = units.encode_record

    def encode_record(*arguments: Any) -> Any:
        time.sleep(0.01)
        return real(*arguments)

    units.encode_record = encode_record
    return os.getpid()


def test_a_cluster_that_loses_a_worker_at_work_makes_the_same_pack(
    source_copy: SourceCopy, tmp_path: Path, pack_of: PackOf, cluster: Any
) -> None:
    from distributed import Client

    source, out = source_copy("trained"), tmp_path / "out"
    with Client(cluster.scheduler_address, set_as_default=False) as client:
        pids = list(client.run(slow_down).values())
        killed = threading.Event()

        def kill() -> None:
            while not killed.is_set():
                if list(out.glob("experts/*.safetensors.*.part")):
                    os.kill(pids[0], signal.SIGKILL)
                    killed.set()
                time.sleep(0.01)

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            with elsewhere.scheduler(cluster.scheduler_address) as executor:
                flashpack.convert(source, out, executor=executor)
        finally:
            was_killed = killed.is_set()
            killed.set()
            thread.join()
    assert was_killed
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))
    assert not flashpack.verify(out)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_lost_workers_are_said_in_one_line_and_the_same_command_continues(
    source_copy: SourceCopy, tmp_path: Path, pack_of: PackOf
) -> None:
    source, out = source_copy("trained"), tmp_path / "out"

    class Dying(ProcessPoolExecutor):
        submitted = 0

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.submitted += 1
            return super().submit(die if self.submitted == 3 else fn, *args, **kwargs)

    with (
        Dying(1, mp_context=get_context("spawn")) as executor,
        pytest.raises(OutputError, match=r"workers were lost .*; run the same command again to continue") as caught,
    ):
        flashpack.convert(source, out, executor=executor)
    assert "\n" not in str(caught.value)
    assert not (out / MANIFEST).exists()
    assert flashpack.convert(source, out).resumed_files == 2
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))


class Inline(Executor):
    """Runs each call at once, after ``before``, as a worker elsewhere would."""

    def __init__(self, before: Any) -> None:
        self.before = before

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        from concurrent.futures import Future

        future: Any = Future()
        self.before(args[0])
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as e:
            future.set_exception(e)
        return future


class Lost(Executor):
    """What Dask's executor does when its scheduler goes away."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        from concurrent.futures import Future

        future: Any = Future()
        future.cancel()
        future.set_running_or_notify_cancel()
        return future


def test_a_lost_scheduler_is_said_in_one_line(source_copy: SourceCopy, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"its workers were lost \(CancelledError\); run the same command again"):
        flashpack.convert(source_copy("qwen3_moe"), tmp_path / "out", executor=Lost())


def test_any_executor_makes_the_same_pack(source_copy: SourceCopy, tmp_path: Path, pack_of: PackOf) -> None:
    done: list[int] = []
    source, out = source_copy("qwen3_moe"), tmp_path / "out"
    report = flashpack.convert(source, out, progress=done.append, executor=Inline(lambda job: None))
    assert contents(out) == contents(pack_of("qwen3_moe", "q4", "q8"))
    assert sum(done) == report.source_bytes


def test_a_worker_that_sees_another_source_is_refused(source_copy: SourceCopy, tmp_path: Path) -> None:
    source = source_copy("qwen3_moe")

    def swap(job: elsewhere.Job) -> None:
        os.utime(min(source.glob("*.safetensors")), (1, 1))
        elsewhere._plan.cache_clear()

    with pytest.raises(SourceError, match=r"a worker has another source model-00001-of-\d+\.safetensors modified"):
        flashpack.convert(source, tmp_path / "out", executor=Inline(swap))
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_late_worker_of_a_conversion_that_is_over_writes_nothing(source_copy: SourceCopy, tmp_path: Path) -> None:
    out = tmp_path / "out"
    jobs: list[elsewhere.Job] = []
    flashpack.convert(source_copy("qwen3_moe"), out, executor=Inline(jobs.append))
    before = contents(out)
    with pytest.raises(OutputError, match="no unfinished conversion here"):
        elsewhere.run(jobs[0], "experts/layer-0000.safetensors")
    assert contents(out) == before
    shutil.rmtree(out)
    with pytest.raises(OutputError, match="no unfinished conversion here"):
        elsewhere.run(jobs[0], "experts/layer-0000.safetensors")
    assert not out.exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense://1", "no Dask scheduler answers there"),
        ("tcp://127.0.0.1:9", "no Dask scheduler answers there"),
        ("localhost", "not an address such as tcp://HOST:8786"),
    ],
)
def test_a_scheduler_that_does_not_answer_is_named(
    address: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=f"--scheduler {address}: {message}"), elsewhere.scheduler(address):
        pass
    assert capfd.readouterr().err == ""


def test_what_is_finished_when_another_unit_fails_is_not_made_again(source_copy: SourceCopy, tmp_path: Path) -> None:
    """All units have ended before the first is looked at, and one of them has failed."""
    source, out = source_copy("qwen3_moe"), tmp_path / "out"
    jobs: list[elsewhere.Job] = []

    def second_fails(job: elsewhere.Job) -> None:
        jobs.append(job)
        if len(jobs) == 2:
            shutil.rmtree(out / "experts", ignore_errors=True)
            (out / "experts").write_bytes(b"")
        elif (out / "experts").is_file():
            (out / "experts").unlink()

    with pytest.raises(OutputError, match=r"experts"):
        flashpack.convert(source, out, executor=Inline(second_fails))
    assert flashpack.convert(source, out).resumed_files == len(jobs) - 1 > 1


def test_what_a_lost_worker_left_is_removed(source_copy: SourceCopy, tmp_path: Path, pack_of: PackOf) -> None:
    out = tmp_path / "out"

    def leave(job: elsewhere.Job) -> None:
        (out / "experts").mkdir(exist_ok=True)
        (out / "experts" / "layer-0000.safetensors.0123456789ab.part").write_bytes(b"half")

    flashpack.convert(source_copy("qwen3_moe"), out, executor=Inline(leave))
    assert contents(out) == contents(pack_of("qwen3_moe", "q4", "q8"))


def test_a_conversion_that_ends_while_a_worker_is_at_work_gets_no_file_of_it(
    source_copy: SourceCopy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", units.encode_record

    def encode_record(*arguments: Any) -> Any:
        (out / JOURNAL).unlink(missing_ok=True)
        return real(*arguments)

    monkeypatch.setattr(units, "encode_record", encode_record)
    with pytest.raises(OutputError):
        flashpack.convert(source_copy("qwen3_moe"), out, executor=Inline(lambda job: None))
    assert not list(out.glob("experts/*.safetensors"))
