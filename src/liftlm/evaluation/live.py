"""What the terminal shows while predictions come in: running means by method. Knows nothing of who predicts."""

from __future__ import annotations

import math
import statistics
import threading
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from liftlm.evaluation.benchmark import Benchmark
from liftlm.evaluation.figures import format_number, format_value, label
from liftlm.evaluation.scoring import Row, choice_scores, question_of, rank

if TYPE_CHECKING:
    from rich.table import Table as RichTable


class LiveScores:
    """Running means by method: `add` each row as it is predicted, and show the object itself or its `table`."""

    def __init__(self, benchmark: Benchmark, total: int | None = None) -> None:
        self._benchmark, self._total = benchmark, total
        self._metrics = (*benchmark.metrics[:2], "accuracy_normalized", "answer_nll")
        self._values: dict[str, dict[str, list[float]]] = {}
        self._failed: Counter[str] = Counter()
        self._made: RichTable | None = None
        self._lock = threading.Lock()  # a terminal is drawn by a thread of its own
        self.rows = 0  # so far

    def add(self, row: Row) -> None:
        found: dict[str, object] = {}
        if not row.get("error"):
            found |= self._benchmark.score(question_of({"kind": "", **row}), row["answer"]) | choice_scores(row)
            found |= {"answer_nll": row.get("answer_nll"), "seconds": row.get("seconds"), "n": 1}
        with self._lock:
            self.rows += 1
            self._made = None
            values = self._values.setdefault(row["method"], {})
            self._failed[row["method"]] += bool(row.get("error"))
            for name, value in found.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    values.setdefault(name, []).append(value)

    def table(self) -> RichTable:
        """What is known so far."""
        with self._lock:
            if self._made is None:  # a terminal draws it again and again
                self._made = self._table()
            return self._made

    def _table(self) -> RichTable:
        import rich.box
        import rich.table
        from rich.text import Text

        shown = [name for name in self._metrics if any(name in values for values in self._values.values())]
        table = rich.table.Table(box=rich.box.SIMPLE)
        table.add_column(Text("method"), min_width=max((len(method) for method in self._values), default=0))
        for name in [*map(label, shown), "n", "failed", "seconds a question"]:
            table.add_column(Text(name), justify="right", no_wrap=name == "n")
        for method in sorted(self._values, key=rank):
            values = self._values[method]
            means = {name: statistics.fmean(numbers) for name, numbers in values.items()}
            done = str(len(values.get("n", ()))) + ("" if self._total is None else f" of {self._total}")
            cells = [format_value(name, means.get(name)) for name in shown]
            facts = [done, str(self._failed[method]), format_number(means.get("seconds"), 2)]
            table.add_row(*(Text(cell) for cell in (method, *cells, *facts)))
        return table

    def __rich__(self) -> RichTable:
        return self.table()


def live_table(rows: Iterable[Row], benchmark: Benchmark, total: int | None = None) -> RichTable:
    """Running means by method of the rows so far; total: questions a method. `LiveScores` does the same row by row."""
    live = LiveScores(benchmark, total)
    for row in rows:
        live.add(row)
    return live.table()
