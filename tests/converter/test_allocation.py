"""A width for each expert, through whole conversions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import flashpack
from flashpack.converter import Options, against, allocation, plan
from flashpack.errors import OutputError, UnsupportedError, UsageError
from flashpack.formats import Pack
from flashpack.formats.constants import ALLOCATION, JOURNAL
from tests.conftest import CHECKPOINTS, TRAINED, contents
from tests.families.checkpoint import configuration

SMALL = CHECKPOINTS / "qwen3_moe"


def widths(pack: Path) -> dict[int, list[tuple[str, ...]]]:
    """Layer -> the encodings of each expert's matrices, as the pack has them."""
    opened = Pack(pack)
    found = {}
    for layer in opened.manifest.layers:
        with opened.open_shard(layer) as shard:
            found[layer.index] = [
                tuple(str(p.encoding) for p in shard.kind(e).projections) for e in range(layer.experts)
            ]
    return found


def test_bits_stay_within_what_was_asked_for_and_near_it(tmp_path: Path) -> None:
    report = flashpack.convert(TRAINED, tmp_path / "out", bpw=2.8)
    assert 2.78 < report.expert_bits <= 2.8
    assert flashpack.verify(tmp_path / "out") == []
    found = widths(tmp_path / "out")
    assert len({kind for kinds in found.values() for kind in kinds}) > 2
    told = json.loads((tmp_path / "out" / ALLOCATION).read_text())
    assert {int(layer): len(experts) for layer, experts in told.items()} == dict.fromkeys(found, 32)
    assert {bits for e in told["0000"] for bits in e.split(" ")} <= {"dq2", "dq3", "dq4"}


def test_a_plan_knows_the_size_before_anything_is_read(tmp_path: Path) -> None:
    work = plan(TRAINED, Options(bpw="2.8"))
    promised = sum(size for path, size in work.file_sizes().items() if path.startswith("experts/"))
    report = flashpack.convert(TRAINED, tmp_path / "out", bpw="2.8")
    assert abs(report.expert_bytes / promised - 1) < 0.05  # records are whole pages


@pytest.mark.parametrize("bpw", ["2.43", "4.5", "16"])
def test_bits_that_no_widths_give_are_refused(tmp_path: Path, bpw: str) -> None:
    with pytest.raises(UsageError, match=rf"--bpw {bpw}: the widths of this model's experts give 2\.438 to 4\.438"):
        flashpack.convert(TRAINED, tmp_path / "out", bpw=bpw)
    assert not (tmp_path / "out").exists()


Interrupted = Callable[..., Path]


def test_a_conversion_continues_with_the_widths_it_began_with(
    tmp_path: Path, interrupted: Interrupted, monkeypatch: pytest.MonkeyPatch
) -> None:
    flashpack.convert(TRAINED, tmp_path / "whole", bpw=2.8, workers=3)
    interrupted(bpw=2.8)
    with monkeypatch.context() as patch:
        patch.setattr(allocation, "_measure", None)  # nothing is measured again
        report = flashpack.convert(TRAINED, tmp_path / "out", bpw=2.8)
    assert report.resumed_files > 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_bits_are_another_conversion(tmp_path: Path, interrupted: Interrupted) -> None:
    interrupted(bpw=2.8)
    with pytest.raises(OutputError, match=r"an unfinished conversion differs.*bpw"):
        flashpack.convert(TRAINED, tmp_path / "out", bpw=2.9)


def test_widths_that_were_damaged_meanwhile_are_measured_again(tmp_path: Path, interrupted: Interrupted) -> None:
    flashpack.convert(TRAINED, tmp_path / "whole", bpw=2.8)
    interrupted(bpw=2.8)
    (tmp_path / "out" / ALLOCATION).write_bytes(b'{"0000": ["dq2"]}')
    flashpack.convert(TRAINED, tmp_path / "out", bpw=2.8)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_pack_of_chosen_widths_cannot_be_made_again_for_comparison(tmp_path: Path) -> None:
    flashpack.convert(SMALL, tmp_path / "out", bpw=3)
    with pytest.raises(UnsupportedError, match="the widths of its experts were chosen one by one"):
        against(tmp_path / "out", SMALL)


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are not read before it is clear that the conversion can go on: that takes hours."""

    def measured(*arguments: object) -> None:
        raise AssertionError("experts were measured")

    monkeypatch.setattr(allocation, "_measure", measured)


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update({"0001": [*told["0001"][:-1], "dq2 q4"]}),
        lambda told: told.update({"0001": [*told["0001"][:-1], "dq2"]}),
        lambda told: told["0001"].pop(),
        lambda told: told.pop("0001"),
        lambda told: told.update({"0009": told["0001"]}),
        lambda told: told.update({"0001": 5}),
    ],
    ids=["another width", "one width", "an expert less", "a layer less", "a layer more", "a number"],
)
def test_only_widths_of_this_very_model_are_taken(tmp_path: Path, change: Callable[[Any], object]) -> None:
    work = plan(SMALL, Options(bpw="3"))
    chosen = allocation.nominal(work)
    (tmp_path / ALLOCATION).write_bytes(chosen.to_bytes())
    assert allocation.Allocation.read(tmp_path, work) is None  # of no conversion that has begun
    (tmp_path / JOURNAL).touch()
    assert allocation.Allocation.read(tmp_path, work) == chosen
    told = json.loads(chosen.to_bytes())
    change(told)
    (tmp_path / ALLOCATION).write_text(json.dumps(told))
    assert allocation.Allocation.read(tmp_path, work) is None


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose gate and up, [36, 32], are no blocks of ``affine_dq``, and whose down, [32, 36], no groups."""
    path = tmp_path_factory.mktemp("odd") / "odd"
    config = configuration("qwen3_moe", moe_intermediate_size=36)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    return path


def test_matrices_that_a_width_does_not_fit_get_another_and_it_is_told(tmp_path: Path, odd: Path) -> None:
    report = flashpack.convert(odd, tmp_path / "out", "dq2")
    assert {kind for layer in widths(tmp_path / "out").values() for kind in layer} == {
        ("2-bit g32", "2-bit g32", "bf16")
    }
    assert "experts' gate projection: [36, 32] values are not blocks of 256; q2 in its place" in report.notices
    assert "experts' down projection: 36 input values are no multiple of 32; kept as bf16" in report.notices


def test_matrices_that_are_kept_cost_nothing(tmp_path: Path, odd: Path) -> None:
    """Of 16 bits, beside gate and up of 3 or 4."""
    report = flashpack.convert(odd, tmp_path / "out", bpw=7.7)
    assert 7.6 < report.expert_bits <= 7.7
    found = {kind for layer in widths(tmp_path / "out").values() for kind in layer}
    assert found == {(f"{bits}-bit g32", f"{bits}-bit g32", "bf16") for bits in (2, 3)}


@pytest.mark.usefixtures("nothing_measured")
def test_a_finished_pack_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    flashpack.convert(SMALL, tmp_path / "out")
    with pytest.raises(OutputError, match="holds a finished pack; use --overwrite"):
        flashpack.convert(SMALL, tmp_path / "out", bpw=3)


@pytest.mark.usefixtures("nothing_measured")
def test_a_full_disk_is_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"GB needed, 0\.00 GB free"):
        flashpack.convert(SMALL, tmp_path / "out", bpw=3)


@pytest.mark.usefixtures("nothing_measured")
def test_another_unfinished_conversion_is_refused_before_anything_is_measured(interrupted: Interrupted) -> None:
    out = interrupted(SMALL, 5)
    with pytest.raises(OutputError, match=r"an unfinished conversion differs from this one: .*bpw"):
        flashpack.convert(SMALL, out, bpw=3)


def test_a_pack_of_several_widths_runs_as_the_reference_in_any_memory(tmp_path: Path) -> None:
    flashpack.convert(TRAINED, tmp_path / "out", bpw=2.8)
    ids = torch.randint(0, 4096, (1, 40), generator=torch.Generator().manual_seed(1))
    found = []
    for options in ({}, {"memory": "smallest"}, {"reference": True}):
        model: Any = flashpack.load(tmp_path / "out", **options)
        assert len(model.flashpack.budget.slots) > 1  # records of more than one size
        with torch.inference_mode():
            found.append(model(ids).logits)
    assert torch.equal(found[0], found[1])
    # Of most tokens: where two experts are almost equal for a router, rounding decides.
    assert (found[0] - found[2]).abs().amax(-1).median() < 3e-2
