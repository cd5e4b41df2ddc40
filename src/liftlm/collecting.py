"""Python's garbage collector, kept away from the loading of libraries.

torch and transformers make a million objects that stay; looking through them again and again took a third of a command's start.
Only the command line does this: a program that uses liftlm as a library has its collector for itself.
"""

from __future__ import annotations

import gc

_usual: tuple[int, int, int] | None = None


def collect_rarely() -> None:
    """From now on, until `collect_as_usual`."""
    global _usual
    _usual = _usual or gc.get_threshold()
    gc.set_threshold(100_000, 10, 10)


def collect_as_usual() -> None:
    """What is there by now is left alone for good. Nothing happens where `collect_rarely` was not called."""
    global _usual
    if _usual is not None:
        gc.freeze()
        gc.set_threshold(*_usual)
        _usual = None
