"""Runs a command line as a process should: exit codes, signals, broken pipes, poor terminals.

Knows nothing of the commands.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from liftlm.collecting import collect_rarely
from liftlm.display import console
from liftlm.errors import InterruptedWorkError, LiftError, NotEnoughMemoryError, TerminatedWorkError

_BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended


def run_process(command: Callable[[list[str]], object]) -> None:
    """Calls `command` (a typer application) with the arguments of this process, less `--debug`, and exits.

    Every expected failure ends in one sentence and its exit code, anything else in "defect" and exit code 1.
    """
    collect_rarely()
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # a terminal that cannot show a character shows "?"
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    console.quiet = not first_process()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    code = _run(command, arguments, debug="--debug" in sys.argv)
    try:
        if sys.stdout is not None:  # it is where the caller closed it
            sys.stdout.flush()
    except BrokenPipeError:
        code = _BROKEN_PIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes again and complains
    sys.exit(code)


def report_error(error: LiftError) -> None:
    """The failure and what to do next, on standard error."""
    console.print(f"Error: {error.message}", style="red", markup=False)
    if error.next_step:
        console.print(f"       {error.next_step}", markup=False)


def first_process() -> bool:
    """Of the processes that `accelerate launch` starts, only the first one answers and prints."""
    return os.environ.get("RANK", "0") == "0"


def as_text(typed: str) -> str:
    """What was typed in another encoding arrives as surrogates, which no tokenizer takes."""
    return typed.encode("utf-8", "replace").decode()


def _run(command: Callable[[list[str]], object], arguments: list[str], *, debug: bool) -> int:
    try:
        command(arguments)
    except SystemExit as ending:
        if isinstance(ending.__context__, BrokenPipeError):
            return _BROKEN_PIPE
        if ending.code == InterruptedWorkError.exit_code:
            report_error(InterruptedWorkError("Interrupted."))
        return int(ending.code or 0)
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = _known(error)
        if known is not None:
            report_error(known)
            return known.exit_code
        console.print(f"Error: {type(error).__name__}: {error}", style="red", markup=False)
        advice = "please report it with the output of the same command with --debug."
        console.print(f"       This is a defect of liftlm; {advice}", markup=False)
        return 1
    return 0


def _known(error: Exception) -> LiftError | None:
    """The expected failure that this is, if it is one."""
    if isinstance(error, LiftError):
        return error
    if isinstance(error, MemoryError) or re.search("(?i)out of memory|can't allocate|not enough memory", str(error)):
        advice = "Close other programs, or lower --window or answering.batch_tokens."
        return NotEnoughMemoryError("The machine ran out of memory.", advice)
    return None


def _terminated(number: int, frame: FrameType | None) -> None:
    error = TerminatedWorkError()
    report_error(error)
    sys.exit(error.exit_code)  # which no `except Exception` on the way stops
