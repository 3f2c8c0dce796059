"""How fast a pack decodes and reads prompts within a memory budget, in a process of its own."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from flashpack.errors import FlashpackError, MemoryBudgetError, UsageError
from flashpack.formats import Pack
from flashpack.performance.replay import Replay, bursts_like
from flashpack.runtime.cache import Key
from flashpack.runtime.profile import Profile, profile_of
from flashpack.runtime.tokenizer import encode, load_tokenizer

P = ParamSpec("P")
R = TypeVar("R")

SPLIT_TOKENS = 16
"""Tokens for which the time is split; those are slower, and not among the others."""


@dataclass(frozen=True)
class Setting:
    """What is measured. ``memory``: bytes of the process. ``ids``: the text. A prompt of ``prompt`` tokens, after one
    that is not counted; then ``tokens`` decoded, after as many as ``warm``. ``split``: whether to say where time went.
    """

    pack: Path
    memory: int
    ids: list[int] = field(repr=False)
    prompt: int
    tokens: int
    warm: int
    context: int | None = None
    threads: int | None = None
    device: str | None = None
    profile: Profile | None = None
    split: bool = True


@dataclass(frozen=True)
class Run:
    """What was measured. Seconds are of the whole prompt, and of a decoded token (mean).

    ``share``: of the experts' bytes that the arena holds. ``drive``: what the drive alone needs for as many reads
    (``replay``), 0 if there were none. ``parts``: ``timing.Split.to_json``. ``peak``: bytes of the process,
    anonymous and mapped.
    """

    budget: dict[str, int]
    share: float
    io: str
    why: str
    kernels: str
    decoding: str
    prompt_seconds: float
    seconds: float
    waited: float
    hit_rate: float
    layer_hit_rates: dict[int, float]
    read_bytes: float
    drive: float
    parts: dict[str, Any] | None
    peak: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def apart(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """``work`` done in a new process, whose memory is its own; the history of hot experts is neither used nor written.

    Raises what ``work`` raises; ``MemoryBudgetError`` if the system ended the process.
    """
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, work, args, kwargs))
    # Whoever waits for the answer hears of Ctrl-C, and kills; from its first moment on the process does not.
    resource_tracker.ensure_running()  # in start() it would unblock
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    there.close()
    try:
        answer = here.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            raise MemoryBudgetError(
                "measuring was killed, as the system does for memory; close other programs or give less --memory"
            ) from None
        raise RuntimeError(f"measuring ended with exit code {process.exitcode}") from None
    finally:
        process.kill()  # where the answer was not waited for
        process.join()
        here.close()
    if isinstance(answer, FlashpackError):
        raise answer
    result: R = answer
    return result


def _answer(there: Connection, work: Callable[..., Any], args: Any, kwargs: Any) -> None:
    os.environ["FLASHPACK_WARM"] = "0"
    try:
        there.send(work(*args, **kwargs))
    except FlashpackError as e:
        there.send(e)


def measure(setting: Setting) -> Run:
    """Measure in this process; see ``apart``. Raises the errors of ``flashpack.load``."""
    import torch

    from flashpack.performance.feed import Feed
    from flashpack.runtime import load
    from flashpack.runtime.memory import usage
    from flashpack.runtime.timing import Timing

    profile = setting.profile or profile_of(Pack(setting.pack))
    if threads := setting.threads or profile.threads:
        torch.set_num_threads(threads)
    model: Any = load(
        setting.pack, device=setting.device, memory=setting.memory, context=setting.context, profile=profile
    )
    runtime = model.flashpack
    stats = runtime.store.stats
    feed = Feed(model, setting.ids)
    feed(setting.prompt)
    feed.restart()
    prompt_seconds = feed(setting.prompt)
    peak = usage()
    anonymous, mapped = peak.anonymous, peak.file
    for _ in range(setting.warm):
        feed(1)
    begun, times, reads = stats.copied(), [], []
    before = begun
    for _ in range(setting.tokens):
        times.append(feed(1))
        now = stats.copied()
        token = now.since(before).layers
        reads.append({layer: one.reads for layer, one in token.items()})
        before, peak = now, usage()
        anonymous, mapped = max(anonymous, peak.anonymous), max(mapped, peak.file)
    found = stats.since(begun)
    total = found.total()
    timing, parts = None, None
    if setting.split:
        timing = Timing(model)
        feed(1)
        timing.start()
        parts = timing.split(SPLIT_TOKENS, sum(feed(1) for _ in range(SPLIT_TOKENS))).to_json()
    pack, budget = runtime.pack, runtime.budget
    kernels, decoding = runtime.kernels, runtime.decoding
    del model, runtime, feed
    timing = None
    gc.collect()
    bursts = bursts_like(pack, reads)
    return Run(
        budget=budget.to_json(),
        share=budget.arena / pack.expert_bytes,
        io=stats.io,
        why=stats.why,
        kernels=kernels,
        decoding=decoding,
        prompt_seconds=prompt_seconds,
        seconds=sum(times) / len(times),
        waited=total.wait_seconds / len(times),
        hit_rate=found.hit_rate,
        layer_hit_rates={i: one.hits / max(1, one.hits + one.misses) for i, one in found.layers.items()},
        read_bytes=total.bytes_read / len(times),
        drive=_replayed(pack, stats.io == "direct", profile.readers, bursts) / len(times),
        parts=parts,
        peak=(anonymous, mapped),
    )


def _replayed(pack: Pack, direct: bool, readers: int, bursts: list[list[Key]]) -> float:
    if not bursts:
        return 0.0
    replay = Replay(pack, direct, readers)
    try:
        return sum(replay.run(bursts))
    finally:
        replay.close()


def length(prompt: int, tokens: int, warm: int, split: bool = True) -> int:
    """Tokens of context that a measurement needs."""
    return prompt + warm + tokens + (1 + SPLIT_TOKENS if split else 0)


def check_context(pack: Pack, needed: int, context: int | None) -> None:
    """Raises ``UsageError`` if a measurement needs more tokens of context than ``context`` (None: the default)."""
    from flashpack.runtime.load import context_length
    from flashpack.skeleton import read_config

    config = read_config(pack.folder, pack.manifest.model["architecture"])
    room = context_length(config.get_text_config(decoder=True), context)
    if room < needed:
        raise UsageError(
            f"--context {room}: measuring needs {needed} tokens; take fewer --tokens, or more context where the model "
            f"has it"
        )


def tokens_for(pack: Pack, text: str, needed: int, note: Callable[[str], object]) -> list[int]:
    """The token ids of ``text``. Raises ``UsageError`` if it has none.

    ``note`` is told if they are fewer than the ``needed`` ones: they are fed again from the start then.
    """
    ids = encode(load_tokenizer(pack.folder), text, special=False)
    if not ids:
        raise UsageError("the text has no tokens; --text takes another")
    if len(ids) < needed:
        note(
            f"note: the text has {len(ids)} tokens of the {needed} that are measured; it is repeated, and its experts "
            f"are found in memory more often than those of a longer text"
        )
    return ids
