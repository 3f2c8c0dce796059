"""What a model's experts are given on some text, written to a calibration file for the converter.

The text goes through the model in windows, a few per pass; each pass streams the experts once. A pack of S bytes of
experts thus reads about S for every ``score.AT_ONCE`` windows of ``WINDOW`` tokens, and the file has
2 * hidden + 8 * top_k bytes per token and layer: for 131,072 tokens of a model with 60 layers of width 4,096, 65 GB.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashpack.errors import FormatError, UsageError
from flashpack.formats import Pack
from flashpack.formats.calibration import CalibrationWriter
from flashpack.formats.checksums import hexdigest
from flashpack.formats.dtypes import from_float32
from flashpack.runtime import template
from flashpack.runtime.experts import RoutedExperts
from flashpack.runtime.predict import load_for, one_thread
from flashpack.runtime.tokenizer import encode, load_tokenizer
from flashpack.skeleton import library_errors

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"--text {path}: cannot be read: {e}") from e
    if path.suffix != ".jsonl":
        return content
    pieces = []
    for number, line in enumerate(content.splitlines(), 1):
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
    watch = _Watch(model)
    with one_thread(), library_errors("the model cannot be computed"), watch.watching():
        _run(model, windows[:1, :2])  # one token alone may take another way
        shapes = {layer: (x.shape[1], experts.shape[1]) for layer, (x, experts, _) in watch.seen.items()}
        architecture = type(model).__name__
        with CalibrationWriter(out, architecture, shapes, windows.numel(), about) as writer:
            first = 0
            for begun in range(0, len(windows), at_once):
                ids = windows[begun : begun + at_once]
                watch.clear()
                _run(model, ids)
                for layer, (x, experts, weights) in watch.seen.items():
                    if not np.isfinite(x).all():
                        raise FormatError(f"{pack}: layer {layer}: the model computes values that are not numbers")
                    squares = watch.squares.get(layer, np.zeros((len(x), 1), dtype=np.float32))
                    bits = from_float32(x, "BF16").view(np.uint16)
                    writer.write(layer, first, bits, experts, weights, squares)
                first += ids.numel()
                advance(ids.numel())
            return writer.finish()


def _run(model: Any, ids: Tensor) -> None:
    """The decoder alone: nothing is asked of the head."""
    model.get_decoder()(input_ids=ids.to(model.device), use_cache=False)


class _Watch:
    """Takes note of what experts are given and of the residual stream, pass by pass.

    ``seen``: layer -> inputs float32 [tokens, hidden], experts int32 and weights float32 [tokens, top_k];
    ``squares``: layer -> each token's mean square behind the layer, float32 [tokens, 1], where there is such a thing.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._experts: dict[str, Any] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(getattr(module, "flashpack", None), RoutedExperts)
        }
        self.seen: dict[int, tuple[Any, Any, Any]] = {}
        self.squares: dict[int, Any] = {}

    def clear(self) -> None:
        """Forget the last pass."""
        self.seen.clear()
        self.squares.clear()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts."""
        hooks, own = [], {name: module.flashpack for name, module in self._experts.items()}
        try:
            for name, module in self._experts.items():
                layer = own[name].layer
                module.flashpack = self._noting(layer, own[name])
                # The layer is what the path's last number belongs to: model.layers.3 of model.layers.3.mlp.experts.
                match = re.match(r"(.*\.\d+)\.", name)
                if match:
                    parent = self._model.get_submodule(match[1])
                    hooks.append(parent.register_forward_hook(self._measuring(layer)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, module in self._experts.items():
                module.flashpack = own[name]

    def _noting(self, layer: int, routed: Any) -> Any:
        def note(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            arrays = (x.float(), index.int(), weights.float())
            self.seen[layer] = tuple(a.cpu().contiguous().numpy().copy() for a in arrays)  # type: ignore[assignment]
            output: Tensor = routed(x, index, weights)
            return output

        return note

    def _measuring(self, layer: int) -> Any:
        def measure(module: nn.Module, args: Any, output: Any) -> None:
            stream = output[0] if isinstance(output, tuple) else output
            wide = stream.detach().float().cpu().numpy().reshape(-1, stream.shape[-1])
            self.squares[layer] = np.square(wide, dtype=np.float64).mean(axis=1, keepdims=True).astype(np.float32)

        return measure
