"""KL divergence, best tokens and perplexity of ``eval``, against the same computed with transformers and numpy."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashpack
from flashpack.errors import FormatError, MemoryBudgetError, OutputError, UsageError
from flashpack.runtime import predict, score
from flashpack.runtime.predict import inference, load_for, log_probabilities
from flashpack.runtime.score import divergence, read_windows
from tests.conftest import CHECKPOINTS, ROOT, TRAINED, PackOf

DOCS = ROOT / "tests" / "data" / "docs.txt"
NAMES = ["deepseek_v3", "glm4_moe", "gpt_oss", "granitemoe", "minimax_m2", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe",
         "qwen3_next"]  # fmt: skip


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def of_library(model: torch.nn.Module, windows: torch.Tensor) -> np.ndarray:
    """Log-probabilities [windows, length, vocabulary], each window by itself."""
    with torch.inference_mode():
        return log_softmax(np.stack([model(ids[None]).logits[0].numpy() for ids in windows]))


def in_steps(model: torch.nn.Module, windows: torch.Tensor) -> np.ndarray:
    found = []
    with torch.inference_mode():
        for ids in windows:
            cache: Any = None
            for i in range(len(ids)):
                answer = model(ids[None, i : i + 1], past_key_values=cache, use_cache=True)
                cache = answer.past_key_values
                found.append(answer.logits[0, 0].numpy())
    return log_softmax(np.stack(found).reshape(*windows.shape, -1))


def expect(found: score.Divergence, p: np.ndarray, q: np.ndarray, windows: torch.Tensor, tolerance: float) -> None:
    """``found`` must be the divergence of the log-probabilities ``q`` from ``p``."""
    kld = (np.exp(p) * (p - q)).sum(-1)
    ids = windows.numpy()[:, 1:, None]
    losses = [-np.take_along_axis(x[:, :-1], ids, 2).mean() for x in (q, p)]
    assert (found.windows, found.length) == windows.shape
    assert found.kld == pytest.approx(kld.mean(), rel=tolerance)
    assert found.error == pytest.approx(kld.mean(1).std(ddof=1) / len(kld) ** 0.5, rel=10 * tolerance)
    assert found.p99 == pytest.approx(np.percentile(kld, 99), rel=10 * tolerance)
    assert found.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=2e-3)
    assert [found.perplexity, found.reference_perplexity] == pytest.approx(np.exp(losses), rel=tolerance)


def test_a_quantized_trained_model_against_transformers(pack_of: PackOf) -> None:
    pack, reference = pack_of("trained", "q2", "q8"), pack_of("trained", "source", "source")
    windows = read_windows(pack, DOCS, 3, 512)
    ids = AutoTokenizer.from_pretrained(TRAINED)(DOCS.read_text())["input_ids"]
    assert windows.flatten().tolist() == ids[: 3 * 512]
    p = of_library(AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32), windows)
    for plain in (False, True):
        q = of_library(flashpack.load(pack, reference=plain), windows)
        expect(divergence(pack, reference, windows, plain=plain), p, q, windows, 1e-4)


def test_a_tiny_checkpoint_against_transformers(pack_of: PackOf) -> None:
    pack, reference = pack_of("qwen3_moe", "q2", "q4"), pack_of("qwen3_moe", "source", "source")
    windows = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(1))
    p = of_library(AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "qwen3_moe", dtype=torch.float32), windows)
    q = of_library(flashpack.load(pack), windows)
    expect(divergence(pack, reference, windows), p, q, windows, 1e-3)


@pytest.mark.parametrize("rows", [2**21, 5 * 256])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_whole_model(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch, name: str, rows: int
) -> None:
    """Some families scale what the head gives, or cap it; the head is computed for few tokens at a time."""
    monkeypatch.setattr(predict, "_LOGITS", rows)
    known = np.load(CHECKPOINTS / f"{name}.npz")
    model = flashpack.load(pack_of(name, "source", "source"))
    windows = torch.from_numpy(known["prompt"])[None].repeat(3, 1)
    for at_once in (1, 2):
        with inference():
            pieces = list(log_probabilities(model, at_once, windows, single=False))
        assert max(len(piece) for piece in pieces) == min(rows // 256, windows.shape[1])
        found = torch.cat(pieces).view(*windows.shape, -1).numpy()
        assert np.abs(found - log_softmax(known["logits"])).max() <= 2e-4
    assert np.abs(of_library(model, windows) - found).max() <= 1e-4  # the model is as it was


def test_a_model_does_not_differ_from_itself(pack_of: PackOf) -> None:
    pack = pack_of("trained", "q4", "q8")
    found = divergence(pack, pack, read_windows(pack, DOCS, 5, 100))
    assert (found.kld, found.error, found.p99, found.top1) == (0, 0, 0, 1)
    assert found.perplexity == found.reference_perplexity


def test_neither_memory_nor_threads_nor_windows_per_pass_change_a_bit(
    pack_of: PackOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, reference = pack_of("trained", "q4", "q8"), pack_of("trained", "source", "source")
    windows = read_windows(pack, DOCS, 3, 512)
    threads, taken, results = torch.get_num_threads(), [], []
    monkeypatch.setattr(score, "load_for", lambda *a: taken.append(load_for(*a)[1]) or load_for(*a))
    for count, memory, at_once in ((1, None, 4), (2, None, 2), (1, "smallest", 4)):
        monkeypatch.setattr(predict, "AT_ONCE", at_once)
        torch.set_num_threads(count)
        try:
            results.append(divergence(pack, reference, windows, memory=memory))
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
    assert taken == [3, 3, 2, 2, 1, 1]
    assert results[0] == results[1] == results[2]


def test_windows_go_together_only_where_there_is_room_and_nothing_changes(pack_of: PackOf) -> None:
    pack = pack_of("trained", "q4", "q8")
    windows = torch.zeros(6, 512, dtype=torch.long)
    model, at_once = load_for(pack, windows, {}, single=False)
    assert at_once == 4
    four = flashpack.load(pack, memory="smallest", context=512, sequences=4).flashpack.budget
    assert four.work + four.kv > 3 * (model.flashpack.budget.work + model.flashpack.budget.kv) / 4
    assert load_for(pack, windows, {"memory": four.total - 50 * 2**20}, single=False)[1] == 1
    assert load_for(pack, windows[:, :500], {}, single=False)[1] == 1
    assert load_for(pack, windows, {}, single=True)[1] == 1
    assert load_for(pack, windows, {"reference": True}, single=False)[1] == 1
    with pytest.raises(MemoryBudgetError):
        load_for(pack, windows, {"memory": 50 * 2**20}, single=False)


def test_fewer_experts_are_judged_one_token_per_step(pack_of: PackOf) -> None:
    pack = pack_of("trained", "q4", "q8")
    windows = read_windows(pack, DOCS, 2, 40)
    q = in_steps(flashpack.load(pack, experts_per_token=2), windows)
    found = divergence(pack, pack, windows, experts_per_token=2)
    expect(found, in_steps(flashpack.load(pack), windows), q, windows, 1e-4)
    assert found.kld > 0.01


def test_no_model_is_in_memory_beside_the_other(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, reference = pack_of("trained", "q4", "q8"), pack_of("trained", "source", "source")
    alive: list[weakref.ref[Any]] = []

    def noted(*arguments: Any) -> Any:
        assert [model() for model in alive] == [None] * len(alive)
        found = load_for(*arguments)
        alive.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(score, "load_for", noted)
    divergence(pack, reference, read_windows(pack, DOCS, 1, 32))
    assert len(alive) == 2


def test_half_of_the_windows(pack_of: PackOf) -> None:
    pack = pack_of("trained", "q4", "q8")
    whole = read_windows(pack, DOCS, 5, 64)
    assert whole.shape == (5, 64)
    assert torch.equal(read_windows(pack, DOCS, 5, 64, "even"), whole[[0, 2, 4]])
    assert torch.equal(read_windows(pack, DOCS, 5, 64, "odd"), whole[[1, 3]])


def test_what_is_no_text_to_judge_with_is_refused(pack_of: PackOf, tmp_path: Path) -> None:
    pack = pack_of("trained", "q4", "q8")
    short = tmp_path / "short.txt"
    short.write_text("A short text.")
    with pytest.raises(UsageError, match="tokens, and 512 are needed"):
        read_windows(pack, short, 24, 512)
    with pytest.raises(UsageError, match="128 are needed"):
        read_windows(pack, DOCS, 1, 64, "odd")
    with pytest.raises(UsageError, match="choose from all, even, odd"):
        read_windows(pack, DOCS, 1, 64, "first")
    with pytest.raises(UsageError, match="the model has 4096 positions"):
        read_windows(pack, DOCS, 1, 4097)
    with pytest.raises(UsageError, match="2 tokens or more"):
        read_windows(pack, DOCS, 1, 1)
    with pytest.raises(UsageError, match="cannot be read"):
        read_windows(pack, tmp_path / "absent.txt", 1, 64)
    short.write_bytes(b"abc\xff")
    with pytest.raises(UsageError, match="cannot be read: byte 3 is not UTF-8"):
        read_windows(pack, short, 1, 64)


def test_another_vocabulary_is_refused(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, windows = pack_of("trained", "q4", "q8"), torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(UsageError, match="different vocabularies"):
        divergence(pack, pack_of("qwen3_moe"), windows)
    words = iter([{"a": 0, "b": 1}, {"a": 1, "b": 0}])  # of as many tokens
    monkeypatch.setattr(score, "load_tokenizer", lambda folder: SimpleNamespace(get_vocab=lambda: next(words)))
    with pytest.raises(UsageError, match="different vocabularies"):
        divergence(pack, pack_of("trained", "source", "source"), windows)


def test_a_small_disk_is_refused_before_anything_is_computed(
    pack_of: PackOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, windows = pack_of("trained", "q4", "q8"), torch.zeros(2, 512, dtype=torch.long)
    free = 2 * 512 * 4096 * 4 + 2**20
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(score.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(score, "load_for", None)
    with pytest.raises(OutputError, match=r"0\.02 GB needed for the reference's probabilities"):
        divergence(pack, pack, windows, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_no_numbers_are_an_error(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, windows = pack_of("trained", "q4", "q8"), torch.zeros(1, 8, dtype=torch.long)
    monkeypatch.setattr(score, "log_probabilities", lambda *a: iter([torch.full((8, 4096), float("nan"))]))
    with pytest.raises(FormatError, match="not numbers"):
        divergence(pack, pack, windows)
