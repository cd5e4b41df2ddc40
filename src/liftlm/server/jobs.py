"""What becomes of jobs: written to the store, told to whoever listens. Heard on the engine's thread.

Knows no HTTP; a listener is an asyncio queue of the loop that made it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from liftlm.absorbing import Adapter
from liftlm.errors import LiftError, WriterUnreachableError
from liftlm.server.store import Store
from liftlm.training import StepMetrics

_STORE_SECONDS = 1.0  # between two writes of progress
_MOST_WAITING = 1000  # events that a slow listener may be behind
log = logging.getLogger("liftlm.server")


class Jobs:
    """`engine.JobWatch`. on_cancelled: what is to be cleaned up then."""

    def __init__(self, store: Store, on_cancelled: Callable[[str], None]) -> None:
        self._store, self._on_cancelled = store, on_cancelled
        self._stored_at = 0.0
        self._listeners: dict[str, list[tuple[asyncio.AbstractEventLoop, asyncio.Queue[None]]]] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def listen(self, entry_id: str) -> Iterator[asyncio.Queue[None]]:
        """A queue that gets something whenever the entry changes."""
        place = (asyncio.get_running_loop(), asyncio.Queue[None](_MOST_WAITING))
        with self._lock:
            self._listeners.setdefault(entry_id, []).append(place)
        try:
            yield place[1]
        finally:
            with self._lock:
                self._listeners[entry_id].remove(place)
                if not self._listeners[entry_id]:
                    del self._listeners[entry_id]

    def changed(self, entry_id: str) -> None:
        """Wakes those who listen."""
        with self._lock:
            places = list(self._listeners.get(entry_id, ()))
        for loop, queue in places:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_put, queue)

    def started(self, entry_id: str) -> bool:
        log.info("absorbing %s", entry_id)
        return self._update(entry_id, "absorbing", ("queued", "absorbing"), started=time.time())

    def step(self, entry_id: str, metrics: StepMetrics) -> bool:
        now = time.monotonic()
        if now - self._stored_at < _STORE_SECONDS and metrics.step < metrics.steps:
            return True
        self._stored_at = now
        done = self._update(
            entry_id,
            "absorbing",
            ("absorbing",),
            step=metrics.step,
            steps=metrics.steps,
            loss=metrics.loss,
            speed=metrics.tokens_per_second,
            seconds_left=metrics.seconds_left,
        )
        return done or self._store.state(entry_id) not in ("deleting", None)  # by `lift keys remove`, say

    def ready(self, entry_id: str, adapter: Adapter) -> None:
        report = adapter.report
        log.info("absorbed %s: %d steps, %.0f tokens/s", entry_id, report.steps, report.tokens_per_second)
        self._update(
            entry_id,
            "ready",
            ("queued", "absorbing", "cancelled", "failed"),
            step=report.steps,
            steps=report.steps,
            loss=report.epoch_losses[-1] if report.epoch_losses else None,
            speed=report.tokens_per_second,
            seconds_left=0.0,
            finished=time.time(),
        )
        if self._store.state(entry_id) == "deleting":  # a moment ago, by another process
            self._on_cancelled(entry_id)

    def failed(self, entry_id: str, error: BaseException) -> None:
        # the text of an unexpected error may hold the document's; a LiftError is a sentence for its owner
        log.error("absorbing %s failed: %s", entry_id, type(error).__name__)
        if isinstance(error, WriterUnreachableError):  # whose address is the operator's matter
            log.error("%s", error)
            told = "The server that writes tasks could not do it. What it wrote is kept; uploading again continues."
        elif isinstance(error, LiftError):
            told = str(error)
        else:
            told = f"A defect of the server ({type(error).__name__})."
        self._update(entry_id, "failed", ("queued", "absorbing"), error=told, finished=time.time())

    def cancelled(self, entry_id: str) -> None:
        log.info("cancelled %s", entry_id)
        done = self._update(entry_id, "cancelled", ("absorbing", "cancelled"), finished=time.time())
        if done or self._store.state(entry_id) == "deleting":  # else it is wanted again
            self._on_cancelled(entry_id)

    def _update(self, entry_id: str, state: str, only: tuple[str, ...], **columns: Any) -> bool:
        done = self._store.update(entry_id, state, only, **columns)
        self.changed(entry_id)
        return done


def _put(queue: asyncio.Queue[None]) -> None:
    with contextlib.suppress(asyncio.QueueFull):
        queue.put_nowait(None)
