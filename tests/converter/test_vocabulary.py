"""Tokenizers of every kind end as a tokenizer.json in the pack that gives the ids of the original."""

from __future__ import annotations

import base64
import importlib
import io
import itertools
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

import flashpack
from flashpack.converter import plan
from flashpack.converter.folder import LocalFolder
from flashpack.converter.tensor import Extent
from flashpack.converter.vocabulary import made_tokenizer
from flashpack.errors import SourceError, UnsupportedError
from flashpack.runtime.tokenizer import load_tokenizer

SourceCopy = Callable[[str], Path]

# Kimi K2's, as a checkpoint's code writes it.
HAN = r"[\p{Han}]+"
PATTERNS = [
    HAN,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
]
CODE = f"""raise SystemExit("code of a checkpoint was executed")

class TikTokenTokenizer:
    pat_str = "|".join({PATTERNS!r})
"""

TEXTS = [
    "The quick brown fox's tail doesn't jump 1234567 times.",
    "def f(x):\n\treturn  x + 1  # two\n\n\nclass A: pass\r\n",
    "\u6c49\u5b57 mixed\u6f22\u5b57Text \u304b\u306a \u00e9t\u00e9 e\u0301 \ufb01 \U0001f600\U0001f468\u200d\U0001f469",
    "  leading, trailing  ",
]
SPECIAL = "[BOS]user \u6c49[EOS] <|reserved_token_{}|> end"


def trained() -> Tokenizer:
    """A byte-level BPE of 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    return tokenizer


def ranks_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    return {bytes(to_byte[c] for c in token): rank for token, rank in tokenizer.get_vocab().items()}


def tiktoken_ids(text: str, ranks: dict[bytes, int], special: dict[str, int]) -> list[int]:
    """What tiktoken does, written down: split, then merge the pair of lowest rank until there is none."""
    ids = []
    for piece in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
        if piece in special:
            ids.append(special[piece])
            continue
        for word in regex.findall("|".join(PATTERNS), piece, regex.V1):
            parts = [bytes([b]) for b in word.encode()]
            while True:
                pairs = [(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
                if not pairs or min(pairs)[0] == 1 << 30:
                    break
                i = min(pairs)[1]
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            ids += [ranks[part] for part in parts]
    return ids


def write_kimi(folder: Path, code: str = CODE) -> tuple[dict[bytes, int], dict[str, int]]:
    """A tokenizer as Kimi K2 publishes it; returns its ranks and its special tokens."""
    ranks = ranks_of(trained())
    lines = [f"{base64.b64encode(t).decode()} {r}\n" for t, r in sorted(ranks.items(), key=lambda item: item[1])]
    (folder / "tiktoken.model").write_text("".join(lines))
    (folder / "tokenization_kimi.py").write_text(code)
    n = len(ranks)
    named = {"[BOS]": n, "[EOS]": n + 2}
    settings = {
        "added_tokens_decoder": {str(i): {"content": t, "special": True} for t, i in named.items()},
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "tokenizer_class": "TikTokenTokenizer",
        "chat_template": "{{ messages[0].content }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return ranks, named | {f"<|reserved_token_{n + 1}|>": n + 1}


def made(folder: Path) -> dict[str, bytes]:
    source = LocalFolder(folder)
    return made_tokenizer(source, source.files())


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_kimis_tokenizer_is_in_the_pack_without_running_its_code(source_copy: SourceCopy, tmp_path: Path) -> None:
    source, out = source_copy("deepseek_v3"), tmp_path / "out"
    ranks, special = write_kimi(source)
    report = flashpack.convert(source, out)
    assert not [text for text in report.notices if "tokenizer" in text]
    assert (out / "tokenizer.json").is_file()
    assert not (out / "tokenization_kimi.py").exists()
    tokenizer = load_tokenizer(out)
    for text in [*TEXTS, SPECIAL.format(len(ranks) + 1)]:
        ids = ids_of(tokenizer, text)
        assert ids == tiktoken_ids(text, ranks, special)
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(ranks), len(ranks) + 2)
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    from flashpack.converter import against

    assert against(out, source) == []


def broken(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        write_kimi(folder)
        change(folder)

    return damage


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (broken(lambda f: (f / "tokenization_kimi.py").unlink()), UnsupportedError, "has no pat_str literal"),
        (lambda f: write_kimi(f, "pat_str = make()"), UnsupportedError, "has no pat_str literal"),
        (lambda f: write_kimi(f, "pat_str = 'a'\nif x: pat_str = 'b'"), UnsupportedError, "has 2 pat_str literals"),
        (lambda f: write_kimi(f, "def (:"), UnsupportedError, "tokenization_kimi.py: not Python"),
        (lambda f: write_kimi(f, "pat_str = '['"), UnsupportedError, "transformers cannot convert this tokenizer"),
        (broken(lambda f: (f / "tokenizer_config.json").write_text("{}")), UnsupportedError, "added_tokens_decoder"),
        (broken(lambda f: (f / "tiktoken.model").write_text("IQ== x\n")), SourceError, "line 1 is not a token"),
        (broken(lambda f: (f / "tiktoken.model").write_text("IQ== 7\n")), SourceError, "not numbered from 0"),
        (lambda f: (f / "qwen.tiktoken").write_text(""), UnsupportedError, "qwen.tiktoken: a tokenizer of this kind"),
        (lambda f: (f / "merges.txt").write_text(""), UnsupportedError, "vocab.json is missing"),
    ],
)
def test_a_tokenizer_that_cannot_be_converted_is_refused_before_any_tensor_is_read(
    source_copy: SourceCopy,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], object],
    error: type[Exception],
    message: str,
) -> None:
    source = source_copy("deepseek_v3")
    damage(source)
    monkeypatch.setattr(Extent, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(error, match=message) as caught:
        plan(source)
    assert "\n" not in str(caught.value)


def test_code_is_not_referred_to_where_tokenizer_json_is_there(tmp_path: Path) -> None:
    trained().save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "SomeTokenizer", "auto_map": {"AutoTokenizer": ["x.Some", None]}, "eos_token": "a"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    files = made(tmp_path)
    assert set(files) == {"tokenizer_config.json"}
    assert json.loads(files["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "a",
    }
    del settings["auto_map"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert made(tmp_path) == {}


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_vocab_and_merges_become_tokenizer_json(source_copy: SourceCopy, tmp_path: Path, kind: str) -> None:
    source, original = source_copy("qwen3_moe"), trained()
    (source / "tokenizer.json").unlink()
    original.model.save(str(source))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    flashpack.convert(source, tmp_path / "out")
    before, after = load_tokenizer(source), load_tokenizer(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    for text in TEXTS:
        assert ids_of(after, text) == ids_of(before, text)
        form = "NFC" if kind == "Qwen2Tokenizer" else "NFD"
        assert unicodedata.normalize(form, after.decode(ids_of(after, text))) == unicodedata.normalize(form, text)


def write_sentencepiece(folder: Path, **options: Any) -> Any:
    sentencepiece = importlib.import_module("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=model, byte_fallback=True, hard_vocab_limit=False,
        minloglevel=9, **options,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_a_sentencepiece_model_becomes_tokenizer_json(source_copy: SourceCopy, tmp_path: Path) -> None:
    source = source_copy("mixtral")
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    original = write_sentencepiece(source, model_type="bpe", vocab_size=350, **options)
    flashpack.convert(source, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    for text in TEXTS:
        assert ids_of(tokenizer, text) == original.encode(text)


def test_a_sentencepiece_model_that_transformers_would_split_otherwise_is_refused(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, model_type="unigram", vocab_size=330)
    with pytest.raises(UnsupportedError, match=r"tokenizer.model: transformers splits .* than sentencepiece does"):
        made(tmp_path)


def test_sentencepiece_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr("flashpack.converter.vocabulary._installed", lambda module: module != "sentencepiece")
    with pytest.raises(UnsupportedError, match="reading it needs two packages: pip install"):
        made(tmp_path)


def test_a_checkpoint_without_a_tokenizer_is_converted_with_a_notice(source_copy: SourceCopy) -> None:
    source = source_copy("deepseek_v3")
    assert made(source) == {}
    assert [text for text in plan(source).notices if "no tokenizer" in text]
