"""Moments inside long work at which its thread may do something else for a while.

What computes long says `pause()` now and then. Whoever has such work done says with `pausing` what happens there; nothing does
where nobody has. Knows nothing of what is computed, nor of what is done meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator


class _Here(threading.local):
    """This thread's."""

    do: Callable[[], None] | None = None
    paused = 0.0  # seconds spent in pauses


_here = _Here()


def pause() -> None:
    """A moment at which the work may be left for a while, or, by an exception, for good."""
    do = _here.do
    if do is None:
        return
    _here.do = None  # what is done in a pause is not interrupted in turn
    began = time.monotonic()
    try:
        do()
    finally:
        _here.paused += time.monotonic() - began
        _here.do = do


@contextlib.contextmanager
def pausing(do: Callable[[], None] | None) -> Iterator[None]:
    """Within the block `do` is called at every pause of this thread, or nothing. It must leave everything as it finds it."""
    before, _here.do = _here.do, do
    try:
        yield
    finally:
        _here.do = before


def working_seconds() -> float:
    """A clock of this thread that stands still in pauses."""
    return time.monotonic() - _here.paused
