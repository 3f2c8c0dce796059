"""transformers opens packs after ``import flashpack``, and everything else as before."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssForCausalLM, Qwen3_5MoeForCausalLM, pipeline

import flashpack
from flashpack.errors import FlashpackError, UsageError
from tests.conftest import TRAINED, PackOf

IDS = torch.tensor([[5, 6, 7, 90, 42]])


def opened(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def test_a_pack_is_a_model(pack_of: PackOf) -> None:
    pack = pack_of("trained", "source", "source")
    found, expected = opened(pack), flashpack.load(pack)
    assert type(found) is Qwen3_5MoeForCausalLM
    with torch.inference_mode():
        assert torch.equal(found(IDS).logits, expected(IDS).logits)
    assert found.flashpack.store.stats.steps == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the hint is Linux's")
def test_dense_files_are_asked_for_before_anything_is_built(pack_of: PackOf, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int, int]] = []

    def advise(fd: int, offset: int, size: int, advice: int) -> None:
        asked.append((os.readlink(f"/proc/self/fd/{fd}"), offset, size, advice))

    def stop(*_: object) -> None:
        raise UsageError("built")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(importlib.import_module("flashpack.runtime.load"), "build", stop)
    pack = pack_of("trained").resolve()
    with pytest.raises(UsageError, match="built"):
        flashpack.load(pack)
    dense = [f for f in pack.iterdir() if f.name.startswith("dense-")]
    wanted = {(str(f), 0, f.stat().st_size, os.POSIX_FADV_WILLNEED) for f in dense}
    assert wanted
    assert wanted == {a for a in asked if a[3] == os.POSIX_FADV_WILLNEED}


def test_options_reach_load(pack_of: PackOf) -> None:
    model = opened(pack_of("trained"), memory="smallest", context=77, device_map="cpu", dtype="auto")
    assert model.flashpack.context == 77
    assert max(model.flashpack.budget.slots.values()) == 2


def test_a_pipeline_runs_a_pack(pack_of: PackOf) -> None:
    pack = str(pack_of("trained"))
    tokenizer = AutoTokenizer.from_pretrained(pack)
    pipe: Any = pipeline("text-generation", model=pack, tokenizer=tokenizer, device_map="cpu")
    assert pipe.model.flashpack.pack.folder == Path(pack)
    answer = pipe([{"role": "user", "content": "What is 922 plus 291?"}], max_new_tokens=40, do_sample=False)
    assert (
        '{"name": "calculator", "arguments": {"expression": "922 + 291"}}' in answer[0]["generated_text"][-1]["content"]
    )


def test_checkpoints_are_opened_as_before() -> None:
    model = opened(TRAINED)
    assert not hasattr(model, "flashpack")


def test_another_class_is_refused(pack_of: PackOf) -> None:
    with pytest.raises(UsageError, match="a pack of Qwen3_5MoeForCausalLM, not of GptOss"):
        GptOssForCausalLM.from_pretrained(pack_of("trained"))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"load_in_4bit": True}, "load_in_4bit"),
        ({"gguf_file": "x.gguf"}, "gguf_file"),
        ({"device_map": "cuda:0"}, "cuda"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "lm_head"),
        ({"memory": "5 apples"}, "apples"),
    ],
)
def test_what_a_pack_cannot_do_is_refused(pack_of: PackOf, options: dict[str, Any], what: str) -> None:
    with pytest.raises(FlashpackError, match=what):
        Qwen3_5MoeForCausalLM.from_pretrained(pack_of("trained"), **options)


@pytest.mark.parametrize("first", ["import flashpack, transformers", "import transformers.modeling_utils, flashpack"])
def test_either_may_be_imported_first(pack_of: PackOf, first: str) -> None:
    code = (
        f"{first}\nfrom transformers import AutoModelForCausalLM\n"
        f"assert AutoModelForCausalLM.from_pretrained({str(pack_of('trained'))!r}).flashpack\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
