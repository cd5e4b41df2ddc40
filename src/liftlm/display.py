"""What the terminal shows while work goes on. Everything goes to standard error; standard output is for answers.

On a terminal: a live bar. Elsewhere (a log file, CI): a line every few seconds. Imports no torch.
"""

from __future__ import annotations

import functools
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.progress import Progress

    from liftlm.training import StepMetrics
    from liftlm.worklist import Event, Tally

_LINE_SECONDS = 10.0
_NAME_CHARACTERS = 40
_MOST_WORKERS = 16


class _StandardError:
    """rich's console, which is loaded when there is something to show."""

    quiet = False  # nothing is shown

    @functools.cached_property
    def rich(self) -> Console:
        from rich.console import Console

        return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

    @property
    def is_terminal(self) -> bool:
        return not self.quiet and self.rich.is_terminal and not self.rich.is_dumb_terminal

    def print(self, shown: Any, *, style: str | None = None, markup: bool = True, end: str = "\n") -> None:
        if not self.quiet:
            self.rich.print(shown, style=style, markup=markup, end=end)


console = _StandardError()


def note(text: str) -> None:
    """One line for the user's information."""
    console.print(text, style="dim", markup=False)


def minutes(seconds: float) -> str:
    """75 → 1:15."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class TrainingDisplay:
    """Shows steps as they end; pass the object itself as `on_step`.

    below: what stands under the bar on a terminal, asked for whenever it is drawn; it is gone at the end.
    """

    def __init__(self, what: str, below: Callable[[], RenderableType] | None = None) -> None:
        self._below = below
        # a title may be longer than the terminal is wide
        self._what = what if len(what) <= _NAME_CHARACTERS else what[: _NAME_CHARACTERS - 1].rstrip() + "…"
        self._shown_at = 0.0
        self._progress: Progress | None = None
        self._live = console.is_terminal

    def __enter__(self) -> TrainingDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, metrics: StepMetrics) -> None:
        told = "" if metrics.drift is None else f" · drift {metrics.drift:.3f}"
        facts = (
            f"epoch {metrics.epoch} · loss {metrics.loss:.3f} · {metrics.tokens_per_second:.0f} tokens/s"
            f"{told} · {metrics.memory_bytes / 1e9:.1f} GB · {minutes(metrics.seconds_left)} left"
        )
        if not self._live:
            now = time.monotonic()
            if now - self._shown_at >= _LINE_SECONDS or metrics.step == metrics.steps:
                self._shown_at = now
                note(f"{self._what}: step {metrics.step}/{metrics.steps} · {facts}")
            return
        progress = self._started()
        if not progress.task_ids:
            progress.add_task(self._what, total=metrics.steps, facts="")
        progress.update(progress.task_ids[0], completed=metrics.step, total=metrics.steps, facts=facts)

    def draw(self) -> None:
        """Draws anew on a terminal, as what stands below the bar has changed."""
        if self._live:
            self._started().refresh()

    def _started(self) -> Progress:
        if self._progress is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            below = self._below

            class Shown(Progress):
                def get_renderables(self) -> Iterable[RenderableType]:
                    yield from super().get_renderables()
                    if below is not None:
                        yield below()

            columns = (
                TextColumn("{task.description}", markup=False),  # a title may hold [brackets]
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}", markup=False),
            )
            self._progress = Shown(
                *columns, console=console.rich, transient=below is not None, refresh_per_second=2 if below else 10
            )
            self._progress.start()
        return self._progress


class CrewDisplay:
    """Shows what many workers do at once: one line each on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, Any]] = {}
        self._counts = "starting"
        self._shown_at = time.monotonic()
        self._live: Live | None = None
        if console.is_terminal:
            from rich.live import Live

            self._live = Live(console=console.rich, auto_refresh=False, transient=True)

    def __enter__(self) -> CrewDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, row: dict[str, Any]) -> None:
        """How far a worker is: worker, name, and step, steps, loss, left where it trains."""
        self._rows[row["worker"]] = row
        self._show()

    def event(self, event: Event, tally: Tally) -> None:
        """A worker got free, or died."""
        self._rows.pop(event.worker, None)
        if event.kind == "died":
            note(f"Worker {event.worker} died ({event.reason}); its document is given to another.")
        lost = f" · {tally.deaths} workers lost" if tally.deaths else ""
        self._counts = f"{tally.done} done · {tally.failed} failed{lost}"
        self._show()

    def _show(self) -> None:
        if self._live is not None:
            from rich.text import Text

            lines = [self._counts, *(_worker_line(row) for _, row in sorted(self._rows.items())[:_MOST_WORKERS])]
            self._live.update(Text("\n".join(lines), style="dim", overflow="ellipsis", no_wrap=True), refresh=True)
        elif time.monotonic() - self._shown_at >= _LINE_SECONDS:
            self._shown_at = time.monotonic()
            busy = "; ".join(_worker_line(row) for _, row in sorted(self._rows.items())[:4])
            note(f"{self._counts} · {len(self._rows)} working{': ' + busy if busy else ''}")


def _worker_line(row: dict[str, Any]) -> str:
    name = str(row["name"])[-_NAME_CHARACTERS:]
    if "step" not in row:
        return f"{row['worker']}: {name}"
    return (
        f"{row['worker']}: {name} · {row['step']}/{row['steps']} · loss {row['loss']:.3f} · {minutes(row['left'])} left"
    )
