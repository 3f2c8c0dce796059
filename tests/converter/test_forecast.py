"""What a plan promises, against what a conversion then does."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import flashpack
from flashpack.converter import Options, plan
from flashpack.converter.convert import bound
from flashpack.converter.forecast import Dropped, Forecast, forecast, group
from flashpack.converter.names import _merging
from flashpack.converter.options import DENSE_CHOICES, EXPERT_CHOICES
from tests.conftest import CHECKPOINTS, TRAINED, source_of


def told(name: str, target: Path, options: Options | None = None) -> Forecast:
    return forecast(bound(source_of(name)), options or Options(), target, overwrite=False, workers=2, remote=False)


@pytest.mark.parametrize("name", ["trained", "qwen3_moe-mlx4", "gpt_oss"])
def test_every_choice_has_the_sizes_of_its_own_plan(name: str, tmp_path: Path) -> None:
    choices = told(name, tmp_path).choices
    assert {(c.experts, c.dense) for c in choices} == set(itertools.product(EXPERT_CHOICES[1:], DENSE_CHOICES[1:]))
    for c in choices[::5]:
        work = plan(source_of(name), Options(c.experts, c.dense))
        assert c.pack_bytes == sum(work.file_sizes().values())
        assert c.dense_bytes == sum(work.file_sizes()[path] for path in work.dense_files)
    assert sum(c.chosen for c in choices) == 1


def test_the_chosen_pack_is_the_one_that_is_made(tmp_path: Path) -> None:
    forecasted = told("trained", tmp_path / "out", Options("q3", "q4", 32))
    report = flashpack.convert(TRAINED, tmp_path / "out", "q3", "q4", 32)
    c = forecasted.chosen
    assert (c.experts, c.dense) == ("q3", "q4")
    assert (c.expert_bytes, c.dense_bytes) == (report.expert_bytes, report.dense_bytes)
    assert (c.expert_bits, c.dense_bits) == (report.expert_bits, report.dense_bits)
    assert c.expert_bits < c.bits < c.dense_bits
    assert forecasted.read_bytes == report.source_bytes
    manifest = report.pack_bytes - c.pack_bytes
    assert 0 < manifest < forecasted.disk_needed - c.pack_bytes


def test_a_width_for_each_expert_is_a_row_of_its_own(tmp_path: Path) -> None:
    forecasted = told("trained", tmp_path, Options(bpw="2.8"))
    assert {c.experts for c in forecasted.choices} == {*EXPERT_CHOICES[1:], "mixed"}
    assert forecasted.chosen.expert_bits == pytest.approx(2.8, abs=0.02)
    assert forecasted.chosen.pack_bytes == sum(forecasted.plan.file_sizes().values())


@pytest.mark.parametrize(("experts", "share"), [("q4", 1), ("source", 0), ("gate_up=q2,down=q3", 1), ("mixed", 1)])
def test_what_is_rounded_is_counted(experts: str, share: int) -> None:
    options = Options(bpw="2.8") if experts == "mixed" else Options(experts)
    assert plan(TRAINED, options).rounded_weights() == share * 6 * 32 * 3 * 64 * 256


def test_every_byte_of_the_shards_is_read_dropped_or_header(tmp_path: Path) -> None:
    f = told("qwen3_5_moe", tmp_path)
    shards = (CHECKPOINTS / "qwen3_5_moe").glob("*.safetensors")
    assert f.read_bytes + f.dropped_bytes + f.header_bytes == sum(p.stat().st_size for p in shards)
    assert f.dropped_bytes == sum(d.nbytes for d in f.dropped) > 0
    assert sum(d.tensors for d in f.dropped) == len(f.plan.dropped)
    assert {d.pattern for d in f.dropped} == {"model.visual.*", "mtp.*"}


def test_what_an_unfinished_conversion_has_written_needs_no_disk(tmp_path: Path) -> None:
    whole = told("trained", tmp_path / "out")
    flashpack.convert(TRAINED, tmp_path / "out")
    (tmp_path / "out" / "flashpack.json").unlink()
    (tmp_path / "out" / "experts" / "layer-0002.safetensors").unlink()
    rest = told("trained", tmp_path / "out")
    layer = whole.plan.file_sizes()["experts/layer-0002.safetensors"]
    assert whole.disk_needed - rest.disk_needed == whole.chosen.pack_bytes - layer


def test_dropped_tensors_are_grouped_by_the_shortest_prefix_that_nothing_kept_has() -> None:
    dropped = {
        "model.visual.a.weight": 1,
        "model.visual.b.weight": 2,
        "model.layers.2.mlp.weight": 4,
        "model.layers.2.norm.weight": 8,
        "model.layers.0.rotary_emb.inv_freq": 16,
        "model.layers.1.rotary_emb.inv_freq": 32,
        "model.layers.0.k_scale": 64,
        "head": 128,
    }
    kept = {"model.layers.0.mlp.weight", "model.layers.1.mlp.weight"}
    assert group(dropped, kept | set(dropped)) == [
        Dropped("model.visual.*", 2, 3),
        Dropped("model.layers.2.*", 2, 12),
        Dropped("model.layers.*.rotary_emb.*", 2, 48),
        Dropped("model.layers.*.k_scale", 1, 64),
        Dropped("head", 1, 128),
    ]


def test_names_of_experts_are_renamed_once_for_a_layer_only_where_all_become_one_parameter() -> None:
    asked = []

    def rename(name: str) -> tuple[str, str | None]:
        asked.append(name)
        if "single" in name:
            return name, None
        return name.split(".experts.")[0] + ".experts.gate_up_proj", "gate"

    renamed = _merging(rename)
    merged = {renamed(f"layers.3.mlp.experts.{e}.gate.weight") for e in range(50)}
    assert merged == {("layers.3.mlp.experts.gate_up_proj", "gate")}
    assert len(asked) == 2
    assert renamed("layers.4.mlp.experts.7.gate.weight")[0].startswith("layers.4.")
    for e in range(50):
        assert renamed(f"single.experts.{e}.gate.weight") == (f"single.experts.{e}.gate.weight", None)
    assert renamed("layers.3.mlp.experts.gate_up_proj") == ("layers.3.mlp.experts.gate_up_proj", "gate")
