"""Conversion as a process: reproducible, resumable, bounded, refusing what it cannot do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import flashpack
from flashpack.converter import Options, plan
from flashpack.errors import OutputError, SourceError, UnsupportedError, UsageError
from flashpack.formats import Pack, verify
from flashpack.formats.constants import JOURNAL, MANIFEST
from tests.conftest import CHECKPOINTS, ROOT, TRAINED, PackOf, source_of

SourceCopy = Callable[[str], Path]


def contents(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_same_input_and_options_give_the_same_bytes(pack_of: PackOf, tmp_path: Path) -> None:
    first = pack_of("trained", "q4", "q8")
    report = flashpack.convert(TRAINED, tmp_path / "again", workers=3)  # auto means the same recipe
    assert contents(first) == contents(tmp_path / "again")
    assert report.identity == Pack(first).identity


def test_the_report_tells_sizes_and_errors(tmp_path: Path) -> None:
    report = flashpack.convert(TRAINED, tmp_path / "out")
    assert report.pack_bytes == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()) - 65
    assert report.expert_bits == 4.5
    assert 8.5 < report.dense_bits < 9
    layers = [e for e in report.errors if e.path.startswith("experts/")]
    assert len(layers) == 6
    assert all(0.05 < e.mean <= e.largest < 0.12 for e in layers)
    assert flashpack.convert(TRAINED, tmp_path / "lossless", "source", "source").errors == []


def test_a_plan_promises_the_sizes_that_are_written_and_writes_nothing(pack_of: PackOf, tmp_path: Path) -> None:
    work = plan(CHECKPOINTS / "qwen3_5_moe", Options())
    pack = pack_of("qwen3_5_moe")
    assert work.file_sizes() == {f.path: f.size for f in Pack(pack).manifest.files}
    assert any(name.startswith("mtp.") for name in work.dropped)
    assert any("visual" in name for name in work.dropped)
    assert not any("layers.0.mlp" in name and "mtp" not in name for name in work.dropped)


KILLED = """
import os, signal, sys
import flashpack
from flashpack.converter import execute
count = 0
real = execute.ShardWriter.write
def write(self, expert, record):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, expert, record)
execute.ShardWriter.write = write
flashpack.convert(sys.argv[1], sys.argv[2], workers=1)
"""


@pytest.mark.parametrize("moment", [1, 40, 100, 191])
def test_a_killed_conversion_continues_and_ends_with_the_same_bytes(
    pack_of: PackOf, tmp_path: Path, moment: int
) -> None:
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, TRAINED, out, str(moment)], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (out / MANIFEST).exists()
    with pytest.raises(flashpack.errors.NotAPackError, match="unfinished conversion"):
        Pack(out)
    done = {p: p.stat().st_mtime_ns for p in (out / "experts").glob("*.safetensors")}
    assert len(done) == (moment - 1) // 32
    report = flashpack.convert(TRAINED, out)
    # What was finished but not yet in the journal at the kill is done again: one file at the most.
    assert report.resumed_files >= len(done)
    assert sum(p.stat().st_mtime_ns == before for p, before in done.items()) >= len(done) - 1
    assert contents(out) == contents(pack_of("trained", "q4", "q8"))


def test_an_unfinished_conversion_with_other_options_or_source_is_not_mixed(
    source_copy: SourceCopy, tmp_path: Path
) -> None:
    source, out = source_copy("trained"), tmp_path / "out"
    subprocess.run([sys.executable, "-c", KILLED, source, out, "70"], cwd=ROOT, check=False)
    with pytest.raises(OutputError, match="differs from this one: recipe experts q4 -> q3"):
        flashpack.convert(source, out, experts="q3")
    os.utime(source / "model-00001-of-00003.safetensors")
    with pytest.raises(OutputError, match="source model-00001-of-00003.safetensors modified"):
        flashpack.convert(source, out)
    assert flashpack.convert(source, out, experts="q3", overwrite=True).resumed_files == 0
    assert verify(out) == []


def test_a_journal_cut_off_in_the_middle_of_a_line_still_serves(tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", KILLED, TRAINED, out, "70"], cwd=ROOT, check=False)
    with open(out / JOURNAL, "ab") as f:
        f.write(b'{"file": {"path": "experts/lay')
    assert flashpack.convert(TRAINED, out).resumed_files >= 2
    assert verify(out) == []


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / JOURNAL).write_bytes(b"\x00garbage\n")
    with pytest.raises(OutputError, match="damaged; use --overwrite"):
        flashpack.convert(CHECKPOINTS / "qwen3_moe", out)
    assert flashpack.convert(CHECKPOINTS / "qwen3_moe", out, overwrite=True)


def test_a_real_interrupt_leaves_a_resumable_folder(tmp_path: Path) -> None:
    """SIGINT to the command while it works, as Ctrl-C does."""
    out = tmp_path / "out"
    slow = (
        "import time\nfrom flashpack.converter import execute\nreal = execute.ShardWriter.write\n"
        "def write(self, e, r):\n    time.sleep(0.05)\n    real(self, e, r)\n"
        "execute.ShardWriter.write = write\nimport sys\nsys.argv[0] = 'flashpack'\n"
        "from flashpack.cli import main\nmain()\n"
    )
    command = [sys.executable, "-c", slow, "convert", str(TRAINED), str(out), "--workers", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (out / "experts" / "layer-0000.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to continue" in errors
    assert "Traceback" not in errors
    assert flashpack.convert(TRAINED, out).resumed_files >= 2
    assert verify(out) == []


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def break_missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00007.safetensors").unlink()


def break_truncated_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00007.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.extra.weight"] = "model-00001-of-00007.safetensors"
    path.write_text(json.dumps(index))


def break_missing_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def break_missing_tensor(folder: Path) -> None:
    change_config(folder, num_hidden_layers=4)


def break_extra_tensor(folder: Path) -> None:
    change_config(folder, mlp_only_layers=[1])


def break_shape(folder: Path) -> None:
    change_config(folder, moe_intermediate_size=32)


def break_dense_model(folder: Path) -> None:
    change_config(folder, model_type="qwen3", architectures=["Qwen3ForCausalLM"], num_experts=None)


def break_architecture(folder: Path) -> None:
    change_config(folder, model_type="martian_moe")


def break_config_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_only_bin(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def break_quantization(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "bitsandbytes"})


def break_lfs_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 12\n"
    (folder / "model-00001-of-00007.safetensors").write_text(text)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (break_missing_shard, SourceError, "model-00002-of-00007.safetensors: the shard is missing"),
        (break_truncated_shard, SourceError, "model-00002-of-00007.safetensors: truncated"),
        (break_index, SourceError, "names tensor model.layers.9.extra.weight"),
        (break_missing_index, SourceError, "no model.safetensors.index.json"),
        (break_missing_tensor, SourceError, "lacks model.layers.3"),
        (break_extra_tensor, SourceError, r"layers.1.mlp.*no place|lacks model.layers.1.mlp"),
        (break_shape, SourceError, r"\[8, 128, 64\] in the checkpoint, \[8, 64, 64\] in the model"),
        (break_dense_model, UnsupportedError, "'qwen3' is not a Mixture-of-Experts model"),
        (break_architecture, UnsupportedError, "'martian_moe' is not supported by transformers"),
        (break_config_json, SourceError, "config.json: not valid JSON"),
        (break_no_config, SourceError, "no config.json"),
        (break_only_bin, UnsupportedError, ".bin and .gguf"),
        (break_quantization, UnsupportedError, "'bitsandbytes' are not supported yet"),
        (break_lfs_pointer, SourceError, "Git LFS pointer"),
    ],
)
def test_a_bad_source_is_refused_in_one_line_and_leaves_nothing(
    source_copy: SourceCopy,
    tmp_path: Path,
    damage: Callable[[Path], None],
    error: type[Exception],
    message: str,
) -> None:
    source, out = source_copy("qwen3_moe"), tmp_path / "out"
    damage(source)
    with pytest.raises(error, match=message) as caught:
        flashpack.convert(source, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt_oss", "'gpt_oss': expert biases, transposed expert weights"),
        ("llama4_text", "'llama4_text' has experts, but not behind transformers' experts hook"),
        ("qwen3_moe-fp8block", "quantized with 'fp8'"),
        ("qwen3_moe-gptq", "quantized with 'gptq'"),
    ],
)
def test_what_is_not_supported_yet_is_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        flashpack.convert(source_of(name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 3}, SourceError, "3 bits in groups of 32"),
        ({"group_size": 64}, SourceError, "4 bits in groups of 64"),
        ({"mode": "mxfp4"}, UnsupportedError, "mode 'mxfp4'"),
        ({"bits": None}, SourceError, "lacks bits or group_size"),
        ({"model.layers.1.mlp.gate": False}, SourceError, "is False, but the module has scales"),
    ],
)
def test_mlx_parameters_are_checked_against_the_shapes(
    source_copy: SourceCopy, tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    source = source_copy("qwen3_moe-mlx4")
    config = json.loads((source / "config.json").read_text())
    change_config(source, quantization=config["quantization"] | change)
    with pytest.raises(error, match=message):
        flashpack.convert(source, tmp_path / "out")


def test_infinite_weights_are_refused_by_name(source_copy: SourceCopy, tmp_path: Path) -> None:
    source = source_copy("qwen3_moe_dense_first_tied")
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    field = json.loads(data[8 : 8 + length])["model.layers.2.mlp.experts.1.up_proj.weight"]
    start = 8 + length + field["data_offsets"][0]
    data[start : start + 2] = (0x7F80).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"layers.2.mlp.experts.1.up_proj.weight: infinite or NaN"):
        flashpack.convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert flashpack.convert(source, tmp_path / "out", experts="source", overwrite=True)


def test_a_tied_head_that_is_present_must_equal_the_embedding(source_copy: SourceCopy, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    source = source_copy("qwen3_moe_dense_first_tied")
    path = source / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    report = flashpack.convert(source, tmp_path / "same")
    assert report.dropped == ["lm_head.weight"]
    tensors["lm_head.weight"] += torch.ones(1, dtype=torch.bfloat16)
    save_file(tensors, path)
    with pytest.raises(SourceError, match="their values differ"):
        flashpack.convert(source, tmp_path / "other")


def test_the_target_folder_is_never_overwritten_by_accident(pack_copy: Callable[..., Path], tmp_path: Path) -> None:
    pack = pack_copy("qwen3_moe")
    with pytest.raises(OutputError, match="finished pack"):
        flashpack.convert(CHECKPOINTS / "qwen3_moe", pack)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        flashpack.convert(CHECKPOINTS / "qwen3_moe", other)
    with pytest.raises(OutputError, match="not one"):
        flashpack.convert(CHECKPOINTS / "qwen3_moe", other, overwrite=True)
    assert (other / "thesis.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="not a folder"):
        flashpack.convert(CHECKPOINTS / "qwen3_moe", other / "thesis.txt")
    before = Pack(pack).identity
    flashpack.convert(CHECKPOINTS / "qwen3_moe", pack, experts="q3", overwrite=True)
    assert Pack(pack).identity != before


def test_no_space_is_said_before_the_first_byte(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"0.01 GB needed, 0.00 GB free"):
        flashpack.convert(TRAINED, tmp_path / "out")
    assert not (tmp_path / "out").exists()


FULL_DISK = """
import resource, sys, flashpack
resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, 800_000))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from flashpack.cli import main
sys.argv = ["flashpack", "convert", sys.argv[1], sys.argv[2]]
main()
"""


def test_a_write_that_fails_in_the_middle_is_one_line_and_resumable(tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: writes fail with EFBIG."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", FULL_DISK, TRAINED, out]
    failed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert failed.returncode == OutputError.exit_code
    assert "no space left" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (out / MANIFEST).exists()
    assert flashpack.convert(TRAINED, out)
    assert verify(out) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"experts": "q7"}, "--experts q7"), ({"dense": "q3"}, "--dense q3"), ({"group_size": 16}, "--group-size 16")],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        flashpack.convert(TRAINED, tmp_path / "out", **options)  # type: ignore[arg-type]
