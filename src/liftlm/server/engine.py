"""The one thread that owns the model: it answers questions, and absorbs documents between them.

    1. questions and jobs are queued by any thread (`ask`, `absorb`, `call`)
    2. the thread answers as long as somebody asks, many at once (`answers`)
    3. when there is a job, it absorbs; between two layers of the network, forwards and backwards, and after every step, it
       answers for a while (`_meanwhile`)

So a question waits for a piece of a training step at most, and training goes on however many ask. HTTP, users and the
database are not known here: who is to hear of a job is told by `JobWatch`.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from liftlm.absorbing import Adapter
from liftlm.adapters import use_adapter
from liftlm.config import LiftConfig
from liftlm.documents import Document
from liftlm.errors import EntryNotFoundError, InterruptedWorkError, NotReadyError, ServerBusyError
from liftlm.library import Library
from liftlm.models import Model
from liftlm.pauses import pause, pausing
from liftlm.server.answers import Answers, Asked
from liftlm.server.interruptions import Aside, pause_at_layers
from liftlm.server.metrics import Metrics
from liftlm.server.opened import OpenedEntries
from liftlm.training import StepMetrics

T = TypeVar("T")
_STOPPING = "The server is stopping."
_PIECE_SECONDS = (
    0.05  # of training, before it is interrupted in the middle of a step: switching takes some milliseconds
)


class CancelledJob(Exception):
    """Raised inside training to leave it."""


class JobWatch(Protocol):
    """Hears of a job, on the engine's thread."""

    def started(self, entry_id: str) -> bool:
        """Whether it is still wanted."""

    def step(self, entry_id: str, metrics: StepMetrics) -> bool:
        """Whether it is still wanted."""

    def ready(self, entry_id: str, adapter: Adapter) -> None: ...

    def failed(self, entry_id: str, error: BaseException) -> None: ...

    def cancelled(self, entry_id: str) -> None: ...


@dataclass(eq=False)
class Job:
    """A document to absorb."""

    entry_id: str
    document: Document
    config: LiftConfig
    priority: int = 0
    cancelled: bool = False
    step_ended: bool = False  # just now


@dataclass
class _Queues:
    """What other threads bring."""

    asked: list[Asked] = field(default_factory=list)
    jobs: list[tuple[int, int, Job]] = field(default_factory=list)
    calls: deque[Callable[[], None]] = field(default_factory=deque)


class Engine:
    """load: makes the model, on the engine's thread. Nothing is answered before it has."""

    def __init__(
        self, load: Callable[[], Model], library: Library, config: LiftConfig, metrics: Metrics, watch: JobWatch
    ) -> None:
        self._load, self.library, self.config, self._metrics, self._watch = load, library, config, metrics, watch
        self._queues, self._changed = _Queues(), threading.Condition()
        self._order = itertools.count()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="liftlm-engine", daemon=True)
        self._job: Job | None = None
        self._looked = 0.0  # when absorbing last gave way to questions, or could have
        self._counted = {"adapter": (0, 0), "prefix": (0, 0)}
        self.model: Model | None = None
        self.failure: BaseException | None = None  # of loading the model
        self.loaded = threading.Event()

    # --- for any thread -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends all work at its next safe point: answers fail, training is saved."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def ready(self) -> bool:
        return self.model is not None and not self._stopping and self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def ask(self, asked: list[Asked]) -> None:
        """Queues texts to be continued, all or none. Raises ServerBusyError, NotReadyError."""
        with self._changed:
            if not self.ready:
                raise NotReadyError("The model is not loaded." if not self._stopping else _STOPPING, "Try again soon.")
            waiting = len(self._queues.asked) + self._answers.waiting
            if waiting + len(asked) > self.config.server.queue_length:
                raise ServerBusyError(
                    f"{waiting} questions are waiting already.",
                    "Try again after the time that Retry-After gives.",
                    retry_after=max(1, round(waiting / self.config.server.batch_rows)),
                )
            self._queues.asked += asked
            self._changed.notify()

    def absorb(self, job: Job) -> None:
        """Queues a document; lower priorities first, then in the order of arrival."""
        with self._changed:
            heapq.heappush(self._queues.jobs, (job.priority, next(self._order), job))
            self._metrics.jobs.set(len(self._queues.jobs))
            self._changed.notify()

    def cancel(self, entry_id: str) -> None:
        """Ends a job at its next step, or before it begins; `JobWatch.cancelled` tells when."""
        with self._changed:
            for *_, job in self._queues.jobs:
                job.cancelled = job.cancelled or job.entry_id == entry_id
            if self._job is not None and self._job.entry_id == entry_id:
                self._job.cancelled = True
            self._changed.notify()

    def call(self, work: Callable[[Model], T]) -> Future[T]:
        """Has something done on the engine's thread, between steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                assert self.model is not None
                future.set_result(work(self.model))
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            if self._stopping or self.failure is not None:
                future.set_exception(NotReadyError(_STOPPING, "Try again soon."))
                return future
            self._queues.calls.append(run)
            self._changed.notify()
        return future

    def forget(self, entry_id: str) -> Future[None]:
        """Takes an entry off the model; questions to it fail."""
        gone = EntryNotFoundError("The document was deleted.", "`GET /v1/documents` lists what is there.")

        def work(model: Model) -> None:
            self._answers.fail(gone, entry_id)
            self._answers.prefixes.forget(entry_id)
            self._opened.forget(entry_id)

        return self.call(work)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            model = self._load()
            server = self.config.server
            self._opened = OpenedEntries(
                model, self.library, server.adapter_megabytes * 2**20, self._in_use, lambda: self._answers.pause()
            )
            self._answers = Answers(model, self._opened, server, self._metrics)
            self.model = model
        except BaseException as error:
            self.failure = error
            return
        finally:
            self.loaded.set()
        try:
            while not self._stopping:
                self._wait()
                self._answer(lambda: self._next_job_waits())
                job = self._take_job()
                if job is not None:
                    self._absorb(job)
        finally:
            self._stopping = True
            self._accept()
            self._answers.fail(NotReadyError(_STOPPING, "Try again soon."))

    def _in_use(self, entry_id: str) -> bool:
        return self._answers.uses(entry_id) or (self._job is not None and self._job.entry_id == entry_id)

    def _wait(self) -> None:
        queues = self._queues
        with self._changed:
            while not (self._stopping or queues.asked or queues.jobs or queues.calls or self._answers.busy):
                self._changed.wait()

    def _next_job_waits(self) -> bool:
        return bool(self._queues.jobs)

    def _take_job(self) -> Job | None:
        with self._changed:
            self._job = heapq.heappop(self._queues.jobs)[2] if self._queues.jobs else None
            self._metrics.jobs.set(len(self._queues.jobs))
            return self._job

    def _answer(self, enough: Callable[[], bool]) -> None:
        """Takes what was brought, and answers until nobody asks or it is enough."""
        assert self.model is not None
        with use_adapter(self.model, None):
            try:
                while not self._stopping:
                    self._accept()
                    if not self._answers.busy:
                        return
                    self._answers.turn()
                    self._show()
                    if enough():
                        return
            finally:
                self._answers.pause()
                self._show()

    def _accept(self) -> None:
        with self._changed:
            calls, self._queues.calls = self._queues.calls, deque()
            for asked in self._queues.asked:
                self._answers.add(asked)
            self._queues.asked = []
        if calls:
            self._answers.pause()
        for work in calls:
            work()

    def _show(self) -> None:
        metrics, answers, opened = self._metrics, self._answers, self._opened
        metrics.queue_length.set(answers.waiting + len(self._queues.asked))
        metrics.running.set(answers.running)
        metrics.adapter_bytes.set(opened.bytes)
        metrics.prefix_bytes.set(answers.prefixes.bytes)
        for name, cache in (("adapter", opened), ("prefix", answers.prefixes)):
            hits, misses = self._counted[name]
            metrics.cache.labels(name, "hit").inc(cache.hits - hits)
            metrics.cache.labels(name, "miss").inc(cache.misses - misses)
            self._counted[name] = (cache.hits, cache.misses)

    # --- absorbing ----------------------------------------------------------------------------------------------------

    def _absorb(self, job: Job) -> None:
        assert self.model is not None
        entry_id = job.entry_id
        try:
            if job.cancelled or not self._watch.started(entry_id):
                raise CancelledJob
            self._looked = time.monotonic()
            aside = Aside(self.model, entry_id)
            with pausing(lambda: self._meanwhile(job, aside)), pause_at_layers(self.model.network):
                adapter, _ = self.library.absorb_once(
                    job.document, self.model, job.config, on_step=lambda metrics: self._after_step(job, metrics)
                )
            self._opened.add(adapter)
            self._watch.ready(entry_id, adapter)
        except CancelledJob:
            self._watch.cancelled(entry_id)
        except InterruptedWorkError:
            if not self._stopping:
                raise
        except Exception as error:
            self._metrics.errors.labels(type(error).__name__).inc()
            self._watch.failed(entry_id, error)
        finally:
            self._job = None
            self._metrics.absorb_speed.set(0)

    def _after_step(self, job: Job, metrics: StepMetrics) -> None:
        self._metrics.step_seconds.observe(metrics.tokens / metrics.tokens_per_second)
        self._metrics.absorb_speed.set(metrics.tokens_per_second)
        self._metrics.absorbed_tokens.inc(metrics.tokens)
        job.cancelled = not self._watch.step(job.entry_id, metrics) or job.cancelled
        job.step_ended = True
        pause()

    def _meanwhile(self, job: Job, aside: Aside) -> None:
        """In a pause of absorbing: questions, where there are any and the last pause was not a moment ago. May end the job."""
        step_ended, job.step_ended = job.step_ended, False
        piece = time.monotonic() - self._looked
        if piece < _PIECE_SECONDS and not step_ended:
            return
        self._metrics.piece_seconds.observe(piece)
        if self._queues.asked or self._queues.calls or self._answers.busy:
            with aside.set_aside():
                self._accept()
                if step_ended:
                    self._answers.trained()
                self._answer_for(piece)
        self._looked = time.monotonic()
        if self._stopping:
            raise InterruptedWorkError(_STOPPING, "The job continues when the server is started again.")
        if job.cancelled:
            raise CancelledJob

    def _answer_for(self, piece: float) -> None:
        """Until nobody asks; or until answering had its share of the time and all who waited have their first token."""
        share = self.config.server.answering_share
        began = time.monotonic()
        end = began + piece * share / (1 - share)
        self._answer(lambda: time.monotonic() >= end and not self._answers.unanswered_since(began))
