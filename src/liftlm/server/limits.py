"""How much a client may send, and how often. Pure ASGI and arithmetic; knows no routes' meaning."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from liftlm.errors import ServerBusyError, TooLargeError

Receive = Callable[[], Awaitable[Any]]
_MOST_OWNERS = 10_000


class Rate:
    """A bucket of `count` tokens for each owner, which fills again in `seconds`."""

    def __init__(self, count: int, seconds: float, what: str) -> None:
        self._count, self._seconds, self._what = count, seconds, what
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # owner → (tokens, when)
        self._lock = threading.Lock()

    def take(self, owner: str) -> None:
        """Raises ServerBusyError where nothing is left."""
        with self._lock:
            now = time.monotonic()
            left, then = self._left.get(owner, (float(self._count), now))
            left = min(float(self._count), left + (now - then) * self._count / self._seconds)
            if left < 1:
                wait = (1 - left) * self._seconds / self._count
                raise ServerBusyError(
                    f"More than {self._count} {self._what}.",
                    "Wait as Retry-After says.",
                    retry_after=max(1, round(wait + 0.5)),
                )
            self._left[owner] = (left - 1, now)
            self._left.move_to_end(owner)
            while len(self._left) > _MOST_OWNERS:
                self._left.popitem(last=False)


class BodyLimit:
    """ASGI middleware: a body over the limit of its path is not read to its end. fail: the answer to such a request."""

    def __init__(self, app: Any, *, limit: Callable[[str], int], fail: Callable[[TooLargeError], Any]) -> None:
        self._app, self._limit, self._fail = app, limit, fail

    async def __call__(self, scope: Any, receive: Receive, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._limit(scope["path"])
        error = TooLargeError(f"The request is larger than {most / 2**20:.3g} MB.", "Send less.")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > most:
            await self._fail(error)(scope, receive, send)
            return
        seen, begun = 0, False

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise _TooMuch
            return message

        async def watched(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, counted, watched)
        except _TooMuch:
            if not begun:
                await self._fail(error)(scope, receive, send)


class _TooMuch(BaseException):
    """Past everything that turns exceptions into other answers."""
