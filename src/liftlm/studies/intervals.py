"""From rows to figures with bootstrap intervals, and from intervals to a verdict. Pure: rows in, numbers and words out.

A unit is a question of a document (or whatever a study repeats). Its values for several seeds are averaged first; units are
then resampled, so an interval says how far the figure depends on which questions were asked. It does not cover what
other documents would have given; reports say how many there were.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from liftlm.evaluation.resampling import RESAMPLES, percentile_interval, resampled_means

Row = Mapping[str, Any]
Select = Callable[[Row], bool]
Outcome = Literal["confirmed", "not confirmed", "not decidable at this size"]
FEWEST = 3  # units; below it there is no interval
DECIDABLE = 10  # units; below it an interval is too rough for a verdict


@dataclass(frozen=True)
class Figure:
    """A mean (or mean difference) over units. low, high: the middle 95 %, or None."""

    mean: float
    low: float | None
    high: float | None
    units: int
    documents: int
    seeds: tuple[int, ...]

    def __str__(self) -> str:
        return self.shown()

    def shown(self, digits: int = 3, scale: float = 1.0, sign: bool = False) -> str:
        """0.261 [0.203, 0.315]."""
        if not self.units or not math.isfinite(self.mean):
            return "–"
        style = f"{'+' if sign else ''}.{digits}f"
        mean = format(self.mean * scale, style)
        if self.low is None or self.high is None:
            return mean
        return f"{mean} [{format(self.low * scale, style)}, {format(self.high * scale, style)}]"

    def row(self) -> dict[str, Any]:
        """Columns of figures.csv."""
        seeds = " ".join(map(str, self.seeds))
        return {
            "mean": _plain(self.mean),
            "low": _plain(self.low),
            "high": _plain(self.high),
            "units": self.units,
            "documents": self.documents,
            "seeds": seeds,
            "resamples": RESAMPLES,
        }


@dataclass(frozen=True)
class Verdict:
    """What a study says about a claim: the outcome and one sentence."""

    outcome: Outcome
    sentence: str


def by_unit(rows: Iterable[Row], metric: str, select: Select = lambda row: True) -> dict[tuple[str, str], float]:
    """(document, unit) → mean over the seeds; rows without the metric do not count."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        value = row.get(metric)
        if isinstance(value, int | float) and math.isfinite(value) and select(row):
            values[str(row.get("document_id", "")), str(row.get("unit", ""))].append(float(value))
    return {key: sum(found) / len(found) for key, found in values.items()}


def figure(rows: Sequence[Row], metric: str, select: Select = lambda row: True) -> Figure:
    """The metric's mean over the units of the rows that are selected."""
    return _figure(by_unit(rows, metric, select), _seeds(rows, select))


def difference(rows: Sequence[Row], metric: str, first: Select, second: Select) -> Figure:
    """first − second, paired unit by unit, over the units that both have."""
    one, other = by_unit(rows, metric, first), by_unit(rows, metric, second)
    paired = {key: one[key] - other[key] for key in one if key in other}
    seeds = _seeds(rows, lambda row: first(row) or second(row))
    return _figure(paired, seeds)


def quotient(rows: Sequence[Row], metric: str, first: Select, second: Select) -> Figure:
    """Mean of first / mean of second, over the units that both have; the units are resampled in pairs."""
    one, other = by_unit(rows, metric, first), by_unit(rows, metric, second)
    keys = sorted(key for key in one if key in other)
    seeds = _seeds(rows, lambda row: first(row) or second(row))
    below = sum(other[key] for key in keys)
    if not keys or below == 0:
        return Figure(math.nan, None, None, 0, 0, seeds)
    columns = np.array([[one[key], other[key]] for key in keys])
    interval = None
    if len(keys) >= FEWEST:
        means = resampled_means(columns)
        shares = np.divide(means[:, 0], means[:, 1], out=np.full(len(means), np.nan), where=means[:, 1] != 0)
        interval = percentile_interval(shares)
    low, high = interval if interval is not None else (None, None)
    documents = len({document for document, _ in keys})
    return Figure(sum(one[key] for key in keys) / below, low, high, len(keys), documents, seeds)


def gap(rows: Sequence[Row], metric: str, first: Select, second: Select, here: Select, there: Select) -> Figure:
    """(first − second) over the units `here`, less the same over those `there`: two groups, each resampled for itself."""
    sides = []
    for side in (here, there):
        one = by_unit(rows, metric, lambda row, side=side: side(row) and first(row))  # type: ignore[misc]
        other = by_unit(rows, metric, lambda row, side=side: side(row) and second(row))  # type: ignore[misc]
        sides.append({key: one[key] - other[key] for key in one if key in other})
    seeds = _seeds(rows, lambda row: first(row) or second(row))
    fewest = min(map(len, sides))
    if not fewest:
        return Figure(math.nan, None, None, 0, 0, seeds)
    columns = [np.array([side[key] for key in sorted(side)])[:, None] for side in sides]
    mean = float(columns[0].mean() - columns[1].mean())
    documents = len({document for side in sides for document, _ in side})
    interval = None
    if fewest >= FEWEST:
        near, far = (resampled_means(column)[:, 0] for column in columns)
        # the draws are the same for groups of equal size; shifted against each other they are independent
        interval = percentile_interval(near - np.roll(far, 1))
    low, high = interval if interval is not None else (None, None)
    return Figure(mean, low, high, fewest, documents, seeds)


def share_above(figure: Figure, least: float) -> Outcome:
    """Whether a figure is shown to be above `least`, shown not to be, or neither (also where it rests on too few units)."""
    if figure.low is None or figure.high is None or figure.units < DECIDABLE:
        return "not decidable at this size"
    if figure.low > least:
        return "confirmed"
    return "not confirmed" if figure.high <= least else "not decidable at this size"


def together(outcomes: Iterable[Outcome]) -> Outcome:
    """Of a claim of several parts: confirmed if all are, not confirmed if one is shown wrong."""
    found = list(outcomes)
    if not found:
        return "not decidable at this size"
    if any(outcome == "not confirmed" for outcome in found):
        return "not confirmed"
    return "confirmed" if all(outcome == "confirmed" for outcome in found) else "not decidable at this size"


def groups(rows: Iterable[Row], key: str) -> list[Any]:
    """The values that a column has, in the order in which they first occur."""
    return list(dict.fromkeys(row[key] for row in rows if row.get(key) is not None))


def _figure(values: Mapping[tuple[str, str], float], seeds: tuple[int, ...]) -> Figure:
    documents = len({document for document, _ in values})
    if not values:
        return Figure(math.nan, None, None, 0, 0, seeds)
    column = np.array([values[key] for key in sorted(values)])[:, None]
    interval = percentile_interval(resampled_means(column)[:, 0]) if len(values) >= FEWEST else None
    low, high = interval if interval is not None else (None, None)
    return Figure(float(column.mean()), low, high, len(values), documents, seeds)


def _seeds(rows: Iterable[Row], select: Select) -> tuple[int, ...]:
    return tuple(sorted({int(row["seed"]) for row in rows if row.get("seed") is not None and select(row)}))


def _plain(value: float | None) -> float | str:
    return "" if value is None or not math.isfinite(value) else round(value, 6)
