"""``flashpack plan``: what it says, whether that is true, and how it ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from flashpack.cli.plan import show
from flashpack.runtime import load, memory
from tests.cli import test_cli
from tests.cli.test_cli import in_process as flashpack
from tests.conftest import CHECKPOINTS, ROOT, TRAINED, PackOf

KEYS = {
    "choices", "copy_bytes", "disk_free", "disk_needed", "dropped", "dropped_bytes", "dropped_groups", "files", "fits",
    "header_bytes", "layers", "memory_available", "model", "notices", "pack_bytes", "peak_memory", "read_bytes",
    "recipe", "record_kinds", "remote", "roofline", "run_refused", "smallest_run", "source_bytes", "source_format",
    "tensors", "workers", "working_bytes",
}  # fmt: skip

OPTIONS = ("auto", "auto", 64, "raw")


def test_plan_and_dry_run_are_the_same_and_write_nothing(tmp_path: Path) -> None:
    source = CHECKPOINTS / "qwen3_5_moe"
    first = flashpack("plan", source, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = flashpack("convert", source, "--dry-run", cwd=tmp_path)
    other = ("there", "free", "speed, at best", "  with")  # lines of what is measured
    lines = [[x for x in done.stdout.splitlines() if not any(o in x for o in other)] for done in (first, second)]
    assert lines[0] == lines[1]
    assert list(tmp_path.iterdir()) == []
    assert "Qwen3_5MoeForCausalLM" in first.stdout
    assert "record kind 0: 32 experts in 4 layers" in first.stdout
    assert "dropped: model.visual.* (" in first.stdout
    assert "dropped: mtp.* (" in first.stdout
    assert first.stdout.count(" *\n") + first.stdout.count(" * ") == 1
    assert "4.50 bits" in first.stdout
    assert "rounding:        default, about 20 core-seconds per 10^9 weights of the experts" in first.stdout
    assert "rounding:" not in flashpack("plan", source, "--experts", "source", cwd=tmp_path).stdout


def test_a_plan_of_a_width_for_each_expert(tmp_path: Path) -> None:
    done = flashpack("plan", TRAINED, "--bpw", "2.8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "experts mixed (2.8 bits per weight), dense q8" in done.stdout
    assert "widths: chosen when converting" in done.stdout
    assert "record kind" not in done.stdout
    assert "rounding:        default, about 80 core-seconds per 10^9" in done.stdout  # three searches before the one


def told(*arguments: object, **options: Any) -> dict[str, Any]:
    done = test_cli.flashpack("plan", *arguments, "--json", **options)
    data: dict[str, Any] = json.loads(done.stdout)
    assert done.stderr == ""
    assert (done.returncode == 0) == all(data["fits"].values())
    return data


def test_json_has_all_dropped_tensors_and_the_same_keys_always(tmp_path: Path) -> None:
    data = told(CHECKPOINTS / "qwen3_5_moe", cwd=tmp_path)
    assert set(data) == KEYS
    assert "mtp.fc.weight" in data["dropped"]
    assert len(data["dropped"]) == sum(group["tensors"] for group in data["dropped_groups"])
    assert data["pack_bytes"] == sum(data["files"].values())
    assert data["recipe"]["experts"] == "q4"
    assert data["remote"] is False


def peak_of_converting(source: Path, out: Path) -> int:
    """The largest resident size of a process that converts, in bytes."""
    # Not what getrusage says where there is a choice: a process inherits the peak of the one that started it.
    code = "import pathlib, resource, sys, flashpack\nflashpack.convert(*sys.argv[1:])\n"
    code += "status = pathlib.Path('/proc/self/status')\n"
    code += "peak = [line.split()[1] for line in status.open() if 'VmHWM' in line] if status.exists() else []\n"
    code += "print(int(peak[0]) * 1024 if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(out)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def test_a_conversion_stays_below_the_memory_that_was_promised_and_not_far(tmp_path: Path) -> None:
    promised = told(TRAINED, cwd=tmp_path, program=test_cli.COLD)["peak_memory"]  # this process' memory is in it
    measured = peak_of_converting(TRAINED, tmp_path / "out")
    assert measured <= promised <= 1.5 * measured


def test_the_smallest_budget_that_is_told_is_the_one_that_the_pack_runs_in(pack_of: PackOf, tmp_path: Path) -> None:
    data = told(TRAINED, cwd=tmp_path, program=test_cli.COLD)["smallest_run"]
    model: Any = load(pack_of("trained"), memory="smallest")
    real = model.flashpack.budget.to_json() | {"context": model.flashpack.context}
    for part in ("dense", "kv", "work", "arena", "context"):
        assert data[part] == real[part]
    assert data["total"] == sum(data[part] for part in ("base", "dense", "kv", "work", "arena"))


def tiny_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(ROOT)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))


def tiny_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 10**6)


def memory_to_convert_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 100 * 10**6)


@pytest.mark.parametrize(
    ("squeeze", "code", "failing"),
    [
        ([tiny_disk], 6, {"disk"}),
        ([tiny_memory], 7, {"memory_to_convert", "memory_to_run"}),
        ([memory_to_convert_only], 7, {"memory_to_run"}),
        ([tiny_disk, tiny_memory], 6, {"disk", "memory_to_convert", "memory_to_run"}),
    ],
)
def test_the_exit_code_tells_what_is_too_small(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    squeeze: list[Callable[[pytest.MonkeyPatch], None]],
    code: int,
    failing: set[str],
) -> None:
    for change in squeeze:
        change(monkeypatch)
    for json_wanted in (False, True):
        with pytest.raises(typer.Exit) as ended:
            show(str(TRAINED), tmp_path / "out", OPTIONS, False, 2, json_wanted)
        assert ended.value.exit_code == code
        printed = capsys.readouterr().out
        if json_wanted:
            assert {name for name, fits in json.loads(printed)["fits"].items() if not fits} == failing
        else:
            assert printed.count("DOES NOT FIT") == len(failing)


def test_what_cannot_be_converted_is_refused_in_one_line(tmp_path: Path) -> None:
    done = flashpack("plan", tmp_path)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_plan_of_a_pack(pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashpack.performance import speed

    monkeypatch.setattr(speed, "READ_SECONDS", 0.01)
    pack = pack_of("trained")
    done = flashpack("plan", pack, "--context", 64, "--memory", "59GB", "--memory", "60GB")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == [f"| {size} GB (more than can be taken now)" for size in ("59.0", "60.0")]
    assert rows[-1][1:3] == ["100%", "100%"]
    assert "seconds per token =" in done.stdout
    assert "KV cache of 64 tokens" in done.stdout
    for wrong, words in (
        (["--experts", "q4"], "is a pack: --experts is for checkpoints"),
        ([tmp_path / "out"], "OUT is for checkpoints"),
        (["--trace", tmp_path / "none"], "none"),
    ):
        refused = flashpack("plan", pack, *wrong)
        assert refused.returncode != 0
        assert words in refused.stderr
    refused = flashpack("plan", TRAINED, "--trace", tmp_path / "none")
    assert (refused.returncode, "--trace is for packs" in refused.stderr) == (2, True)


def test_a_plan_tells_speeds_where_the_source_is_here(tmp_path: Path) -> None:
    for file in TRAINED.iterdir():  # as in the cache of the hub
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    done = flashpack("plan", tmp_path, "--memory", "59GB", "--memory", "60GB", "--context", "32")
    lines = done.stdout.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("speed, at best:")]
    assert "100% of the experts in memory" in lines[at + 2]
    assert "KV cache of 32 tokens" in done.stdout


def test_families_with_stand_ins_run_too(pack_of: PackOf) -> None:
    """Before and after they are converted; their experts are no modules of the library's."""
    data = json.loads(flashpack("plan", CHECKPOINTS / "llama4_text", "--context", 64, "--json").stdout)
    assert data["run_refused"] is None
    assert data["smallest_run"]["context"] == 64
    done = flashpack("plan", pack_of("llama4_text"), "--context", 64, "--memory", "60GB")
    assert done.returncode == 0, done.stderr
    assert "| 60.0 GB" in done.stdout
