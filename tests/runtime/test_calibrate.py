"""Recording what experts are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashpack.errors import FormatError, UsageError
from flashpack.formats.calibration import Calibration
from flashpack.formats.dtypes import to_float32
from flashpack.runtime import calibrate as module
from flashpack.runtime.calibrate import WINDOW, calibrate, read_text
from tests.conftest import ROOT, TRAINED, PackOf

TEXT = ROOT / "flashpack" / "cli" / "calibration.txt"
TOKENS = 4 * WINDOW


@pytest.fixture(scope="module")
def exact(pack_of: PackOf) -> Path:
    return pack_of("trained", "source", "source")


@pytest.fixture(scope="module")
def recorded(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calib") / "a.calib"
    calibrate(exact, [TEXT], path, TOKENS)
    return path


def test_neither_memory_nor_threads_change_a_byte(exact: Path, recorded: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        done: list[int] = []
        calibrate(exact, [TEXT], tmp_path / "b.calib", TOKENS, "smallest", advance=done.append)
    finally:
        torch.set_num_threads(threads)
    assert sum(done) == TOKENS
    assert (tmp_path / "b.calib").read_bytes() == recorded.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["b.calib"]


def test_inputs_are_those_of_transformers_own_model(exact: Path, recorded: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32).eval()
    seen: dict[int, Any] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, args, number=number: seen.__setitem__(number, [a.detach().numpy() for a in args])
        )
    windows = read_text(exact, [TEXT], TOKENS)
    with torch.inference_mode():
        model.model(input_ids=windows, use_cache=False)
    opened = Calibration(recorded)
    assert opened.layers == list(range(6))
    assert opened.tokens == TOKENS
    for number in opened.layers:
        found = opened.layer(number)
        x, experts, weights = seen[number]
        bound = 2**-8 * np.abs(x) + 1e-3  # a step of bfloat16, and the kernels' rounding
        assert (np.abs(to_float32(found.inputs, "BF16") - x) <= bound).all()
        same = found.experts == experts
        assert same.mean() > 0.999
        assert np.allclose(found.weights[same], weights[same], atol=1e-3)
        assert (found.residual > 0).all()


def test_texts_and_chats_by_lines(exact: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": "list the files " * 60}]}, {"text": "plain text " * 600}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    windows = read_text(exact, [path, TEXT], 4 * WINDOW)
    assert windows.shape[1] == WINDOW
    assert 3 <= len(windows) <= 4
    path.write_text('{"message": 1}\n')
    with pytest.raises(UsageError, match=r"line 1 is not"):
        read_text(exact, [path], WINDOW)


def test_a_text_that_is_too_short_or_missing_is_refused(exact: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(UsageError, match=r"short\.txt: .* tokens, and 512 are needed"):
        calibrate(exact, [tmp_path / "short.txt"], tmp_path / "out.calib")
    with pytest.raises(UsageError, match=r"none\.txt: cannot be read"):
        calibrate(exact, [tmp_path / "none.txt"], tmp_path / "out.calib")
    assert not list(tmp_path.glob("*.calib*"))


def test_lines_are_one_text(exact: Path, tmp_path: Path) -> None:
    text = "One line.\u2028Another.\n" + TEXT.read_text(encoding="utf-8")[:6000]
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 2 plus 2?"}]
    lines, plain = tmp_path / "a.jsonl", tmp_path / "a.txt"
    rows = [json.dumps(row, ensure_ascii=False) for row in [{"text": text}, {"messages": messages}] * 2]
    lines.write_text("\n\n".join(rows) + "\n", encoding="utf-8")
    chat = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhat is 2 plus 2?<|im_end|>\n"
    plain.write_text((text + chat) * 2, encoding="utf-8")
    windows = read_text(exact, [lines], 99_999)
    assert len(windows) > 5
    assert torch.equal(windows, read_text(exact, [plain], 99_999))


def test_each_text_gives_the_same_share_evenly_spaced(exact: Path) -> None:
    texts = [ROOT / "tests" / "data" / "chat.txt", TEXT]
    whole = [read_text(exact, [path], 10**9) for path in texts]
    expected = [rows[i * len(rows) // 4] for rows in whole for i in range(4)]
    assert torch.equal(read_text(exact, texts, 8 * WINDOW), torch.stack(expected))


@pytest.mark.parametrize("content", [b"[1]", b"5", b"{", b'{"messages": 5}', b"\xff\xfe"])
def test_other_lines_are_refused_in_one_line(exact: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"--text .*a\.jsonl: (line 1 is not|cannot be read)") as refused:
        read_text(exact, [path], WINDOW)
    assert "\n" not in str(refused.value)


def test_a_pack_without_tokenizer_is_refused(pack_of: PackOf, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="the pack has no tokenizer") as refused:
        calibrate(pack_of("olmoe", "source", "source"), [TEXT], tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_no_numbers_are_refused(exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.load_for

    def load_for(*arguments: Any, **options: Any) -> Any:
        model, at_once = real(*arguments, **options)
        norm = model.get_decoder().layers[2].post_attention_layernorm
        norm.register_forward_hook(lambda module, args, output: output / 0)
        return model, at_once

    monkeypatch.setattr(module, "load_for", load_for)
    with pytest.raises(FormatError, match="layer 2: the model computes values that are not numbers"):
        calibrate(exact, [TEXT], tmp_path / "out.calib", WINDOW)
    assert list(tmp_path.iterdir()) == []
