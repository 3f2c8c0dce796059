"""What is said about a pack: whole, damaged, too new, no pack at all; memory, files, tokenizer, reading, leftovers."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flashpack.doctor import examine, packs
from flashpack.doctor.remark import Remark
from flashpack.formats import Pack
from flashpack.formats import constants as C
from flashpack.formats.checksums import hexdigest
from flashpack.formats.manifest import canonical
from flashpack.kernels.cpu.native import compute
from flashpack.runtime import load, memory, warm
from flashpack.runtime.rates import Rate
from tests.conftest import TRAINED, PackOf

Copy = Callable[..., Path]


def look(folder: Path) -> dict[str, Remark]:
    """What is said about a pack, without its drive."""
    whole = packs.Whole(folder)
    found = list(whole.check())
    if whole.opened:
        found += whole.needs()
    return {f.name: f for f in found}


def test_a_whole_pack(pack_of: PackOf) -> None:
    folder = pack_of("trained")
    found = look(folder)
    assert {f.level for f in found.values()} == {"ok"}
    assert found["format"].data["identity"] == Pack(folder).identity
    assert found["format"].data["version"] == C.VERSION
    assert "experts q4, dense part q8" in found["format"].text
    assert "its data was not read" in found["structure"].text
    assert "with a chat template" in found["tokenizer"].text


def test_the_smallest_memory_is_that_of_run(pack_of: PackOf) -> None:
    folder = pack_of("trained")
    told = look(folder)["memory"].data
    runtime = load(folder, memory="smallest", device="cpu").flashpack
    taken = runtime.budget.to_json()
    fixed = ("dense", "kv", "work", "arena")
    assert {name: told["smallest"][name] for name in fixed} == {name: taken[name] for name in fixed}
    assert told["context"] == runtime.context


def test_a_pack_that_does_not_fit_is_a_problem(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_system_available", lambda: 10**7)
    found = look(pack_of("trained"))["memory"]
    assert found.level == "problem"
    assert "can be taken" in found.text
    assert "close other programs" in found.todo


def test_a_pack_of_which_a_part_fits(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pack_of("trained")
    pack = Pack(folder)
    least = look(folder)["memory"].data["smallest"]
    free = least["total"] - least["base"] + pack.expert_bytes // 2
    monkeypatch.setattr(memory, "spare", lambda: free)
    found = look(folder)["memory"]
    assert 0.4 < found.data["share"] < 0.6
    assert "% of the experts" in found.text


def test_damage_is_a_problem_with_the_way_to_mend_it(pack_copy: Copy) -> None:
    folder = pack_copy("trained")
    (folder / "experts" / "layer-0003.safetensors").write_bytes(b"short")
    (folder / "junk").write_text("")
    found = look(folder)
    assert list(found) == ["structure"]
    assert found["structure"].level == "problem"
    assert "layer-0003.safetensors, layer 3: wrong size" in found["structure"].text
    assert "flashpack repair" in found["structure"].todo
    assert {f["code"] for f in found["structure"].data["findings"]} == {"unlisted-file", "size", "header-digest"}


def test_a_file_too_much_is_to_be_removed_not_repaired(pack_copy: Copy) -> None:
    folder = pack_copy("trained")
    (folder / "junk").write_text("")
    found = look(folder)["structure"]
    assert "junk" in found.text
    assert found.todo.startswith("remove")


def test_a_pack_of_a_later_format_asks_for_a_newer_flashpack(pack_copy: Copy) -> None:
    folder = pack_copy("qwen3_moe")
    data = json.loads((folder / C.MANIFEST).read_text()) | {"version": 99}
    raw = canonical(data)
    (folder / C.MANIFEST).write_bytes(raw)
    (folder / C.MANIFEST_DIGEST).write_text(f"{hexdigest(raw)}\n")
    found = look(folder)
    assert (found["format"].level, found["format"].todo) == ("problem", "install the newest flashpack-moe")


def test_what_is_no_pack_is_called_by_its_name(tmp_path: Path) -> None:
    assert "a checkpoint, not a pack" in look(TRAINED)["format"].text
    assert look(TRAINED)["format"].todo == f"flashpack convert {TRAINED}"
    (tmp_path / "file").write_text("")
    assert "a file, not a folder" in look(tmp_path / "file")["format"].text
    assert "no such folder" in look(tmp_path / "missing")["format"].text
    assert "not a pack" in look(tmp_path)["format"].text
    (tmp_path / C.JOURNAL).write_text("")
    assert "the same convert command" in look(tmp_path)["format"].todo


def test_formats_without_native_kernels_are_noted(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "library", object)
    monkeypatch.setattr("flashpack.kernels.best_device", lambda: "cpu")
    found = look(pack_of("qwen3_moe-fp8block"))["kernels"]
    assert found.level == "note"
    assert "fp8" in found.text
    assert "kernels" not in look(pack_of("qwen3_moe"))
    monkeypatch.setattr(compute, "library", lambda: "not built")  # is said elsewhere
    assert "kernels" not in look(pack_of("qwen3_moe-fp8block"))


def test_layers_that_need_more_open_files_than_allowed(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = Pack(pack_of("trained"))
    needed = 3 * len(pack.manifest.layers) + 64
    for limits, says in (
        ((needed, needed), None),
        ((needed - 1, needed), f"ulimit -n {needed}"),
        ((10, 20), "hard limit of 20"),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda which, limits=limits: limits)
        found = list(packs._open_files(pack))
        assert len(found) == (says is not None)
        assert says is None or (found[0].level == "problem" and says in found[0].todo)


def test_a_tokenizer_that_is_missing_or_needs_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packs._tokenizer(tmp_path).level == "problem"
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr(packs, "_there", lambda module: module == "sentencepiece")
    found = packs._tokenizer(tmp_path)
    assert found.todo == "pip install protobuf"
    monkeypatch.undo()
    assert packs._there("json.decoder")
    assert not packs._there("not_a_package.at_all")


def test_seconds_of_reading_are_a_bound(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pack_of("trained")
    pack = Pack(folder)
    (kind,) = pack.manifest.record_kinds
    top_k = json.loads((folder / "config.json").read_text())["num_experts_per_tok"]
    size = len(pack.manifest.layers) * top_k * kind.stride
    assert packs.bytes_per_token(pack, top_k) == size
    whole = packs.Whole(folder)
    whole.rates = [Rate(kind.stride, size / 4, size / 5, 0.0)]
    (fits,) = whole._bound(pack, top_k, 1.0)
    assert (fits.level, fits.data["seconds_per_token"]) == ("ok", 4.0)
    assert "a bound, not a promise" in fits.text
    (slow,) = whole._bound(pack, top_k, 0.5)
    assert slow.level == "note"
    whole.rates = [Rate(kind.stride, None, 1e9, 1.0)]  # of memory, not of the drive
    assert list(whole._bound(pack, top_k, 0.5)) == []


def test_the_history_is_mentioned_if_it_is_used(
    pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pack = Pack(pack_of("trained"))
    warm.write(pack, [((0, 1), 0.5), ((0, 2), 0.25)])
    assert list(packs._history(pack)) == []  # FLASHPACK_WARM=0
    monkeypatch.setenv("FLASHPACK_WARM", "1")
    (found,) = packs._history(pack)
    assert found.text.startswith("2 experts")
    assert str(tmp_path) in found.text


def test_unfinished_conversions_beside_a_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("own", "other", "done"):
        (tmp_path / name).mkdir()
    for name in ("own", "other"):
        (tmp_path / name / C.JOURNAL).write_bytes(bytes(1000))
    (found,) = packs.unfinished(tmp_path / "own")
    assert found.data == {"folders": [str(tmp_path / "other")], "bytes": 1000}
    shutil.rmtree(tmp_path / "other")
    assert list(packs.unfinished(tmp_path / "own")) == []
    monkeypatch.chdir(tmp_path)
    (here,) = packs.unfinished(None)
    assert "own" in here.text


def test_a_check_that_fails_leaves_the_others_their_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Remark]:
        raise KeyError("surprise")

    def no_torch() -> list[Remark]:
        raise ImportError("no torch here")

    def unreadable() -> list[Remark]:
        raise OSError("permission denied")

    monkeypatch.setattr("flashpack.doctor.machine.processor", broken)
    monkeypatch.setattr("flashpack.doctor.kernels.gpu", no_torch)
    monkeypatch.setattr("flashpack.doctor.machine.memory", unreadable)
    begun: list[str] = []
    found = {f.name: f for f in examine(begin=begun.append)}
    assert "KeyError: 'surprise'" in found["the processor"].text
    assert "no torch here" in found["the GPU"].text
    assert "permission denied" in found["the memory"].text
    assert [found[n].level for n in ("the processor", "the GPU", "the memory")] == ["problem"] * 3
    assert "space" in found
    assert begun[0] == "the machine"
