"""One thread that owns the session: requests wait in a bounded queue, and are answered one after the other."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import getrandbits
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from flashpack.runtime.generate import Result
from flashpack.runtime.messages import Message, chat_template, encode_chat
from flashpack.runtime.responses import Event, Response
from flashpack.runtime.sampling import Logprobs, Sampling, TokenLogprob
from flashpack.runtime.session import Session
from flashpack.runtime.tokenizer import encode
from flashpack.server.constraints import Constraint, Grammars, Processor
from flashpack.server.live import Live
from flashpack.server.metrics import Metrics
from flashpack.server.problems import ApiError, failed, refused

log = logging.getLogger("flashpack.serve")


@dataclass(frozen=True)
class Task:
    """What is to be generated: the next message of ``messages``, or the continuation of ``prompt``.

    ``logprobs``: alternatives per token, None for no log-probabilities. ``constraint``: what the answer must be.
    """

    kind: str
    messages: Sequence[Message] = ()
    prompt: str | list[int] | None = None
    tools: Sequence[dict[str, Any]] = ()
    thinking: bool | None = None
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seeded: bool = False
    stop: Sequence[str] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Piece:
    """Some of the answer, and the log-probabilities of the tokens that have come since the last piece."""

    event: Event
    logprobs: list[TokenLogprob]


@dataclass(frozen=True)
class Started:
    """The prompt is sound and is read now."""


@dataclass(frozen=True)
class Done:
    """The whole answer; ``response`` is None for a continuation. ``logprobs``: those no piece carried. ``stop``: the
    text that ended it."""

    result: Result
    response: Response | None
    logprobs: list[TokenLogprob]
    stop: str | None


Item = Started | Piece | Done | ApiError


class Job:
    """A task on its way; its items come in ``items``, of the event loop that made the job. The last one is ``Done`` or
    an ``ApiError``."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.items: asyncio.Queue[Item] = asyncio.Queue()
        self.cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()

    def put(self, item: Item) -> None:
        """From any thread."""
        try:
            self._loop.call_soon_threadsafe(self.items.put_nowait, item)
        except RuntimeError:  # the loop is closed: the server ended without waiting
            self.cancelled.set()


class Worker:
    """Answers jobs of ``session`` one at a time; at most ``most`` wait."""

    def __init__(self, session: Session, live: Live, metrics: Metrics, most: int) -> None:
        self._session, self._live, self._metrics, self._most = session, live, metrics, most
        self.grammars = Grammars(session)
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._ending = False
        self._seconds = 1.0  # a generation takes, about
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()
        metrics.watch(self.waiting, self.busy)

    def busy(self) -> bool:
        """Whether a job is answered now."""
        return self._running is not None

    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Put a job into the queue; ``ApiError`` 429 if it is full, 503 if the server is going down."""
        with self._changed:
            if self._ending:
                raise ApiError(503, "the server is going down")
            if len(self._waiting) + self.busy() > self._most:
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests wait already; try again later",
                    code="queue_full",
                    retry=min(60, max(1, round(self._seconds))),
                )
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody wants it any more; it gives its place in the queue back at once."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self) -> None:
        """Cancel everything; may be called more than once, and from a signal handler."""
        self._ending = True
        for job in [*self._waiting, *([self._running] if self._running else [])]:
            job.cancelled.set()

    def join(self) -> None:
        """After ``stop``: until the thread has ended."""
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        torch.set_num_threads(self._threads)  # as the thread that loaded the model
        while True:
            with self._changed:
                self._running = None
                while not self._waiting and not self._ending:
                    self._changed.wait(0.5)  # a signal handler cannot notify
                if not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
            begun = time.monotonic()
            if job.cancelled.is_set():
                job.put(ApiError(503, "the server is going down"))
                continue
            last: Item
            try:
                last = self._answer(job)
            except ApiError as e:
                last = e
            except Exception as e:
                log.exception("a generation failed")
                last = failed(e)
            self._running = None  # before the client knows, for it may ask again at once
            job.put(last)
            self._seconds += 0.3 * (time.monotonic() - begun - self._seconds)

    def _answer(self, job: Job) -> Done:
        task, session = job.task, self._session
        try:
            ids, branch, response, constraint = self._prepare(task)
        except Exception as e:
            raise refused(e) from e
        job.put(Started())
        logprobs = None if task.logprobs is None else Logprobs(task.logprobs)
        sent = 0

        def fresh() -> list[TokenLogprob]:
            nonlocal sent
            entries = logprobs.entries[sent:] if logprobs else []
            sent += len(entries)
            return entries

        def on_text(text: str) -> None:
            for event in response.feed(text) if response else [Event("content", text)]:
                job.put(Piece(event, fresh()))

        self._live.begin(task.kind, len(ids))
        result = None
        try:
            result = session.complete(
                ids, on_text, task.max_tokens, self._sampling(task), branch, task.stop,
                _Counted(self._live, constraint), logprobs, job.cancelled.is_set,
            )  # fmt: skip
        finally:
            self._live.end(result)
        self._metrics.add(result)
        if result.finish == "cancelled":
            raise ApiError(503, "the server is going down")  # if it is still there for anybody
        if constraint and constraint.error:
            raise ApiError(400, f"the grammar of the answer cannot be followed: {constraint.error}", "response_format")
        for event in response.finish() if response else ():
            job.put(Piece(event, fresh()))
        left = fresh()
        if result.finish == "stop" and left and left[-1].token in self.grammars.stops:
            del left[-1]
        return Done(result, response, left, self._stop(result, task.stop))

    def _stop(self, result: Result, texts: Sequence[str]) -> str | None:
        """Which of ``texts`` ended the answer."""
        if result.finish != "stop" or not texts or result.tokens[-1] in self.grammars.stops:
            return None
        rest = str(self._session.tokenizer.decode(result.tokens))[len(result.text) :]
        return next((text for text in texts if rest.startswith(text)), None)

    def _prepare(self, task: Task) -> tuple[list[int], int | None, Response | None, Processor | None]:
        session = self._session
        if task.prompt is not None:
            made = task.constraint and self.grammars.processor(task.constraint, "")
            given = task.prompt
            ids = given if isinstance(given, list) else encode(session.tokenizer, given, special=True)
            self._fits(ids)
            embeddings: Any = session.model.get_input_embeddings()
            if max(ids) >= embeddings.num_embeddings:
                raise ApiError(400, f"token {max(ids)}: the model has {embeddings.num_embeddings}", "prompt")
            return ids, None, None, made or None
        prompt = encode_chat(session.tokenizer, task.messages, task.tools, task.thinking)
        self._fits(prompt.ids)
        made = task.constraint and self.grammars.processor(task.constraint, prompt.opening)
        response = Response(chat_template(session.tokenizer), prompt.opening, task.tools)
        return prompt.ids, prompt.branch, response, made or None

    def _fits(self, ids: list[int]) -> None:
        context = self._session.runtime.context
        if len(ids) >= context:
            raise ApiError(
                400, f"the prompt has {len(ids)} tokens, the context {context}", None, "context_length_exceeded"
            )
        if not ids:
            raise ApiError(400, "the prompt is empty")

    def _sampling(self, task: Task) -> Sampling:
        return task.sampling if task.seeded else replace(task.sampling, seed=getrandbits(63))


class _Counted(LogitsProcessor):
    """Tells ``live`` of each token as it is chosen, and applies ``inner``."""

    def __init__(self, live: Live, inner: Processor | None) -> None:
        self._live, self._inner = live, inner

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._live.token()
        return scores if self._inner is None else self._inner(input_ids, scores)
