"""The output folder belongs to one conversion: a lock, careful overwriting, and clear ends when it is taken away."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import flashpack
from flashpack.cli import app
from flashpack.converter import execute, units
from flashpack.converter.folder import LocalFolder
from flashpack.converter.journal import Journal
from flashpack.errors import FlashpackError, NotAPackError, OutputError
from flashpack.formats import Pack, verify
from flashpack.formats.constants import JOURNAL, MANIFEST, MANIFEST_DIGEST
from tests import commands
from tests.conftest import CHECKPOINTS, ROOT, TRAINED, PackOf
from tests.converter.killing import contents

Interrupted = Callable[..., Path]
SMALL = CHECKPOINTS / "qwen3_moe"


def at_call(number: int, action: Callable[[], object]) -> Callable[[int], None]:
    """A ``progress`` for ``convert`` that does something in the middle of the conversion."""
    calls = 0

    def progress(count: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            action()

    return progress


STARTERS = """
import importlib, json, os, sys
import flashpack
from flashpack.converter import plan
from flashpack.errors import OutputError
source, folder = sys.argv[1:]
work = plan(source)
importlib.import_module("flashpack.converter.convert").plan = lambda *_: work
for number in range(8):
    start, go = os.pipe()
    answers, answer = os.pipe()
    children = []
    for _ in range(5):
        children.append(os.fork())
        if children[-1] == 0:
            os.close(go)
            os.read(start, 1)
            try:
                flashpack.convert(source, f"{folder}/{number}", overwrite=number % 2 == 1)
                text = "whole"
            except OutputError as e:
                text = str(e)
            os.write(answer, json.dumps([os.getpid(), text]).encode() + b"\\n")
            os._exit(0)
    os.close(start)
    os.close(go)
    os.close(answer)
    sys.stdout.write(json.dumps([json.loads(line) for line in os.fdopen(answers)]) + "\\n")
    for child in children:
        os.waitpid(child, 0)
"""


def test_of_several_starters_in_one_folder_exactly_one_converts(tmp_path: Path) -> None:
    """Real processes, released at once, with and without --overwrite."""
    command = [commands.python(), "-c", STARTERS, SMALL, tmp_path]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) == 8
    refused = 0
    for number, answers in enumerate(rounds):
        winners = [process for process, text in answers if text == "whole"]
        assert len(answers) == 5
        # A starter that is late may find the folder free again: the pack is finished by then.
        assert len(winners) == 1 or (number % 2 == 1 and winners), answers
        for _, text in answers:
            if "another flashpack convert is writing here" in text:
                refused += 1
                assert text.endswith("here") or any(text.endswith(f"(process {w})") for w in winners), answers
            else:
                assert text == "whole" or "holds a finished pack" in text, answers
        assert verify(tmp_path / str(number)) == []
    assert refused > 8, rounds


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_being_written_is_refused_with_the_process(
    tmp_path: Path, pack_of: PackOf, overwrite: bool
) -> None:
    out = tmp_path / "out"
    refusals = []

    def second() -> None:
        with pytest.raises(OutputError) as caught:
            flashpack.convert(SMALL, out, overwrite=overwrite)
        refusals.append(str(caught.value))

    flashpack.convert(TRAINED, out, progress=at_call(90, second))
    assert refusals == [f"{out}: another flashpack convert is writing here (process {os.getpid()})"]
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))


def test_a_conversion_that_ends_while_another_starts_leaves_its_pack_alone(
    pack_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look at the folder and the lock, the owner commits and removes its journal."""
    pack = pack_copy("qwen3_moe")
    before = contents(pack)
    (pack / JOURNAL).touch()
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        (pack / JOURNAL).unlink(missing_ok=True)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputError, match="holds a finished pack"):
        flashpack.convert(SMALL, pack)
    monkeypatch.undo()
    # The same between the look and the open: the journal is then new.
    (pack / JOURNAL).touch()
    with pytest.raises(OutputError, match="holds a finished pack"):
        Journal(pack, {})
    assert contents(pack) == before


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OutputError, match="cannot be locked: Function not implemented; choose another disk"):
        flashpack.convert(SMALL, tmp_path / "out")


def test_the_target_folder_is_never_overwritten_by_accident(pack_copy: Callable[..., Path], tmp_path: Path) -> None:
    pack = pack_copy("qwen3_moe")
    with pytest.raises(OutputError, match="finished pack"):
        flashpack.convert(SMALL, pack)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        flashpack.convert(SMALL, other)
    with pytest.raises(OutputError, match="not one"):
        flashpack.convert(SMALL, other, overwrite=True)
    (other / JOURNAL).touch()  # not one of ours: it names no conversion
    with pytest.raises(OutputError, match="not empty"):
        flashpack.convert(SMALL, other)
    assert (other / "thesis.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="not a folder"):
        flashpack.convert(SMALL, other / "thesis.txt")
    (tmp_path / "nowhere").symlink_to("missing")
    with pytest.raises(OutputError, match="not a folder"):
        flashpack.convert(SMALL, tmp_path / "nowhere")
    before = Pack(pack).identity
    flashpack.convert(SMALL, pack, experts="q3", overwrite=True)
    assert Pack(pack).identity != before
    assert verify(pack) == []


def test_overwriting_through_a_link_replaces_the_pack_behind_it(
    pack_copy: Callable[..., Path], tmp_path: Path, pack_of: PackOf
) -> None:
    pack = pack_copy("qwen3_moe", experts="q3")
    (tmp_path / "precious").write_text("mine")
    (pack / "link").symlink_to(tmp_path)
    (tmp_path / "name").symlink_to(pack)
    flashpack.convert(SMALL, tmp_path / "name", overwrite=True)
    assert (tmp_path / "precious").read_text() == "mine"
    assert contents(pack) == contents(pack_of("qwen3_moe"))


@pytest.mark.parametrize("finished", [True, False])
def test_overwriting_may_be_killed_anywhere(
    pack_of: PackOf, interrupted: Interrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """Before each deletion: what is left is the old pack, or opens as none and is taken for nothing else."""
    template = pack_of("trained", "q3") if finished else interrupted()
    old = contents(template)
    for moment in range(30):
        out = Path(shutil.copytree(template, tmp_path / f"copy{moment}"))
        left = moment

        def killed(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", killed(os.unlink))
            patch.setattr(os, "rmdir", killed(os.rmdir))
            patch.setattr(os, "ftruncate", killed(os.ftruncate))
            try:
                flashpack.convert(SMALL, out, overwrite=True, on_plan=lambda *_: 1 / 0)
            except ZeroDivisionError:
                break  # the old pack is gone, the new conversion has begun
            except KeyboardInterrupt:
                pass
        there = contents(out)
        if (out / MANIFEST).exists():
            assert {k: v for k, v in there.items() if k != JOURNAL} == {k: v for k, v in old.items() if k != JOURNAL}
            with pytest.raises(OutputError, match="finished pack"):
                flashpack.convert(SMALL, out)
            assert verify(out) == []
        elif there == old:
            with pytest.raises(OutputError, match="differs from this one"):
                flashpack.convert(SMALL, out)
        else:
            with pytest.raises(NotAPackError):
                Pack(out)
            assert flashpack.convert(SMALL, out).resumed_files == 0
            assert contents(out) == contents(pack_of("qwen3_moe"))
    else:
        pytest.fail("never came to its end")
    assert moment > 8


def test_a_file_that_is_no_part_of_the_pack_is_named_and_not_deleted(interrupted: Interrupted) -> None:
    out = interrupted()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes.txt: no part of the pack; remove it and run the same command again"):
        flashpack.convert(TRAINED, out)
    assert not (out / MANIFEST).exists()
    (out / "notes.txt").rename(out.parent / "notes.txt")
    assert flashpack.convert(TRAINED, out).resumed_files == 7
    assert verify(out) == []


def test_left_overs_of_a_kill_in_the_middle_of_the_commit_are_replaced(
    interrupted: Interrupted, pack_of: PackOf
) -> None:
    out = interrupted()
    for name in (MANIFEST, MANIFEST_DIGEST, "config.json", "experts/layer-0005.safetensors"):
        (out / f"{name}.part").write_text("half of")
    flashpack.convert(TRAINED, out)
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))


@pytest.mark.parametrize("name", ["experts/layer-0003.safetensors.part", "flashpack.json.part", JOURNAL])
def test_a_link_in_the_place_of_a_file_is_not_followed(interrupted: Interrupted, name: str, tmp_path: Path) -> None:
    out = interrupted()
    (tmp_path / "precious").write_text("mine")
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match=name.removesuffix(".part")):
        flashpack.convert(TRAINED, out)
    assert (tmp_path / "precious").read_text() == "mine"
    with pytest.raises(FlashpackError):
        Pack(out)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_folder_that_is_removed_in_the_middle_ends_the_conversion(tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"out: the folder was removed or replaced during the conversion") as caught:
        flashpack.convert(TRAINED, out, workers=workers, progress=at_call(200, lambda: out.rename(tmp_path / "away")))
    assert caught.value.exit_code == 6
    assert not out.exists()
    (tmp_path / "away").rename(out)
    assert flashpack.convert(TRAINED, out).resumed_files >= (2 if workers == 1 else 0)
    assert verify(out) == []


@pytest.mark.parametrize(("place", "name"), [(LocalFolder, "read"), (execute, "unlisted")])
def test_a_folder_that_is_removed_near_the_end_is_noticed_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: object, name: str
) -> None:
    out, real = tmp_path / "out", getattr(place, name)

    def call(*arguments: Any) -> Any:
        if out.exists() and (place is execute or "tokenizer.json" in arguments):  # read when the tensors are done
            out.rename(tmp_path / "away")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, call)
        with pytest.raises(OutputError, match="removed or replaced"):
            flashpack.convert(SMALL, out)
    assert not out.exists()
    assert not (tmp_path / "away" / MANIFEST).exists()
    (tmp_path / "away").rename(out)
    flashpack.convert(SMALL, out)
    assert verify(out) == []


def test_a_folder_that_is_deleted_or_becomes_a_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tqdm import tqdm

    out = tmp_path / "out"

    def replace() -> None:
        shutil.rmtree(out)
        out.write_text("a file")

    for action, again in ((lambda: shutil.rmtree(out), "whole"), (replace, "exists and is not a folder")):
        shutil.rmtree(out, ignore_errors=True)
        hook = at_call(200, action)
        with monkeypatch.context() as patch:
            patch.setattr(tqdm, "update", lambda bar, count, hook=hook: hook(count))
            with pytest.raises(SystemExit, match=r"^6$"):
                app(["convert", str(TRAINED), str(out), "--workers", "1"])
        errors = capsys.readouterr().err
        assert "out: the folder was removed or replaced during the conversion" in errors.splitlines()[-1]
        assert "Traceback" not in errors
        with pytest.raises(SystemExit):
            app(["convert", str(TRAINED), str(out)])
        assert again in "whole" * (out / MANIFEST).exists() + capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 3])
def test_a_folder_that_goes_before_a_file_begins_does_not_come_back(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a worker's look at the folder and its first file there."""
    out, away, begun = tmp_path / "out", tmp_path / "away", units.write

    def write(plan: object, path: str, site: units.Site) -> object:
        site.check()
        if out.exists():
            out.rename(away)
        return begun(plan, path, replace(site, check=after(site.check)))  # type: ignore[arg-type]

    def after(check: Callable[[], object]) -> Callable[[], object]:
        looks = itertools.count()
        return lambda: None if next(looks) == 0 else check()

    monkeypatch.setattr("flashpack.converter.execute.write", write)
    with pytest.raises(OutputError, match="the folder was removed or replaced"):
        flashpack.convert(TRAINED, out, workers=workers)
    assert not out.exists()
