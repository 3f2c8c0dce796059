"""A model on pieces of a text (windows): several per pass, where there is room, or one token per step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashpack.errors import MemoryBudgetError, UsageError
from flashpack.runtime.budget import PROMPT_CHUNK
from flashpack.runtime.load import load
from flashpack.skeleton import library_errors

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

AT_ONCE = 4
"""Windows per pass, where there is memory for them: experts that do not stay in memory are read once for all."""

_LOGITS = 2**21
"""Logits computed at once, about: of a few tokens where the vocabulary is large."""


def text_of(option: str, path: Path) -> str:
    """The text of a file in UTF-8 that ``option`` names. Raises ``UsageError``."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise UsageError(f"{option} {path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UsageError(f"{option} {path}: cannot be read: byte {e.start} is not UTF-8") from e


def json_lines(content: str) -> Iterator[tuple[int, str]]:
    """The lines of a .jsonl file that are not empty, and their numbers. JSON may contain what else ends a line."""
    return ((number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip())


def load_for(pack: Path, windows: Tensor, options: dict[str, Any], single: bool) -> tuple[PreTrainedModel, int]:
    """The model of ``pack`` for windows (int64 [windows, length]), and how many of them it takes at once; results
    are the same for any number. ``options`` are those of ``load``. ``single``: one token per step.
    """
    length = windows.shape[1]
    # The experts see a chunk of a prompt at a time, and in products of many tokens each value is rounded in another way
    # than in those of few: windows go together only where no chunk has tokens of two, so that nothing depends on it.
    # torch's own products promise nothing of the kind.
    alike = length % PROMPT_CHUNK == 0 and not options.get("reference")
    together = alike and not single and options.get("memory") != "smallest"
    most = min(AT_ONCE, len(windows)) if together else 1
    for at_once in sorted({1, most}, reverse=True):
        try:
            model = load(pack, context=length, warm=False, sequences=at_once, **options)
        except MemoryBudgetError:
            if at_once == 1:
                raise
        else:
            return model, at_once
    raise AssertionError


@contextmanager
def inference() -> Iterator[None]:
    """Nothing is kept for gradients, and torch's own operations run on one thread: it cuts them by the number of
    threads, which changes last bits. The kernels have threads of their own."""
    import torch

    from flashpack.kernels.cpu.pool import one_thread

    with torch.inference_mode(), one_thread():
        yield


def log_probabilities(model: Any, at_once: int, windows: Tensor, single: bool) -> Iterator[Tensor]:
    """Of what follows each token of ``windows`` (int64 [windows, length]), in their order: float32
    [tokens, vocabulary] on the CPU, some tokens of one window at a time.

    A pass takes ``at_once`` windows, or one token (``single``), as in decoding.
    """
    with library_errors("the model cannot be computed"):
        ids = windows.to(model.device)
        for logits in _steps(model, ids) if single else _passes(model, at_once, ids):
            yield logits.float().cpu().log_softmax(-1)


def _steps(model: Any, windows: Tensor) -> Iterator[Tensor]:
    for window in windows:
        cache = None
        for token in window:
            answer = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            yield answer.logits[0]


def _passes(model: Any, at_once: int, windows: Tensor) -> Iterator[Tensor]:
    """The decoder takes windows as a whole; the head follows, a few tokens at a time."""
    decoder = model.get_decoder()
    forward = decoder.forward
    rows = max(1, _LOGITS // model.config.get_text_config(decoder=True).vocab_size)
    try:
        for first in range(0, len(windows), at_once):
            ids = windows[first : first + at_once]
            answers: list[Any] = []

            def compute(*args: Any, _answers: list[Any] = answers, **kwargs: Any) -> Any:
                _answers.append(forward(*args, **kwargs))
                return _like(_answers[0], _answers[0].last_hidden_state[:, :1])

            # Through the whole model, since what it does around its head differs by family.
            decoder.forward = compute
            model(input_ids=ids, use_cache=False)
            for window in answers[0].last_hidden_state:
                for start in range(0, len(window), rows):
                    piece = window[None, start : start + rows]
                    decoder.forward = _given(_like(answers[0], piece))
                    yield model(input_ids=ids[:1, :1], use_cache=False).logits[0]
    finally:
        decoder.forward = forward


def _like(answer: Any, hidden: Tensor) -> Any:
    """An answer of the decoder with other hidden states."""
    return type(answer)(last_hidden_state=hidden)


def _given(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer
