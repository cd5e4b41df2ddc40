"""Tasks that arrive while the caller does something else: an asyncio program in a thread of its own, read as an iterator.

Knows nothing of what the program does; it emits lists of tasks and may raise, and what it raises is raised where they are read.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any

from liftlm.tasks.task import Task

Emit = Callable[[list[Task]], Awaitable[None]]
_CLOSING = 5.0  # seconds; longer takes only a look-up of a name, which cannot be stopped


class TaskStream(Iterator[list[Task]]):
    """Lists of tasks as they are emitted. Work starts at once; `close` (also by `with`, or when it is forgotten) stops it.

    At most `ahead` lists wait to be read; then `emit` waits. One thread reads.
    """

    def __init__(self, work: Callable[[Emit], Coroutine[Any, Any, None]], ahead: int) -> None:
        self._channel = _Channel(ahead)
        self.finished = False  # nothing more will come
        # the thread knows the channel only, so that a stream nobody holds any more is collected, and closed
        self._thread = threading.Thread(target=self._channel.run, args=(work,), name="tasks", daemon=True)
        self._thread.start()

    def __next__(self) -> list[Task]:
        tasks = self.poll(None)
        if tasks is None:
            raise StopIteration
        return tasks

    def poll(self, seconds: float | None = 0.0) -> list[Task] | None:
        """The next list, waiting for it so long at most (None: without limit). None where there is none, or `finished`."""
        if self.finished:
            return None
        try:
            item = self._channel.ready.get(block=seconds != 0, timeout=seconds or None)
        except queue.Empty:
            return None
        if isinstance(item, list):
            self._channel.taken()
            return item
        self.finished = True
        self._thread.join(_CLOSING)
        if item is not None:
            raise item
        return None

    def close(self) -> None:
        """Stops the work cleanly; what has not been read is gone."""
        self.finished = True
        self._channel.cancel()
        self._thread.join(_CLOSING)

    def __enter__(self) -> TaskStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self._channel.cancel()


class _Channel:
    """What the two threads share."""

    def __init__(self, ahead: int) -> None:
        self.ready: queue.SimpleQueue[list[Task] | BaseException | None] = queue.SimpleQueue()
        self._room = asyncio.Semaphore(ahead)
        # around the three below: the loop may be about to start, or to end; re-entrant, as a collector may call `cancel` anywhere
        self._lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._cancelled = False
        self._main: asyncio.Task[None] | None = None

    def run(self, work: Callable[[Emit], Coroutine[Any, Any, None]]) -> None:
        """The thread: the last item it puts is None, or the error that ended the work."""
        last: BaseException | None = None
        try:
            asyncio.run(self._run(work))
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            last = error
        self.ready.put(last)

    async def _run(self, work: Callable[[Emit], Coroutine[Any, Any, None]]) -> None:
        with self._lock:
            if self._cancelled:
                return
            self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        try:
            await work(self._emit)
        finally:
            with self._lock:
                self._loop = None

    async def _emit(self, tasks: list[Task]) -> None:
        await self._room.acquire()
        self.ready.put(tasks)

    def taken(self) -> None:
        """Called by the reader: there is room for one more."""
        self._call(self._room.release)

    def cancel(self) -> None:
        """Called by the reader: stop."""
        with self._lock:
            self._cancelled = True
            if self._main is not None:
                self._call(self._main.cancel)

    def _call(self, function: Callable[[], Any]) -> None:
        with self._lock, contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function)
