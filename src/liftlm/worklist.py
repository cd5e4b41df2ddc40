"""A list of work that may not fit in memory, done by workers that may die: who does what, how often, and what came of it.

Jobs are taken from an iterator when a worker is free and not before (so a million never wait in memory). A job whose worker
died is given to the next free one; one that failed is tried again after the others, `tries` times in all; then it is told
as failed and the rest goes on. Knows nothing of Ray, models or documents: `Crew` is whoever does the work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from liftlm.errors import (
    DiskFullError,
    HubUnreachableError,
    InterruptedWorkError,
    LibraryBusyError,
    LiftError,
    NotEnoughMemoryError,
    NoWritePermissionError,
    StoreError,
    WriterUnreachableError,
)

# what may be otherwise at the next try, or on another machine
_PASSING = (
    *(DiskFullError, HubUnreachableError, InterruptedWorkError, LibraryBusyError, NotEnoughMemoryError),
    *(NoWritePermissionError, StoreError, WriterUnreachableError),
)
Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """key: what tells it apart. name: for people. payload: what the worker gets, made when it is given out."""

    key: str
    name: str
    payload: Callable[[], Any]


@dataclass(frozen=True)
class Outcome:
    """Of one try. result: what the worker found. again: whether another try may help."""

    result: Any = None
    error: str = ""
    next_step: str = ""
    again: bool = False
    tries: int = 1


@dataclass(frozen=True)
class Event:
    """What a crew tells: a worker is ready for a job, has done one, or died with one (or without)."""

    kind: Literal["ready", "done", "died"]
    worker: int
    outcome: Outcome | None = None
    reason: str = ""


class Worker(Protocol):
    """Does jobs one after another, in a process that holds a model."""

    def describe(self) -> Any:
        """What whoever gives out the jobs must know."""

    def work(self, payload: Any, tell: Tell) -> Outcome:
        """Never raises; `tell` hears how far it is."""


class Crew(Protocol):
    """Workers, by number."""

    def begin(self, worker: int, payload: Any, name: str) -> None: ...

    def wait(self) -> list[Event]:
        """At least one event. Raises ClusterError where no worker is left that could bring one."""


@dataclass
class Tally:
    """How many jobs ended how."""

    done: int = 0
    failed: int = 0
    deaths: int = 0  # of workers
    failures: list[str] = field(default_factory=list)  # sentences, of the first ones


_NAMED = 20  # failures that are kept in words


def outcome_of(error: Exception) -> Outcome:
    """A failure, and whether another try may help. A defect of the program may be one of a machine."""
    if isinstance(error, LiftError):
        return Outcome(error=error.message, next_step=error.next_step, again=isinstance(error, _PASSING))
    return Outcome(error=f"{type(error).__name__}: {error}", again=True)


def work_off(
    crew: Crew,
    jobs: Iterable[Job],
    tries: int,
    on_end: Callable[[Job, Outcome], None] = lambda job, outcome: None,
    on_event: Callable[[Event, Tally], None] = lambda event, tally: None,
) -> Tally:
    """Has all jobs done; on_end hears of each that is done, or failed for good. Raises what the crew raises."""
    queue, tally = _Queue(iter(jobs), tries), Tally()
    free: deque[int] = deque()
    running: dict[int, Job] = {}
    while True:
        while free and (job := queue.next()) is not None:
            worker = free.popleft()
            running[worker] = job
            crew.begin(worker, job.payload(), job.name)
        if not running and queue.empty():
            return tally
        for event in crew.wait():
            finished = running.pop(event.worker, None)
            if event.kind != "died":
                free.append(event.worker)
            else:
                tally.deaths += 1
            if finished is not None:
                outcome = event.outcome or Outcome(error=f"Its worker died ({event.reason}).", again=True)
                outcome = queue.judge(finished, outcome, worker_died=event.kind == "died")
                if not outcome.again:
                    _count(tally, finished, outcome)
                    on_end(finished, outcome)
            on_event(event, tally)


def _count(tally: Tally, job: Job, outcome: Outcome) -> None:
    if not outcome.error:
        tally.done += 1
        return
    tally.failed += 1
    if len(tally.failures) < _NAMED:
        tried = f" ({outcome.tries} tries)" if outcome.tries > 1 else ""
        tally.failures.append(f"{job.name}{tried}: {outcome.error} {outcome.next_step}".strip())


class _Queue:
    """Jobs to come, and those that came back."""

    def __init__(self, jobs: Iterator[Job], tries: int) -> None:
        self._jobs, self._tries = jobs, tries
        self._first: deque[Job] = deque()  # whose worker died: a checkpoint is there
        self._last: deque[Job] = deque()
        self._tried: dict[str, int] = {}  # only of jobs that came back
        self._ahead: Job | None = None

    def next(self) -> Job | None:
        if self._first:
            return self._first.popleft()
        if self._ahead is None:
            self._ahead = next(self._jobs, None)
        job, self._ahead = self._ahead, None
        return job or (self._last.popleft() if self._last else None)

    def empty(self) -> bool:
        if self._ahead is None:
            self._ahead = next(self._jobs, None)
        return not (self._first or self._last or self._ahead)

    def judge(self, job: Job, outcome: Outcome, *, worker_died: bool) -> Outcome:
        """The outcome with `again` off where it is final; otherwise the job is queued again."""
        tries = self._tried.pop(job.key, 0) + 1
        outcome = replace(outcome, tries=tries)
        if not outcome.error or not outcome.again or tries >= self._tries:
            return replace(outcome, again=False)
        self._tried[job.key] = tries
        # a second death may be its own doing, and must not keep the others waiting
        (self._first if worker_died and tries == 1 else self._last).append(job)
        return outcome


class CrewOfOne:
    """The worker is this process: `lift absorb FOLDER` without a cluster."""

    def __init__(self, worker: Worker, tell: Tell = lambda row: None) -> None:
        self._worker, self._tell = worker, tell
        self._events: list[Event] = [Event("ready", 0)]

    def describe(self) -> Any:
        return self._worker.describe()

    def begin(self, worker: int, payload: Any, name: str) -> None:
        outcome = self._worker.work(payload, lambda row: self._tell({"worker": 0, "name": name} | row))
        self._events.append(Event("done", 0, outcome))

    def wait(self) -> list[Event]:
        events, self._events = self._events, []
        return events
