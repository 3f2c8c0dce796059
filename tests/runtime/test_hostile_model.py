"""config.json and generation_config.json of a stranger's pack: refused in a line or harmless, quickly and cheaply."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flashpack
from flashpack.errors import FlashpackError, FormatError, UnsupportedError
from flashpack.formats.verify import verify
from flashpack.runtime.generate import generate
from flashpack.runtime.load import _fill_buffers
from flashpack.runtime.sampling import Sampling
from flashpack.runtime.tokenizer import load_tokenizer
from flashpack.skeleton import build, read_config
from tests.conftest import CHECKPOINTS, ROOT, TRAINED
from tests.strangers import bounded, change_json, rewrite

PackCopy = Callable[..., Path]


def refusal(pack: Path) -> str:
    """The one line with which ``load`` refuses a pack."""
    with pytest.raises(FlashpackError) as caught, bounded():
        flashpack.load(pack, memory="smallest")
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    # It must have been seen before it was tried.
    assert not re.search("MemoryError|allocate", text)
    return text.replace(str(pack), "PACK")


def logits(pack: Path) -> torch.Tensor:
    with bounded(), torch.inference_mode():
        found: torch.Tensor = flashpack.load(pack, memory="smallest")(torch.arange(7)[None]).logits
    return found


ABSURD: list[tuple[str, str, Any, str]] = [
    *[("qwen3_moe", "num_hidden_layers", n, why) for n, why in [
        (10**9, r"config.json: num_hidden_layers is 1e\+09, more than 65536"), (60000, "more than 1536 parts"),
        (4, "disagree about the experts"), (2, "disagree"), (0, "not behind transformers' experts hook"),
        (-1, "."), ("7", "."), (1.5, "."), (None, "."), ([], "."),
    ]],
    *[("qwen3_moe", "hidden_size", n, ".") for n in (10**9, 10**30, -64, 0, 63, "64", None, 64.0, {"a": 1})],
    *[("qwen3_moe", "num_experts", n, ".") for n in (10**9, 10**15, 7, 0, -1, "8", None)],
    *[("qwen3_moe", "head_dim", n, ".") for n in (10**12, 10**30, 31, 0, -32, "32")],
    *[("qwen3_moe", "vocab_size", n, ".") for n in (10**12, 255, 0, -1, None)],
    *[("qwen3_moe", "moe_intermediate_size", n, ".") for n in (10**12, 65, -1)],
    *[("qwen3_moe", "num_experts_per_tok", n, "experts per token|not a configuration") for n in (10**9, 0, -1, "2")],
    *[("qwen3_moe", "max_position_embeddings", n, ".") for n in (0, -5, "many", 1.5)],
    *[("qwen3_moe", "num_attention_heads", n, ".") for n in (10**9, 3, 0, -4)],
    ("qwen3_moe", "hidden_act", "import os", "."),
    ("qwen3_moe", "hidden_act", 5, "."),
    ("qwen3_moe", "model_type", "no_such_family", "model_type 'no_such_family' is not supported"),
    ("qwen3_moe", "model_type", 7, "names no model_type"),
    ("qwen3_moe", "model_type", ..., "names no model_type"),
    ("qwen3_moe", "model_type", "llama", "."),
    ("qwen3_moe", "model_type", "clip", "no causal language model|not a configuration"),
    ("qwen3_moe", "get_text_config", 5, "."),
    ("qwen3_moe", "attribute_map", {"hidden_size": "vocab_size"}, "."),
    ("qwen3_moe", "text_config", {"model_type": "qwen3_moe"}, "text_config belongs to no model_type"),
    ("qwen3_moe", "rope_scaling", {"rope_type": "yarn", "factor": "x", "rope_theta": 1e4}, "."),
    ("qwen3_moe", "rope_scaling", {"rope_type": "no_such_rope", "rope_theta": 1e4}, "."),
    ("qwen3_moe", "rope_scaling", [1], "."),
    ("qwen3_moe", "per_layer_config", {"0": {"hidden_size": 10**9}}, "."),
    ("trained", "layer_types", ["full_attention"], "must be equal to the number of `layer_types`"),
    ("trained", "layer_types", ["full_attention"] * 100000, "."),
    ("trained", "layer_types", ["no such type"] * 6, "."),
    ("trained", "layer_types", "full_attention", "."),
    ("trained", "layer_types", ["full_attention"] * 6, "."),
    ("trained", "rope_parameters", {"rope_type": "default", "partial_rotary_factor": 1e9}, "."),
    ("trained", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e9}, "."),
    ("trained", "linear_conv_kernel_dim", 10**9, "."),
    ("trained", "linear_num_value_heads", 10**6, "."),
    ("deepseek_v3", "n_group", 0, "cannot be computed"),
    ("deepseek_v3", "n_routed_experts", 10**9, "."),
    ("deepseek_v3", "kv_lora_rank", 10**12, "."),
    ("qwen3_5_moe", "text_config", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1e"),
    ("qwen3_5_moe", "text_config", {"num_hidden_layers": 60000}, "parts"),
    ("qwen3_5_moe", "text_config", None, "."),
    ("qwen3_5_moe", "vision_config", {"depth": 10**9}, "depth is 1e"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "field", "value", "message"), ABSURD)
def test_an_absurd_configuration_is_refused_before_anything_is_made(
    pack_copy: PackCopy, family: str, field: str, value: Any, message: str
) -> None:
    pack = pack_copy(family)
    change_json(pack, "config.json", **{field: value})
    assert re.search(message, refusal(pack))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model_type": "qwen3_moe", "model_type": "qwen3_moe"}',
        b'{"model_type": "qwen3_moe", "rms_norm_eps": NaN}',
        b'{"model_type": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model_type": "qwen3_moe", "x": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
    ],
)
def test_a_configuration_that_is_no_plain_json_object_is_refused(pack_copy: PackCopy, data: bytes) -> None:
    pack = pack_copy("qwen3_moe")
    rewrite(pack, "config.json", data)
    assert "config.json" in refusal(pack)


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}},
        {"auto_map": {"AutoConfig": "stranger/repo--evil.Config"}},
        {"attn_implementation": "stranger/kernel", "_attn_implementation": "stranger/kernel"},
        {"experts_implementation": "stranger/kernel", "_experts_implementation_internal": "x"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"dtype": "no_such_dtype", "torch_dtype": "__builtins__"},
        {"num_labels": 10**9},
        {"id2label": 5, "label2id": "x"},
        {"_name_or_path": "../../etc", "transformers_version": "99"},
        {"max_position_embeddings": 10**15},
        {"sliding_window": 10**15},
    ],
)
def test_fields_that_choose_code_or_nothing_change_nothing(pack_copy: PackCopy, changes: dict[str, Any]) -> None:
    pack = pack_copy("qwen3_moe")
    plain = logits(pack)
    change_json(pack, "config.json", **changes)
    assert torch.equal(logits(pack), plain)


def test_infinity_in_the_words_of_transformers_is_a_number(source_copy: Callable[[str], Path]) -> None:
    folder = source_copy("qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"limit": [0.0, {"__float__": "Infinity"}]}))
    assert read_config(folder).limit == [0.0, float("inf")]


def test_code_beside_the_configuration_never_runs(pack_copy: PackCopy, tmp_path: Path) -> None:
    pack = pack_copy("trained")
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n".encode()
    (pack / "evil.py").write_bytes(code)
    assert [(f.code, f.file) for f in verify(pack)] == [("unlisted-file", "evil.py")]
    assert "evil.py" in refusal(pack)
    # What opens the files one by one does not run it either.
    change_json(pack, "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    change_json(pack, "generation_config.json", custom_generate="evil", trust_remote_code=True)
    build(read_config(pack))
    for automatic in ({"AutoTokenizer": ["evil.Tokenizer", None]}, ["evil.Tokenizer", None], "evil", 5):
        for name in ("TokenizersBackend", "NoSuchTokenizer", "evil.Tokenizer"):
            change_json(pack, "tokenizer_config.json", auto_map=automatic, tokenizer_class=name)
            with contextlib.suppress(FormatError):
                load_tokenizer(pack)
    (pack / "evil.py").unlink()
    change_json(pack, "tokenizer_config.json", auto_map=..., tokenizer_class="TokenizersBackend")
    model = flashpack.load(pack, memory="smallest")
    assert generate(model, load_tokenizer(pack), [5, 6], 2).generated_tokens == 2
    rewrite(pack, "evil.py", code)
    assert "evil.py" in refusal(pack)
    assert not ran.exists()


def test_conversion_leaves_code_behind_and_never_runs_it(source_copy: Callable[[str], Path], tmp_path: Path) -> None:
    source, ran = source_copy("qwen3_moe"), tmp_path / "ran"
    for name in ("modeling_evil.py", "tokenizer_evil.py", "tokenization_evil.py"):
        (source / name).write_text(f"open({str(ran)!r}, 'w')\nclass Model: pass\n")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.Model", "AutoModelForCausalLM": "modeling_evil.Model"}
    (source / "config.json").write_text(json.dumps(config))
    pack = tmp_path / "pack"
    flashpack.convert(source, pack)
    assert not list(pack.rglob("*.py"))
    assert logits(pack).isfinite().all()
    assert not ran.exists()


class Bomb:
    """Pickled, a call that leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.trace), "w"))


def test_pickles_in_a_pack_are_never_loaded(pack_copy: PackCopy, tmp_path: Path) -> None:
    pack, ran = pack_copy("trained"), tmp_path / "ran"
    bombs = [pack / name for name in ("pytorch_model.bin", "model.pt", "adapter_model.bin")]
    for path in bombs:
        path.write_bytes(pickle.dumps(Bomb(ran)))
    rewrite(pack, "tokenizer.model", pickle.dumps(Bomb(ran)))
    assert "not listed in the manifest" in refusal(pack)
    # transformers would take any of its classes as tokenizer, models with pickled weights too.
    for name in ("Qwen3MoeForCausalLM", "AutoModel", "AutoTokenizer", "AutoProcessor", "pipeline", "logging"):
        change_json(pack, "tokenizer_config.json", tokenizer_class=name)
        with pytest.raises(FormatError, match="is not a tokenizer"), bounded():
            load_tokenizer(pack)
    for path in bombs:
        path.unlink()
    assert logits(pack).isfinite().all()
    assert not ran.exists()


def test_no_source_line_trusts_code_or_loads_pickles() -> None:
    for path in (ROOT / "flashpack").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"trust_remote_code\s*=\s*(?!False)|torch\.load|import pickle|weights_only", text), path
        # Models are never loaded by transformers, only built; but for what its users load that is no pack.
        if path.name == "pretrained.py":
            continue
        assert set(re.findall(r"(\w+)\.from_pretrained", text)) <= {"AutoTokenizer"}, path


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 10**12, "max_length": 10**12},
        {"num_beams": 10**9, "num_return_sequences": 10**9, "num_beam_groups": 3, "use_mtp": True},
        {"cache_implementation": "static", "max_cache_len": 10**12, "compile_config": {"mode": "x"}},
        {"custom_generate": "stranger/repo", "penalty_alpha": 0.6, "dola_layers": "high", "assistant_model": "x"},
        {"prompt_lookup_num_tokens": 10**9, "guidance_scale": 10.0, "stop_strings": [1], "watermarking_config": {}},
        {"prefill_chunk_size": -1, "bad_words_ids": 5, "sequence_bias": "x", "max_time": -1, "_from_model_config": 7},
    ],
)
def test_a_generation_config_chooses_no_method_and_no_size(pack_copy: PackCopy, changes: dict[str, Any]) -> None:
    pack = pack_copy("trained")
    plain = continuation(pack)
    change_json(pack, "generation_config.json", **changes)
    assert continuation(pack) == plain


def continuation(pack: Path) -> str:
    with bounded(60):
        model = flashpack.load(pack, memory="smallest", context=32)
        assert (model.generation_config.max_new_tokens or 0) <= 32
        return generate(model, load_tokenizer(TRAINED), [5, 6, 7], 4).text


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token_id": "2"},
        {"eos_token_id": [2, "x"]},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": 1.5},
        {"pad_token_id": 10**30},
        {"temperature": "hot"},
        {"top_k": [1]},
        {"do_sample": {}},
        {"max_new_tokens": 1e3},
    ],
)
def test_a_generation_config_of_the_wrong_types_is_refused(pack_copy: PackCopy, changes: dict[str, Any]) -> None:
    pack = pack_copy("trained")
    change_json(pack, "generation_config.json", **changes)
    assert f"generation_config.json: {next(iter(changes))} is" in refusal(pack)


@pytest.mark.parametrize("changes", [{"typical_p": -1.0}, {"epsilon_cutoff": 2.0}, {"eta_cutoff": -0.5}])
def test_cutoffs_that_there_cannot_be_are_refused(pack_copy: PackCopy, changes: dict[str, Any]) -> None:
    pack = pack_copy("trained")
    change_json(pack, "generation_config.json", do_sample=True, **changes)
    with pytest.raises(FormatError, match=next(iter(changes))):
        generate(flashpack.load(pack, memory="smallest", context=32), load_tokenizer(pack), [5], 2, Sampling(1.0))


@pytest.mark.parametrize(
    ("value", "sampling", "message"),
    [
        (1e308, Sampling(), ""),
        (-1e9, Sampling(), ""),
        (-1e9, Sampling(temperature=1.0), "cannot be computed: .*not numbers"),
    ],
)
def test_a_model_that_computes_nonsense_ends_in_a_result_or_in_one_line(
    pack_copy: PackCopy, value: float, sampling: Sampling, message: str
) -> None:
    pack = pack_copy("trained")
    change_json(pack, "config.json", rms_norm_eps=value)
    model, tokenizer = flashpack.load(pack, memory="smallest", context=32), load_tokenizer(pack)
    if message:
        with pytest.raises(FormatError, match=message):
            generate(model, tokenizer, [5, 6, 7], 4, sampling)
    else:
        assert generate(model, tokenizer, [5, 6, 7], 4, sampling).generated_tokens == 4


def test_the_caller_gets_the_error_of_its_own_callback_back(pack_copy: PackCopy) -> None:
    def gone(text: str) -> None:
        raise BrokenPipeError("nobody reads this")

    pack = pack_copy("trained")
    model, tokenizer = flashpack.load(pack, memory="smallest", context=32), load_tokenizer(pack)
    with pytest.raises(BrokenPipeError, match="nobody"):
        generate(model, tokenizer, [5, 6, 7], 8, on_text=gone)


def test_a_token_that_the_model_does_not_have_is_refused(pack_copy: PackCopy) -> None:
    pack = pack_copy("trained")
    model, tokenizer = flashpack.load(pack, memory="smallest", context=32), load_tokenizer(pack)
    with pytest.raises(FormatError, match="token 4096, but the model has 4096"):
        generate(model, tokenizer, [5, 4096], 4)


def test_buffers_larger_than_the_pack_explains_are_not_made() -> None:
    model = build(read_config(CHECKPOINTS / "qwen3_moe"))
    model.register_buffer("table", torch.empty(10**12, device="meta"), persistent=False)
    with pytest.raises(FormatError, match=r"asks for 4000000000128 bytes of buffers"), bounded():
        _fill_buffers(model, 10**6)


def test_the_converter_refuses_the_same_nonsense(source_copy: Callable[[str], Path], tmp_path: Path) -> None:
    source = source_copy("qwen3_moe")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(UnsupportedError, match="num_hidden_layers is 1e"), bounded():
        flashpack.convert(source, tmp_path / "pack")
