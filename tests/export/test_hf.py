"""Exports for transformers: loaded by a process that has never heard of flashpack, and converted back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import flashpack
from flashpack.errors import FormatError
from flashpack.export import Report, export
from flashpack.formats import Pack
from flashpack.formats.checksums import hexdigest
from flashpack.formats.manifest import Manifest
from flashpack.formats.writer import commit
from tests.conftest import CHECKPOINTS, PackOf, source_of
from tests.families.test_adapters import CASES, model_of, write

# One family for each way in which published names differ from the model's: experts one by one, under other names,
# stacked, stacked with rows of gate and up alternating, stacked and turned, and a part of a model with images.
FAMILIES = (
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "gpt_oss-mxfp4",
    "granitemoe",
    "llama4_text",
    "qwen3_5_moe",
)

STOCK = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM
for folder, prompt, out in json.loads(sys.argv[1]):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    with torch.inference_mode():
        np.save(out, model(torch.tensor([prompt])).logits[0].numpy())
assert not any(name.startswith("flashpack") for name in sys.modules)
"""


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))


def large_files(manifest: Manifest) -> list[object]:
    """Shards and dense files with their digests."""
    return [f for f in manifest.files if f.role != "copy"]


@pytest.fixture(scope="module")
def exports(pack_of: PackOf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Report]]:
    """Of each family, in files of at most 200 kB: folder and report."""
    folder = tmp_path_factory.mktemp("exports")
    return {
        name: (folder / name, export(pack_of(name, "source", "source"), folder / name, "hf", shard_size=200_000))
        for name in FAMILIES
    }


def test_stock_transformers_loads_them_and_computes_the_same(
    exports: dict[str, tuple[Path, Report]], tmp_path: Path
) -> None:
    """Logits of transformers 5.23 for the original checkpoints, as they are stored beside these."""
    stored = {name: np.load(CHECKPOINTS / f"{name}.npz") for name in FAMILIES}
    jobs = [(str(exports[n][0]), stored[n]["prompt"].tolist(), str(tmp_path / f"{n}.npy")) for n in FAMILIES]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, json.dumps(jobs)], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in FAMILIES:
        difference = np.abs(np.load(tmp_path / f"{name}.npy") - stored[name]["logits"]).max()
        assert difference <= 1e-4, f"{name}: {difference}"


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("gpt_oss-mxfp4", "qwen3_5_moe")])
def test_every_tensor_is_that_of_the_checkpoint_under_its_name(
    name: str, exports: dict[str, tuple[Path, Report]]
) -> None:
    expected, found = tensors_of(source_of(name)), tensors_of(exports[name][0])
    assert found.keys() == expected.keys()
    assert [n for n in expected if not same(found[n], expected[n])] == []
    assert [line for line in exports[name][1].losses if "further tokens" not in line] == []


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text", "trained"])
def test_converted_back_it_is_the_same_pack(
    name: str, exports: dict[str, tuple[Path, Report]], pack_of: PackOf, tmp_path: Path
) -> None:
    pack = pack_of(name, "source", "source")
    folder = exports[name][0] if name in exports else Path(export(pack, tmp_path / "export", "hf").out)
    report = flashpack.convert(folder, tmp_path / "back", "source", "source")
    assert report.identity == Pack(pack).identity


def test_of_a_model_with_images_the_text_model_is_exported(
    exports: dict[str, tuple[Path, Report]], pack_of: PackOf, tmp_path: Path
) -> None:
    folder, report = exports["qwen3_5_moe"]
    assert report.losses == [
        "the checkpoint's vision part is in no pack, so it is not exported",
        "layers that predict further tokens (mtp_num_hidden_layers) are in no pack, so they are not exported",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5MoeForCausalLM"]
    assert config["model_type"] == "qwen3_5_moe_text"
    assert config["dtype"] == "bfloat16"
    flashpack.convert(folder, tmp_path / "back", "source", "source")
    pack = Pack(pack_of("qwen3_5_moe", "source", "source")).manifest
    assert large_files(Pack(tmp_path / "back").manifest) == large_files(pack)


def test_files_end_at_the_size_that_was_asked_for(exports: dict[str, tuple[Path, Report]]) -> None:
    folder, report = exports["qwen3_moe"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {p.name: load_file(p) for p in folder.glob("*.safetensors")}
    assert index["weight_map"] == {n: name for name, tensors in files.items() for n in tensors}
    assert len(files) > 2
    assert all(sum(t.nbytes for t in f.values()) <= 200_000 or len(f) == 1 for f in files.values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files.values() for t in f.values())
    assert report.files == {p.name: p.stat().st_size for p in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"} < report.files.keys()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (source_of("qwen3_moe") / name).read_bytes()


def test_quantized_values_are_rounded_once_and_counted(
    pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the 4-bit MLX checkpoint: ``q * scale + bias`` in float32, then to bfloat16, computed here by torch."""
    monkeypatch.setattr("flashpack.export.content.PIECE_VALUES", 1000)  # many pieces, also of small matrices
    source = tensors_of(source_of("qwen3_moe-mlx4"))
    report = export(pack_of("qwen3_moe-mlx4", "source", "source"), tmp_path / "export", "hf")
    found = tensors_of(tmp_path / "export")

    def values(stem: str, expert: int | None = None) -> torch.Tensor:
        words, scales, biases = (source[f"{stem}.{part}"] for part in ("weight", "scales", "biases"))
        if expert is not None:
            words, scales, biases = words[expert], scales[expert], biases[expert]
        wide = words.view(torch.int32).long() & 0xFFFFFFFF
        codes = torch.stack([(wide >> (4 * i)) & 15 for i in range(8)], dim=-1).reshape(len(words), -1)
        group = codes.shape[1] // scales.shape[1]
        grouped = codes.reshape(len(codes), -1, group).float()
        return (grouped * scales.float()[..., None] + biases.float()[..., None]).reshape(codes.shape)

    changed = total = 0
    for layer in range(3):
        for expert in range(8):
            for projection in ("gate", "up", "down"):
                exact = values(f"model.layers.{layer}.mlp.switch_mlp.{projection}_proj", expert)
                name = f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
                assert same(found[name], exact.bfloat16()), name
                changed += int((exact.bfloat16().float() != exact).sum())
                total += exact.numel()
    assert same(found["model.embed_tokens.weight"], values("model.embed_tokens").bfloat16())
    line = f"experts, 4-bit g32: decoded, and {changed:,} of {total:,} values rounded to bfloat16"
    assert line in report.losses
    assert 0 < changed < total
    assert json.loads((tmp_path / "export" / "flashpack-export.json").read_text())["losses"] == report.losses


def test_config_json_says_nothing_of_a_quantization_that_is_gone(exports: dict[str, tuple[Path, Report]]) -> None:
    folder, report = exports["gpt_oss-mxfp4"]
    before = json.loads((source_of("gpt_oss-mxfp4") / "config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    assert config == {k: v for k, v in before.items() if k != "quantization_config"} != before
    assert report.losses == []  # 4-bit floats times powers of two are bfloat16 numbers


@pytest.mark.parametrize("name", ["dbrx", "jetmoe", "step3p7", "longcat_flash", "kimi_k2"])
def test_families_without_the_hook_are_exported_as_they_are_published(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tensors = case.publish(model_of(case.config).state_dict())
    flashpack.convert(write(tmp_path / "source", case.json, tensors), tmp_path / "pack", "source", "source")
    report = export(tmp_path / "pack", tmp_path / "export", "hf")
    source, found = tensors_of(tmp_path / "source"), tensors_of(tmp_path / "export")
    assert found.keys() == {n for n in source if not n.startswith(case.dropped)}
    assert [n for n in found if not same(found[n], source[n])] == []
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert "auto_map" not in config
    assert config["model_type"] == ("deepseek_v3" if name == "kimi_k2" else case.json["model_type"])
    without = "experts 5 to 7 have no weights"
    assert any(without in loss for loss in report.losses) == (name == "longcat_flash")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"num_hidden_layers": 3', b'"num_hidden_layers": 2', "disagree about the experts"),
        (b'"vocab_size": 256', b'"vocab_size": 255', "disagree about the tensor lm_head.weight"),
        (
            b'"moe_intermediate_size": 64',
            b'"moe_intermediate_size": 32',
            "experts of layer 0 do not have the model's shape",
        ),
        (b'"model_type": "qwen3_moe"', b'"model_type": "qwen99"', "model_type 'qwen99' is not supported"),
    ],
)
def test_a_pack_whose_config_does_not_fit_is_refused(
    old: bytes, new: bytes, message: str, pack_copy: Callable[..., Path], tmp_path: Path
) -> None:
    pack = pack_copy("qwen3_moe", experts="source", dense="source")
    path = pack / "config.json"
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    rewrite(pack)
    with pytest.raises(FormatError, match=message):
        export(pack, tmp_path / "export", "hf")
    assert list(tmp_path.glob("export*")) == []


def rewrite(pack: Path) -> None:
    """Make the manifest fit a changed config.json: a stranger's pack, sound by its digests."""
    data = (pack / "config.json").read_bytes()
    manifest = Manifest.from_bytes((pack / "flashpack.json").read_bytes())
    files = tuple(
        replace(f, size=len(data), digests={"file": hexdigest(data)}) if f.path == "config.json" else f
        for f in manifest.files
    )
    commit(pack, replace(manifest, files=files))
