"""verify, repair and recode as a user runs them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flashpack.formats import Pack
from tests.cli.test_cli import in_process as flashpack
from tests.conftest import TRAINED, PackOf, contents
from tests.formats.test_verify import flip

Copy = Callable[..., Path]


def damage(pack: Path) -> None:
    flip(pack / "experts" / "layer-0003.safetensors", 16384 * 3)


def test_levels_of_verify_say_what_was_read(pack_of: PackOf) -> None:
    pack = pack_of("trained")
    assert "data not read" in flashpack("verify", pack, "--quick").stdout
    sampled = flashpack("verify", pack, "--sample", "5%")
    assert sampled.returncode == 0
    assert "of data taken at random" in sampled.stdout
    checked = [
        json.loads(flashpack("verify", pack, *level, "--json").stdout)["checked_bytes"]
        for level in ((), ("--sample", "5%"), ("--quick",))
    ]
    assert checked[2] == 0
    assert 0.05 * checked[0] <= checked[1] < 0.5 * checked[0]


def test_all_findings_are_listed_with_the_next_step(pack_copy: Copy) -> None:
    pack = pack_copy("trained")
    damage(pack)
    flip(pack / "config.json", 4)
    done = flashpack("verify", pack)
    assert done.returncode == 1
    assert "[record-digest] experts/layer-0003.safetensors, layer 3, expert 1" in done.stdout
    assert "[file-digest] config.json" in done.stdout
    assert "2 findings" in done.stdout
    assert f"flashpack repair {pack} --from" in done.stderr


def test_another_pack_than_the_expected_one_is_refused(pack_of: PackOf) -> None:
    pack = pack_of("trained")
    identity = Pack(pack).identity
    assert flashpack("verify", pack, "--expect", identity).returncode == 0
    for command in (("verify", pack), ("run", pack, "-p", "x")):
        done = flashpack(*command, "--expect", "0" * 64)
        assert done.returncode == 5
        assert f"its identity is {identity}, not the expected 000" in done.stderr
        assert done.stdout == ""


def test_verify_against_the_source(pack_of: PackOf) -> None:
    done = flashpack("verify", pack_of("trained"), "--against", TRAINED)
    assert done.returncode == 0, done.stderr
    assert "its recipe give" in done.stdout
    other = flashpack("verify", pack_of("olmoe"), "--against", TRAINED)
    assert other.returncode == 3
    assert "not the source of this pack: other model" in other.stderr


@pytest.mark.parametrize("source", ["copy", "checkpoint"])
def test_a_damaged_pack_stops_run_and_repair_makes_it_whole(pack_copy: Copy, pack_of: PackOf, source: str) -> None:
    pack, good = pack_copy("trained"), pack_of("trained")
    (pack / "experts" / "layer-0001.safetensors").unlink()
    for expert in range(32):
        flip(pack / "experts" / "layer-0003.safetensors", 16384 + 32768 * expert)
    stopped = flashpack("run", pack, "-p", "x")
    assert stopped.returncode == 5
    assert "layer-0001.safetensors: is missing" in stopped.stderr
    shutil.copy(good / "experts" / "layer-0001.safetensors", pack / "experts")
    stopped = flashpack("run", pack, "-p", "x")
    assert stopped.returncode == 5
    assert "layer 3, expert" in stopped.stderr
    assert f"flashpack repair {pack} --from" in stopped.stderr
    done = flashpack("repair", pack, "--from", good if source == "copy" else TRAINED)
    assert done.returncode == 0, done.stderr
    assert "whole again; 32 parts" in done.stdout
    assert contents(pack) == contents(good)


def test_repair_reports_what_is_left(pack_copy: Copy, tmp_path: Path) -> None:
    pack = pack_copy("trained")
    other = Path(shutil.copytree(pack, tmp_path / "other"))
    flip(other / "experts" / "layer-0003.safetensors", 16384 * 3)
    damage(pack)
    flip(pack / "config.json", 4)
    done = flashpack("repair", pack, "--from", other, "--json")
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert result["mended"] == ["config.json"]
    assert [(f["layer"], f["expert"]) for f in result["findings"]] == [(3, 1)]


def test_recode_and_run(pack_of: PackOf, tmp_path: Path) -> None:
    done = flashpack("recode", pack_of("trained"), tmp_path / "z", "--codec", "zstd")
    assert done.returncode == 0, done.stderr
    assert f"identity {Pack(tmp_path / 'z').identity}" in done.stdout
    options = ("-p", "What is 922 plus 291?", "--memory", "smallest")
    assert flashpack("run", tmp_path / "z", *options).stdout == flashpack("run", pack_of("trained"), *options).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("verify", "{pack}", "--quick", "--sample", "5%"), 2, "choose one"),
        (("verify", "{pack}", "--sample", "5"), 2, "for example 5%"),
        (("verify", "{pack}", "--sample", "0%"), 2, "for example 5%"),
        (("verify", "{pack}", "--against", "no/such"), 3, "no such folder"),
        (("repair", "{pack}"), 2, "--from"),
        (("repair", "{pack}", "--from", "{pack}"), 2, "the damaged pack itself"),
        (("repair", "{pack}", "--from", "no/such"), 4, "no flashpack.json there"),
        (("repair", "no/such", "--from", "{pack}"), 4, "no such folder"),
        (("recode", "{pack}", "x", "--codec", "lz4"), 2, "choose from raw, zstd"),
        (("recode", "no/such", "x", "--codec", "zstd"), 4, "no such folder"),
        (("run", "{pack}", "-p", "x", "--check", "often"), 2, "choose from first, always, never"),
    ],
)
def test_errors_are_one_line(pack_of: PackOf, arguments: tuple[str, ...], code: int, message: str) -> None:
    done = flashpack(*(a.format(pack=pack_of("trained")) for a in arguments))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
