"""lm_eval's model: log-likelihoods are transformers', do not depend on each other, and cost no more than they must.

What needs lm_eval is skipped where that is not installed: ``pip install 'flashpack-moe[eval]'``.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import flashpack
from flashpack.errors import UsageError
from flashpack.lm_eval import register, scoring
from flashpack.lm_eval.__main__ import main
from flashpack.lm_eval.scoring import Continuation, score
from flashpack.runtime import predict
from tests.conftest import ROOT, PackOf, source_of

DATA = ROOT / "tests" / "data"

CONTEXT = [7, 99, 23, 81, 5, 61, 17, 44, 3, 92, 15, 66, 28, 39, 70, 84, 12, 55, 31, 8, 77]


def continuations() -> list[Continuation]:
    """Answers of one token and of several to one question, another question, one that begins like the first and goes
    on, a long one (it is computed in another way), and one of a single token."""
    asked = [(CONTEXT, [4]), (CONTEXT, [9]), (CONTEXT, [4, 8, 15]), (CONTEXT, [4, 8, 16]), (CONTEXT, [30, 2])]
    asked += [(CONTEXT[5:], [4, 8]), ([*CONTEXT, 4, 8, 15, 6], [16]), ([2], [*CONTEXT, *CONTEXT, *CONTEXT, *CONTEXT])]
    asked += [(CONTEXT, [*range(40, 47)]), ([*CONTEXT, *range(40, 47), 9, 9], [33])]
    asked += [(CONTEXT, [*range(10, 10 + scoring.SHORT + 1)]), ([3], [5])]
    return [Continuation(tuple(context), tuple(tokens)) for context, tokens in asked]


@pytest.fixture(params=["trained", "qwen3_moe"])
def name(request: pytest.FixtureRequest) -> str:
    """With recurrent layers, and with attention alone."""
    return str(request.param)


def loaded(pack_of: PackOf, name: str) -> Any:
    return flashpack.load(pack_of(name, "source", "source"), prefix_memory=0)


def test_log_likelihoods_are_transformers(pack_of: PackOf, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "_LOGITS", 2**15)  # so that there are several pieces
    reference: Any = AutoModelForCausalLM.from_pretrained(source_of(name), dtype=torch.float32)
    model = loaded(pack_of, name)
    asked = continuations()
    likeliest = [(CONTEXT, [int(reference(torch.tensor([CONTEXT])).logits[0, -1].argmax())])]
    asked += [Continuation(tuple(c), tuple(t)) for c, t in likeliest]
    found = score(model, asked, model.flashpack.prefix_memory)
    for one, (total, greedy) in zip(asked, found, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([one.context + one.tokens])).logits[0, len(one.context) - 1 : -1]
        tokens = torch.tensor(one.tokens)
        expected = logits.log_softmax(-1).gather(1, tokens[:, None]).sum()
        assert total == pytest.approx(float(expected), abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == tokens).all())
    assert [greedy for _, greedy in found] == [False] * (len(asked) - 1) + [True]


def test_a_result_does_not_depend_on_the_others(pack_of: PackOf, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, though contexts are read in several chunks, of which some are read once for several."""
    monkeypatch.setattr(scoring, "PROMPT_CHUNK", 8)
    model = loaded(pack_of, name)
    asked = continuations()
    room = model.flashpack.prefix_memory
    alone = [score(model, [one], room)[0] for one in asked]
    assert score(model, asked, room) == alone
    assert score(model, asked[::-1], room) == alone[::-1]


def test_what_is_common_is_read_once(pack_of: PackOf, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PROMPT_CHUNK", 8)
    model = loaded(pack_of, name)
    read: list[int] = []
    model.register_forward_pre_hook(lambda m, a, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True)
    score(model, [one for one in continuations() if one.context == tuple(CONTEXT)][:5], model.flashpack.prefix_memory)
    # The context but its last token; that alone (answers of one token), and that with what each has before its end.
    assert read == [8, 8, 4, 1, 3, 2]
    read.clear()
    longer = [Continuation((*CONTEXT[:18], *more), (1,)) for more in ([50, 51], [60, 61])]
    score(model, longer, model.flashpack.prefix_memory)
    # Whole chunks of the other's beginning, but where a recurrent state cannot go back to their end.
    assert read == [8, 8, 3, 1] + ([3, 1] if name == "qwen3_moe" else [8, 8, 3, 1])
    read.clear()
    following = [Continuation(tuple(CONTEXT), (*range(40, 47),)), Continuation((*CONTEXT, *range(40, 47), 9), (3,))]
    score(model, following, model.flashpack.prefix_memory)
    # What followed a context was not read in the chunks of a longer one.
    assert read == [8, 8, 4, 7] + ([8, 4, 1] if name == "qwen3_moe" else [8, 8, 8, 4, 1])


def test_what_is_too_long_is_cut_at_its_beginning() -> None:
    assert Continuation.cut([1, 2, 3, 4], [5, 6], 5) == Continuation((1, 2, 3, 4), (5, 6))
    assert Continuation.cut([1, 2, 3, 4], [5, 6], 4) == Continuation((2, 3, 4), (5, 6))  # 2, 3, 4, 5 are read
    assert Continuation.cut([1, 2, 3, 4], [5, 6], 2) == Continuation((4,), (5, 6))


def test_without_lm_eval_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(UsageError, match=r"pip install 'flashpack-moe\[eval\]'"):
        register()
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Tasks of our own on local files: which tool is asked for, the call itself, and a text longer than the context."""
    calls = [json.loads(line) for line in (DATA / "toolcalls.jsonl").read_text().splitlines()[:24:4]]
    names = sorted({call["name"] for call in calls})
    rows = [{"question": call["user"], "answer": names.index(call["name"])} for call in calls]
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (DATA / "docs.txt").read_text()
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text[:n]}) + "\n" for n in (200, 900)))
    common = {"dataset_path": "json", "test_split": "test"}
    calls_file, texts_file = ({"data_files": {"test": str(tmp_path / f)}} for f in ("calls.jsonl", "texts.jsonl"))
    mean = {"aggregation": "mean", "higher_is_better": True}
    made = [
        {
            "task": "tool", "output_type": "multiple_choice", "dataset_kwargs": calls_file, "target_delimiter": "",
            "doc_to_text": '{{question}}\n<tool_call>\n{"name": "', "doc_to_choice": names, "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", **mean}],
        },
        {
            "task": "call", "output_type": "generate_until", "dataset_kwargs": calls_file,
            "doc_to_text": '{{question}}\n<tool_call>\n{"name": "', "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["</tool_call>"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        {
            "task": "text", "output_type": "loglikelihood_rolling", "dataset_kwargs": texts_file,
            "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [
                {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
            ],
        },
    ]  # fmt: skip
    for task in made:
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(common | task))  # JSON is YAML
    return tmp_path


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for needed in ("accelerate", "lm_eval"):
        pytest.importorskip(needed)
    import datasets
    import lm_eval

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return lm_eval


@pytest.mark.filterwarnings("default")  # what lm_eval and datasets leave open is their own affair
def test_lm_eval_finds_in_a_lossless_pack_what_it_finds_in_the_checkpoint(
    lm_eval: Any, pack_of: PackOf, tasks: Path
) -> None:
    from lm_eval.tasks import TaskManager

    register()
    pack = pack_of("trained", "source", "source")
    models: list[tuple[str, dict[str, Any]]] = [
        ("flashpack", {"pack": str(pack), "context": 128, "memory": "smallest"}),
        ("hf", {"pretrained": str(source_of("trained")), "dtype": "float32", "device": "cpu", "max_length": 128}),
    ]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    own, theirs = (
        lm_eval.simple_evaluate(
            model=model, model_args=arguments, tasks=["tool", "call", "text"], task_manager=manager, bootstrap_iters=0
        )
        for model, arguments in models
    )
    assert own["config"]["model_sha"] == flashpack.load(pack).flashpack.pack.identity
    assert 0.5 < own["results"]["tool"]["acc,none"] == theirs["results"]["tool"]["acc,none"]
    answers = {task: [s["resps"] for s in own["samples"][task]] for task in ("tool", "call", "text")}
    expected = {task: [s["resps"] for s in theirs["samples"][task]] for task in ("tool", "call", "text")}
    assert answers["call"] == expected["call"]
    assert any(len(found[0][0]) > 20 for found in answers["call"])
    for mine, other in zip(answers["tool"], expected["tool"], strict=True):
        for (found,), (wanted,) in zip(mine, other, strict=True):
            assert float(found[0]) == pytest.approx(float(wanted[0]), abs=1e-3)
            assert str(found[1]) == str(wanted[1])
    for (found,), (wanted,) in zip(answers["text"], expected["text"], strict=True):
        assert float(found[0]) == pytest.approx(float(wanted[0]), abs=1e-3)


@pytest.mark.filterwarnings("default")
def test_the_command_is_lm_evals(
    lm_eval: Any, pack_of: PackOf, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lm_eval.tasks as theirs

    # It looks at all of its own tasks first, for 20 s.
    monkeypatch.setattr(theirs, "TaskManager", functools.partial(theirs.TaskManager, include_defaults=False))
    command = ["lm_eval", "--model", "flashpack", "--tasks", "tool", "--include_path", str(tasks), "--limit", "2"]
    arguments = f"pack={pack_of('trained')},context=256,memory=smallest"
    monkeypatch.setattr(sys, "argv", [*command, "--model_args", arguments])
    main()
    assert "|tool|" in capsys.readouterr().out.replace(" ", "")
    for bad, code, message in (("", "2", "batch size 8"), (",memory=1MB", "7", "needs at least")):
        options = [] if bad else ["--batch_size", "8"]
        monkeypatch.setattr(sys, "argv", [*command, "--model_args", arguments + bad, *options])
        with pytest.raises(SystemExit) as caught:
            main()
        assert str(caught.value.code) == code
        assert message in capsys.readouterr().err.splitlines()[-1]
