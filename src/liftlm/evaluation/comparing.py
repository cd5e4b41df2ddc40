"""Every score in one table, its means, and methods compared question by question.

Knows nothing of how an answer is scored, nor of files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liftlm.evaluation.resampling import Floats, percentile_interval, resampled_means, sign_flip_p_values

Key = tuple[str, str]  # document, question
Mask = NDArray[np.bool_]
_DIGITS = 6


@dataclass(frozen=True)
class Table:
    """Every score, by method: arrays (questions, metrics) that hold NaN where there is none."""

    metrics: tuple[str, ...]
    questions: tuple[Key, ...]
    kinds: tuple[str, ...]  # of the questions
    tokens: tuple[int, ...]  # of their documents
    weights: Floats  # (questions, metrics): how much each counts in the means
    values: dict[str, Floats]
    scored: dict[str, Mask]  # which questions have an answer
    failed: dict[str, Mask]

    def column(self, method: str, metric: str) -> Floats:
        if method not in self.values or metric not in self.metrics:
            return np.full(len(self.questions), np.nan)
        return self.values[method][:, self.metrics.index(metric)]


def compare(table: Table, first: str, second: str, chosen: Mask) -> list[dict[str, Any]]:
    """first − second for every metric, on the questions that both have: weighted mean, interval, and the p-value of a two-sided
    permutation test that flips the differences' signs.
    """
    if first not in table.values or second not in table.values:
        return []
    both = chosen & table.scored[first] & table.scored[second]
    differences, weights = (table.values[first] - table.values[second])[both], table.weights[both]
    means, samples = weighted_means(differences, weights)
    chances = sign_flip_p_values(differences * weights)
    result = []
    for index, metric in enumerate(table.metrics):
        own = differences[:, index]
        if np.isfinite(own).any():
            result.append(
                {
                    "a": first,
                    "b": second,
                    "metric": metric,
                    "n": int(np.isfinite(own).sum()),
                    "difference": round_off(float(means[index])),
                    "interval": interval_of(samples[:, index]),
                    "p_value": round_off(float(chances[index])),
                }
            )
    return result


def compare_all(table: Table, chosen: Mask) -> list[dict[str, Any]]:
    methods = list(table.values)
    pairs = [(later, earlier) for index, later in enumerate(methods) for earlier in methods[:index]]
    return [entry for later, earlier in pairs for entry in compare(table, later, earlier, chosen)]


# --- numbers ----------------------------------------------------------------------------------------------------------


def weighted_means(values: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Of (questions, columns) the weighted means of what there is in each column, and those of each resample."""
    known = np.where(np.isfinite(values), weights, np.nan)
    both = np.concatenate([values * known, known], axis=1)
    means = np.array([mean_of(column) for column in both.T])
    sums, shares = np.split(np.concatenate([means[None], resampled_means(both)]), 2, axis=1)
    result = divide(sums, shares)
    return result[0], result[1:]


def divide(above: Floats, below: Floats) -> Floats:
    """NaN where `below` is not more than 0."""
    result: Floats = np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)
    return result


def mean_of(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def interval_of(samples: Floats) -> list[float] | None:
    interval = percentile_interval(samples)
    return None if interval is None else [round_off(value) for value in interval]


def round_off(value: float) -> float:
    return round(value, _DIGITS) + 0.0  # never −0.0
