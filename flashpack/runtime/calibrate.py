"""What a model's experts are given on some text, written to a calibration file for the converter.

The text goes through the model in windows, a few per pass; each pass streams the experts once, and one layer's inputs
are held at a time. A pack of S bytes of experts thus reads about S for every ``predict.AT_ONCE`` windows of ``WINDOW``
tokens. The file has 2 * hidden + 8 * top_k + 4 bytes per token and layer: for 131,072 tokens of a model with 60 layers
of width 4,096 and 10 experts per token, 65 GB.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashpack.errors import FormatError, UsageError
from flashpack.formats import Pack
from flashpack.formats.calibration import CalibrationWriter
from flashpack.formats.checksums import hexdigest
from flashpack.formats.dtypes import from_float32
from flashpack.runtime import template
from flashpack.runtime.experts import RoutedExperts
from flashpack.runtime.predict import inference, json_lines, load_for, text_of
from flashpack.runtime.tokenizer import encode, load_tokenizer
from flashpack.skeleton import library_errors

if TYPE_CHECKING:
    from torch import Tensor, nn

Found = dict[str, NDArray[Any]]
"""Arrays of some tokens, by the names of ``formats.calibration.PARTS``."""

WINDOW = 512
"""Tokens of a window; each begins anew."""


def read_text(pack: Path, texts: list[Path], tokens: int) -> Tensor:
    """Windows of about ``tokens`` tokens, evenly spaced in each text and the same share of each: int64 [n, WINDOW].

    Plain text is taken as it is; lines of a .jsonl file are {"text": ...} or {"messages": [...]}, which the chat
    template makes into text. Raises ``UsageError`` if a text is shorter than a window.
    """
    import torch

    tokenizer = load_tokenizer(Pack(pack).folder)
    rows = []
    for path in texts:
        ids = encode(tokenizer, _content(path, tokenizer), special=False)
        there = len(ids) // WINDOW
        count = min(there, max(1, round(tokens / WINDOW / len(texts))))
        if not count:
            raise UsageError(f"--text {path}: {len(ids)} tokens, and {WINDOW} are needed")
        starts = [i * there // count * WINDOW for i in range(count)]
        rows += [ids[start : start + WINDOW] for start in starts]
    return torch.tensor(rows)


def _content(path: Path, tokenizer: Any) -> str:
    content = text_of("--text", path)
    if path.suffix != ".jsonl":
        return content
    pieces = []
    for number, line in json_lines(content):
        try:
            row = json.loads(line)
            if "messages" in row:
                chosen = tokenizer.get_chat_template()
                variables = tokenizer.special_tokens_map | {"add_generation_prompt": False}
                pieces.append(template.render(chosen, row["messages"], **variables))
            else:
                pieces.append(str(row["text"]))
        except (ValueError, KeyError, TypeError) as e:
            raise UsageError(f'--text {path}: line {number} is not {{"text": ...}} or {{"messages": [...]}}') from e
    return "".join(pieces)


def calibrate(
    pack: Path,
    texts: list[Path],
    out: Path,
    tokens: int = 131_072,
    memory: int | str | None = None,
    begin: Callable[[int], object] | None = None,
    advance: Callable[[int], object] | None = None,
) -> str:
    """Run ``pack`` over ``texts`` (``read_text``) and write the calibration file ``out``; returns its digest.

    Neither memory nor threads change the file. ``begin`` is called with the number of tokens, ``advance`` with tokens
    as they are done. Raises ``UsageError``, ``OutputError``, ``FormatError`` and what ``load`` raises.
    """
    begin, advance = begin or (lambda total: None), advance or (lambda count: None)
    windows = read_text(pack, texts, tokens)
    about = {
        "pack": Pack(pack).identity,
        "texts": json.dumps([hexdigest(path.read_bytes()) for path in texts]),
    }
    begin(windows.numel())
    model, at_once = load_for(pack, windows, {"memory": memory}, single=False)
    with inference(), library_errors("the model cannot be computed"):
        widths: dict[int, tuple[int, int]] = {}
        with _watching(model, lambda layer, found: _note_widths(widths, layer, found)):
            _run(model, windows[:1, :2])  # one token alone may take another way
        with CalibrationWriter(out, type(model).__name__, widths, windows.numel(), about) as writer:
            for begun in range(0, len(windows), at_once):
                ids = windows[begun : begun + at_once]
                with _watching(model, partial(writer.write, begun * WINDOW)):
                    _run(model, ids)
                advance(ids.numel())
            return writer.finish()


def _note_widths(widths: dict[int, tuple[int, int]], layer: int, found: Found) -> None:
    if "inputs" in found:
        widths[layer] = found["inputs"].shape[1], found["experts"].shape[1]


def _run(model: Any, ids: Tensor) -> None:
    """The decoder alone: nothing is asked of the head."""
    model.get_decoder()(input_ids=ids.to(model.device), use_cache=False)


@contextmanager
def _watching(model: Any, take: Callable[[int, Found], object]) -> Iterator[None]:
    """While this lasts, ``take`` gets each layer's number and what its experts are given, as a calibration file has it;
    then, where the layer itself can be found, ``residual``. Nothing is kept."""
    experts: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "flashpack", None), RoutedExperts)
    }
    own = {name: module.flashpack for name, module in experts.items()}
    hooks = []
    try:
        for name, module in experts.items():
            module.flashpack = _noting(own[name], take)
            # The layer is what the path's last number belongs to: model.layers.3 of model.layers.3.mlp.experts.
            match = re.match(r"(.*\.\d+)\.", name)
            if match:
                parent = model.get_submodule(match[1])
                hooks.append(parent.register_forward_hook(_measuring(own[name].layer, take)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, module in experts.items():
            module.flashpack = own[name]


def _noting(routed: RoutedExperts, take: Callable[[int, Found], object]) -> Callable[..., Tensor]:
    def note(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        inputs = x.float().cpu().contiguous().numpy()
        if not np.isfinite(inputs).all():
            raise FormatError(f"layer {routed.layer}: the model computes values that are not numbers")
        found = {"experts": index.int().cpu().numpy(), "weights": weights.float().cpu().numpy()}
        take(routed.layer, {"inputs": from_float32(inputs, "BF16")} | found)
        return routed(x, index, weights)

    return note


def _measuring(layer: int, take: Callable[[int, Found], object]) -> Any:
    def measure(module: nn.Module, args: Any, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        wide = stream.detach().float().cpu().numpy().reshape(-1, stream.shape[-1])
        squares = np.square(wide, dtype=np.float64).mean(axis=1, keepdims=True)
        take(layer, {"residual": squares.astype(np.float32)})

    return measure
