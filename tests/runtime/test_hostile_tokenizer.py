"""Tokenizer files and chat templates of a stranger's pack: bounded in time and memory, never code."""

from __future__ import annotations

import base64
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from flashpack.errors import FormatError
from flashpack.runtime import template
from flashpack.runtime.messages import encode_prompt
from flashpack.runtime.tokenizer import MAX_GROWTH, encode, load_tokenizer
from tests.conftest import TRAINED
from tests.strangers import bounded, change_json, rewrite

PackCopy = Callable[..., Path]

MESSAGES = [{"role": "user", "content": "hello"}]


def replace(old: str, new: str, times: int = 1) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": old}, "content": new}
    return {"type": "Sequence", "normalizers": [step] * times}


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[1]", b"\xff", b"{}", b'{"model": {"type": "BPE"}}', b'{"version": "1.0", "version": "1.0"}'],
)
def test_garbage_in_place_of_a_tokenizer_is_one_line(pack_copy: PackCopy, data: bytes) -> None:
    pack = pack_copy("trained")
    rewrite(pack, "tokenizer.json", data)
    with pytest.raises(FormatError, match="tokenizer") as caught, bounded():
        load_tokenizer(pack)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model"])
@pytest.mark.parametrize("value", [5, "x", {"type": "Sequence"}, [[]], {"type": "BPE", "vocab": {"a": 10**30}}])
def test_a_wrong_part_of_a_tokenizer_is_one_line(pack_copy: PackCopy, field: str, value: Any) -> None:
    pack = pack_copy("trained")
    change_json(pack, "tokenizer.json", **{field: value})
    with pytest.raises(FormatError, match="cannot load the pack's tokenizer") as caught, bounded():
        load_tokenizer(pack)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": replace("a", "aa", 40)},
        {"normalizer": replace("a", "a" * 2000)},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "b" * 2000}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 40}},
        {
            "normalizer": {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(bytes(4) + b"x" * 5000).decode(),
            }
        },
        {"decoder": {"type": "Sequence", "decoders": replace("a", "aa", 40)["normalizers"]}},
        {"decoder": {"type": "Sequence", "decoders": [{"type": "BPEDecoder", "suffix": ""}] * 40}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2000,
                "pair": [],
                "special_tokens": {},
            }
        },
    ],
)
def test_steps_that_double_a_text_again_and_again_are_refused(pack_copy: PackCopy, changes: dict[str, Any]) -> None:
    pack = pack_copy("trained")
    change_json(pack, "tokenizer.json", **changes)
    with pytest.raises(FormatError, match=f"more than {MAX_GROWTH} times longer"), bounded():
        load_tokenizer(pack)


def test_steps_of_real_tokenizers_are_not_refused(pack_copy: PackCopy) -> None:
    pack = pack_copy("trained")
    sentencepiece = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
        *replace("``", '"')["normalizers"],
        *replace(" ", "▁", 3)["normalizers"],
        {"type": "NFKC"},
    ]
    change_json(pack, "tokenizer.json", normalizer={"type": "Sequence", "normalizers": sentencepiece})
    assert encode(load_tokenizer(pack), "a b", special=False)


def test_padding_that_a_file_asks_for_is_not_done(pack_copy: PackCopy) -> None:
    pack = pack_copy("trained")
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": 10**12}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    change_json(pack, "tokenizer.json", padding=padding)
    plain = PreTrainedTokenizerFast(tokenizer_file=str(pack / "tokenizer.json"))  # the pack's class has its own
    with bounded():
        for tokenizer in (load_tokenizer(pack), plain):
            assert len(encode(tokenizer, "hello", special=True)) < 10


def test_an_expression_that_backtracks_for_ever_fails_soon(
    pack_copy: PackCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = pack_copy("trained")
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    change_json(pack, "tokenizer.json", pre_tokenizer=split)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(pack / "tokenizer.json"))  # the pack's class has its own
    monkeypatch.setenv("RUST_BACKTRACE", "0")
    with pytest.raises(FormatError, match="the pack's tokenizer fails: PanicException"), bounded():
        encode(tokenizer, "a" * 60 + "b", special=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": 5},
        {"tokenizer_class": "../../x"},
        {"fast_tokenizer_files": ["../../../etc/passwd"]},
        {"tokenizer_file": "/etc/passwd", "vocab_file": "/etc/passwd"},
        {"added_tokens_decoder": {"x": 1}},
        {"added_tokens_decoder": {str(10**30): {"content": "x"}}},
        {"model_max_length": -1, "padding_side": 7},
        {"init_inputs": [1, 2, 3]},
        {"backend": "no such backend"},
        {"extra_special_tokens": {"a": {"b": 1}}},
        {"eos_token": {"content": 5}},
        {"chat_template": 5},
        {"name_or_path": "stranger/repo", "gguf_file": "x.gguf"},
    ],
)
def test_odd_fields_of_a_tokenizer_load_or_are_one_line(pack_copy: PackCopy, changes: dict[str, Any]) -> None:
    pack = pack_copy("trained")
    plain = encode(load_tokenizer(pack), "hello", special=False)
    change_json(pack, "tokenizer_config.json", **changes)
    with bounded():
        try:
            found = encode(load_tokenizer(pack), "hello", special=False)
        except FormatError as e:
            found, plain = [], [] if "\n" not in str(e) else [1]
    assert found == plain


def test_a_template_renders_as_in_transformers() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TRAINED, local_files_only=True)
    text = str(tokenizer.chat_template)
    for content in ("hello", "line\nline \x1b[31m \U0001f600 é\u202e", ""):
        messages = [{"role": "system", "content": "be kind", "name": None}, {"role": "user", "content": content}]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert template.render(text, messages, **tokenizer.special_tokens_map) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}", "more than 5 s"),
        ("{% for a in range(90000) %}{{ 'abcdefgh' * 100 }}{% endfor %}", "too long"),
        ("{{ 9 ** (9 ** 9) }}", "more than 5 s"),
        pytest.param("{{ 'a' * 10**11 }}", "MemoryError", marks=pytest.mark.skipif(sys.platform != "linux", reason="")),
        pytest.param("{{ 'a'.ljust(10**11) }}", "Memory", marks=pytest.mark.skipif(sys.platform != "linux", reason="")),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
        ("{{ ('{0.__class__.__mro__}').format('') }}", "SecurityError"),
        ("{% for m in messages %}{% set _ = m.update({'role': 'x'}) %}{% endfor %}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{{", "TemplateSyntaxError"),
        ("{{ raise_exception('two\nlines') }}", "TemplateError: two"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
    ],
)
def test_a_template_that_does_harm_ends_in_one_line_and_the_next_one_renders(text: str, message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(FormatError, match=message) as caught:
        template.render(text, MESSAGES)
    assert "\n" not in str(caught.value)
    assert "--raw" in str(caught.value)
    assert time.monotonic() - begun < 60  # of a shared machine; it is 5 s of processor time
    assert template.render("{{ messages[0].content }}", MESSAGES) == "hello"


def test_the_process_that_renders_may_neither_write_nor_start_processes() -> None:
    """What a template would find that broke out of the sandbox, which is what the limits are for."""
    template.render("", MESSAGES)
    child = template._child
    assert child is not None
    if sys.platform == "linux":
        limits = Path(f"/proc/{child.pid}/limits").read_text()
        for name in ("Max file size", "Max processes", "Max core file size"):
            assert re.search(rf"^{name} +0 +0 ", limits, re.MULTILINE), name
        assert not re.search(r"^Max address space +unlimited", limits, re.MULTILINE)
        arguments = Path(f"/proc/{child.pid}/cmdline").read_bytes().split(b"\0")
        assert b"-P" in arguments  # the current folder may be a stranger's pack


def test_modules_in_the_current_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jinja2", "json", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", ".", *sys.path])
    template._stop()
    assert template.render("{{ messages[0].content }}", MESSAGES) == "hello"
    assert not (tmp_path / "ran").exists()


def test_a_renderer_that_cannot_start_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    template._stop()
    with pytest.raises(FormatError, match=r"python -m flashpack\.runtime\.template"):
        template.render("", MESSAGES)


@pytest.mark.parametrize("templates", [5, ["x"], {"other": "x"}, [{"name": "a"}], {"default": 5}])
def test_chat_templates_of_the_wrong_type_are_one_line(pack_copy: PackCopy, templates: Any) -> None:
    pack = pack_copy("trained")
    rewrite(pack, "chat_template.jinja", b"")
    (pack / "chat_template.jinja").unlink()
    change_json(pack, "tokenizer_config.json", chat_template=templates)
    with pytest.raises(FormatError) as caught, bounded():
        encode_prompt(load_tokenizer(pack), "hello")
    assert "\n" not in str(caught.value)


def test_a_template_may_not_make_the_tokenizer_fail_with_half_a_character(pack_copy: PackCopy) -> None:
    pack = pack_copy("trained")
    rewrite(pack, "chat_template.jinja", rb"{{ '\ud800' }}")
    with pytest.raises(FormatError, match="the pack's tokenizer fails"):
        encode_prompt(load_tokenizer(pack), "hello")
