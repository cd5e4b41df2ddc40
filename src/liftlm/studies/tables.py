"""Rows → tables of figures: one line a group, one column a metric, and the same as rows of figures.csv."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from liftlm.evaluation.blocks import Table
from liftlm.studies.intervals import Figure, Outcome, Row, difference, figure, groups, quotient

LABELS = {
    "likelihood": "log-likelihood of the answer, nats a token",
    "token_f1": "token F1, %",
    "coordinate_score": "coordinate score, %",
    "order_margin": "margin of the right choice, nats",
    "accuracy": "accuracy by likelihood, %",
    "accuracy_generated": "accuracy of answers, %",
    "recalled": "needles recalled, %",
    "seconds": "seconds an answer",
    "absorb_seconds": "seconds to absorb",
    "training_tokens": "tokens trained on",
}
QUALITY = ("likelihood", "token_f1", "coordinate_score", "order_margin", "accuracy", "accuracy_generated", "recalled")
_PERCENT = frozenset({"token_f1", "coordinate_score", "accuracy", "accuracy_generated", "recalled"})
ORDERS = ("order in the text", "timeline reorder", "timeline")  # kinds of questions about order


def label(metric: str) -> str:
    return LABELS.get(metric, metric.replace("_", " "))


def shown(metric: str, found: Figure, sign: bool = False) -> str:
    """In the units of `label`."""
    return found.shown(1, 100, sign) if metric in _PERCENT else found.shown(2, 1, sign)


def present(rows: Sequence[Row], metrics: Sequence[str] = QUALITY) -> list[str]:
    """Those that any row has."""
    return [metric for metric in metrics if any(isinstance(row.get(metric), int | float) for row in rows)]


def tabulate(
    rows: Sequence[Row], by: Sequence[str], metrics: Sequence[str] | None = None
) -> tuple[Table, list[dict[str, Any]]]:
    """A line for each combination of the columns `by` that occurs."""
    metrics = present(rows) if metrics is None else metrics
    keys = list(dict.fromkeys(tuple(row.get(name) for name in by) for row in rows))
    lines, figures = [], []
    for key in sorted(keys, key=str):
        chosen = [row for row in rows if tuple(row.get(name) for name in by) == key]
        found = {metric: figure(chosen, metric) for metric in metrics}
        most = max((each.units for each in found.values()), default=0)
        lines.append([*map(_name, key), str(most), *(shown(metric, each) for metric, each in found.items())])
        figures += [
            dict(zip(by, map(_name, key), strict=True)) | {"metric": metric} | each.row()
            for metric, each in found.items()
            if each.units
        ]
    return Table([*by, "n", *map(label, metrics)], lines), figures


def contrasts(
    rows: Sequence[Row],
    pairs: Mapping[str, tuple[Callable[[Row], bool], Callable[[Row], bool]]],
    metrics: Sequence[str] | None = None,
) -> tuple[Table, list[dict[str, Any]]]:
    """Paired differences, a line each: name → (first, second), first − second."""
    metrics = present(rows) if metrics is None else metrics
    lines, figures = [], []
    for name, (first, second) in pairs.items():
        found = {metric: difference(rows, metric, first, second) for metric in metrics}
        most = max((each.units for each in found.values()), default=0)
        lines.append([name, str(most), *(shown(metric, each, sign=True) for metric, each in found.items())])
        figures += [{"contrast": name, "metric": metric} | each.row() for metric, each in found.items() if each.units]
    return Table(["difference", "n", *map(label, metrics)], lines), figures


def reading_kept(rows: Sequence[Row], arms: Sequence[Any]) -> tuple[Table, list[dict[str, Any]]]:
    """A line for each arm: token F1 with the evidence in the window, with the adapter / without ("lift+oracle" / "oracle")."""
    bare = where(method="oracle")
    kept = {arm: quotient(rows, "token_f1", where(arm=arm, method="lift+oracle"), bare) for arm in arms}
    lines = [[_name(arm), each.shown(2), str(each.units)] for arm, each in kept.items()]
    figures = [{"arm": arm, "metric": "reading_kept"} | each.row() for arm, each in kept.items() if each.units]
    return Table(["arm", "reading kept", "n"], lines), figures


def where(**wanted: Any) -> Callable[[Row], bool]:
    """Rows whose columns have these values; a tuple stands for any of its values."""

    def select(row: Row) -> bool:
        return all(
            row.get(name) in value if isinstance(value, tuple) else row.get(name) == value
            for name, value in wanted.items()
        )

    return select


def telling(rows: Sequence[Row], order: bool = False) -> str:
    """The metric that a verdict rests on: likelihoods move long before answers do in a small model."""
    return "order_margin" if order and present(rows, ["order_margin"]) else "likelihood"


def in_words(outcome: Outcome, found: Figure, metric: str) -> str:
    """ "+0.12 [0.05, 0.20] nats …: confirmed"."""
    return f"{shown(metric, found, sign=True)} {label(metric)} (n = {found.units}): {outcome}"


def _name(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


__all__ = [
    "ORDERS",
    "QUALITY",
    "contrasts",
    "groups",
    "in_words",
    "label",
    "present",
    "reading_kept",
    "shown",
    "tabulate",
    "telling",
    "where",
]
