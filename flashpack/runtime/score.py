"""How far a model's predictions are from a reference's, on a text.

The KL divergence of a token is the sum over the vocabulary of p (log p - log q), where p are the reference's
probabilities of the next token and q the judged model's; natural logarithm, so nats. Logits and log-softmax are
float32, sums float64. Its mean over tokens is what llama.cpp's ``llama-perplexity --kl-divergence`` calls mean KLD, but
that takes the second half of each window only; here every token counts, the first ones too.

One model after the other is in memory: the reference's log-probabilities wait in a temporary file.
"""

from __future__ import annotations

import gc
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from flashpack.errors import FormatError, OutputError, UsageError
from flashpack.formats import Pack
from flashpack.formats.files import output_errors
from flashpack.runtime.predict import inference, load_for, log_probabilities, text_of
from flashpack.runtime.tokenizer import encode, load_tokenizer
from flashpack.skeleton import read_config

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("all", "even", "odd")

_SPARE = 16 * 2**20
"""Bytes of the disk that are left alone."""

Begin = Callable[[str, int], object]
"""What is done next, and in how many steps."""


@dataclass(frozen=True)
class Divergence:
    """Of a model from a reference. ``kld``: mean over tokens in nats; ``error``: its standard error over windows, None
    if there is only one; ``p99``: the 99th percentile over tokens; ``top1``: share of tokens where both find the same
    one likeliest. Perplexity is of the tokens after the first of each window."""

    windows: int
    length: int
    kld: float
    error: float | None
    p99: float
    top1: float
    perplexity: float
    reference_perplexity: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Perplexity:
    """Of a model on its own; of the tokens after the first of each window."""

    windows: int
    length: int
    perplexity: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_windows(pack: Path, text: Path, count: int, length: int, part: str = "all") -> Tensor:
    """The first ``count`` pieces of ``length`` tokens of a text file, one after the other, as int64 [windows, length].

    ``part``: "even" or "odd" takes every second of them. Raises ``UsageError`` if the text is shorter than that needs.
    """
    import torch

    if part not in PARTS:
        raise UsageError(f"--part {part}: choose from {', '.join(PARTS)}")
    if length < 2:
        raise UsageError(f"--length {length}: 2 tokens or more")
    opened = Pack(pack)
    limit = getattr(read_config(opened.folder).get_text_config(decoder=True), "max_position_embeddings", None)
    if type(limit) is int and length > limit:
        raise UsageError(f"--length {length}: the model has {limit} positions")
    ids = encode(load_tokenizer(opened.folder), text_of("--text", text), special=False)
    whole = min(count, len(ids) // length)
    first = 1 if part == "odd" else 0
    if whole <= first:
        raise UsageError(f"--text {text}: {len(ids)} tokens, and {(first + 1) * length} are needed")
    found = torch.tensor(ids[: whole * length]).view(whole, length)
    return found if part == "all" else found[first::2]


def perplexity(
    pack: Path,
    windows: Tensor,
    memory: int | str | None = None,
    experts_per_token: int | None = None,
    prefer_cached: float | None = None,
    plain: bool = False,
    begin: Begin | None = None,
    advance: Callable[[int], object] | None = None,
) -> Perplexity:
    """Of ``pack`` on ``windows``, without a reference; see ``divergence`` for the arguments."""
    import torch

    begin, advance = begin or (lambda text, total: None), advance or (lambda count: None)
    options = {"memory": memory, "reference": plain, "experts_per_token": experts_per_token}
    single = experts_per_token is not None or prefer_cached is not None
    following = windows.roll(-1).flatten()
    losses = torch.empty(windows.numel(), dtype=torch.float64)
    begin("reading", windows.numel())
    model = load_for(pack, windows, options | {"prefer_cached": prefer_cached}, single)
    done = 0
    with inference():
        for found in log_probabilities(*model, windows, single):
            these = slice(done, done + len(found))
            losses[these] = -found.gather(1, following[these, None])[:, 0]
            done += len(found)
            advance(len(found))
    if not losses.isfinite().all():
        raise FormatError(f"{pack}: gives logits that are not numbers")
    count, length = windows.shape
    return Perplexity(count, length, float(losses.view(count, length)[:, :-1].mean().exp()))


def divergence(
    pack: Path,
    reference: Path,
    windows: Tensor,
    scratch: Path | None = None,
    memory: int | str | None = None,
    experts_per_token: int | None = None,
    prefer_cached: float | None = None,
    plain: bool = False,
    begin: Begin | None = None,
    advance: Callable[[int], object] | None = None,
) -> Divergence:
    """How far ``pack`` is from the pack ``reference`` on ``windows``, which ``read_windows`` gives.

    Neither memory nor threads change the result. ``experts_per_token`` and ``prefer_cached`` are those of ``load``, of
    ``pack`` alone; with one of them both models take one token per step, as in decoding. ``plain``: both are computed
    by torch and transformers alone, so that only the weights differ, not the kernels' rounding. ``scratch``: folder of
    the temporary file (4 bytes for each token and entry of the vocabulary). ``begin`` is called with each model's name
    and the number of its tokens, ``advance`` with tokens as they are done.

    Raises ``UsageError`` if the two have not the same vocabulary, ``OutputError`` if the disk is too small.
    """
    import torch

    begin, advance = begin or (lambda text, total: None), advance or (lambda count: None)
    rows, entries = windows.numel(), _same_vocabulary(pack, reference)
    common: dict[str, Any] = {"memory": memory, "reference": plain}
    options = common | {"experts_per_token": experts_per_token, "prefer_cached": prefer_cached}
    single = experts_per_token is not None or prefer_cached is not None
    kld, own, theirs = (torch.empty(rows, dtype=torch.float64) for _ in range(3))
    same = torch.empty(rows, dtype=torch.bool)
    following = windows.roll(-1).flatten()
    folder = scratch or Path(tempfile.gettempdir())
    with _temporary(folder, 4 * rows * entries) as file:
        for judged in (False, True):
            begin("judged model" if judged else "reference", rows)
            model = load_for(*((pack, windows, options) if judged else (reference, windows, common)), single)
            done = 0
            with inference():
                for found in log_probabilities(*model, windows, single):
                    these = slice(done, done + len(found))
                    losses = -found.gather(1, following[these, None])[:, 0]
                    if judged:
                        expected = torch.frombuffer(bytearray(file.read(found.nbytes)), dtype=found.dtype)
                        expected = expected.view_as(found)
                        kld[these] = (expected.exp() * (expected - found)).sum(-1, dtype=torch.float64)
                        same[these] = expected.argmax(-1) == found.argmax(-1)
                        own[these] = losses
                    else:
                        with output_errors(folder):
                            file.write(found.numpy().tobytes())
                        theirs[these] = losses
                    done += len(found)
                    advance(len(found))
            file.seek(0)
            del model
            gc.collect()  # its memory is needed for the next one
    if not kld.isfinite().all():
        raise FormatError(f"{pack} or {reference}: gives logits that are not numbers")
    return _summary(*(values.view(windows.shape) for values in (kld, same, own, theirs)))


def _summary(kld: Tensor, same: Tensor, own: Tensor, theirs: Tensor) -> Divergence:
    """All [windows, length]; ``own`` and ``theirs`` are losses, of no meaning at the end of a window."""
    count, length = kld.shape
    means = kld.mean(1)
    return Divergence(
        windows=count,
        length=length,
        kld=float(means.mean()),
        error=float(means.std()) / math.sqrt(count) if count > 1 else None,
        p99=float(kld.flatten().quantile(0.99)),
        top1=float(same.double().mean()),
        perplexity=float(own[:, :-1].mean().exp()),
        reference_perplexity=float(theirs[:, :-1].mean().exp()),
    )


def _same_vocabulary(pack: Path, reference: Path) -> int:
    """The number of logits of both; ``UsageError`` if tokens of one mean others to the other."""
    sizes, tokens = [], []
    for folder in (pack, reference):
        sizes.append(read_config(Pack(folder).folder).get_text_config(decoder=True).vocab_size)
        tokens.append(load_tokenizer(folder).get_vocab())
    if sizes[0] != sizes[1] or tokens[0] != tokens[1]:
        raise UsageError(f"{pack} and {reference} have different vocabularies: they cannot be compared")
    return int(sizes[0])


def _temporary(folder: Path, size: int) -> IO[bytes]:
    """A file of ``size`` bytes to come, which is gone when it is closed, or the process ends."""
    with output_errors(folder):
        free = shutil.disk_usage(folder).free
        if size + _SPARE > free:
            raise OutputError(
                f"{folder}: {size / 1e9:.2f} GB needed for the reference's probabilities, {free / 1e9:.2f} GB free; "
                f"take fewer --windows or another --scratch"
            )
        return tempfile.TemporaryFile(dir=folder)
