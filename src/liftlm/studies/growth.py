"""How a cost grows with length: linear and quadratic fits, with bootstrap intervals over the measured points. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from liftlm.evaluation.resampling import RESAMPLES, SEED, percentile_interval

_FEWEST_LENGTHS = 4
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Growth:
    """cost = constant + linear * n + quadratic * n². bend: quadratic part at the longest n, as a share of the whole growth.

    better: which of the two has the lower AICc. exponent: slope of log cost over log n.
    """

    constant: float
    linear: float
    quadratic: float
    bend: float
    bend_interval: tuple[float, float] | None
    exponent: float
    exponent_interval: tuple[float, float] | None
    better: str
    points: int
    lengths: int


def fit_growth(lengths: Sequence[float], costs: Sequence[float]) -> Growth | None:
    """None where there are too few different lengths to tell a line from a parabola."""
    known = [(n, c) for n, c in zip(lengths, costs, strict=True) if n > 0 and c > 0 and math.isfinite(c)]
    if len({n for n, _ in known}) < _FEWEST_LENGTHS:
        return None
    x, y = (np.array(column, dtype=float) for column in zip(*known, strict=True))
    longest = float(x.max())
    draws = np.random.default_rng(SEED).integers(len(x), size=(RESAMPLES, len(x)))
    bends, exponents = [], []
    for draw in draws:
        enough = len(set(x[draw])) >= 3
        bends.append(_bend(x[draw], y[draw], longest) if enough else math.nan)
        exponents.append(_slope(np.log(x[draw]), np.log(y[draw])) if enough else math.nan)
    a, b, c = _fit(x, y, 2)
    line = _fit(x, y, 1)
    better = "quadratic" if _aicc(x, y, np.array([a, b, c])) < _aicc(x, y, line) else "linear"
    return Growth(
        *(float(a), float(b), float(c)),
        _bend(x, y, longest),
        percentile_interval(np.array(bends)),
        _slope(np.log(x), np.log(y)),
        percentile_interval(np.array(exponents)),
        better,
        len(x),
        len(set(x)),
    )


def _fit(x: Floats, y: Floats, degree: int) -> Floats:
    """Coefficients, constant first, by least squares on relative errors: a fit that a few long runs do not decide alone."""
    scaled = x / x.max()
    table = np.vander(scaled, degree + 1, increasing=True) / y[:, None]
    found = np.linalg.lstsq(table, np.ones(len(y)), rcond=None)[0]
    return np.asarray(found / x.max() ** np.arange(degree + 1), dtype=float)


def _bend(x: Floats, y: Floats, longest: float) -> float:
    _, linear, quadratic = _fit(x, y, 2)
    growth = abs(linear) * longest + abs(quadratic) * longest**2
    return float(quadratic * longest**2 / growth) if growth else 0.0


def _slope(x: Floats, y: Floats) -> float:
    return float(np.polyfit(x, y, 1)[0])


def _aicc(x: Floats, y: Floats, coefficients: Floats) -> float:
    errors = sum(coefficient * x**power for power, coefficient in enumerate(coefficients)) / y - 1
    n, k = len(x), len(coefficients) + 1
    spread = max(float((errors**2).mean()), 1e-12)
    return n * math.log(spread) + 2 * k + (2 * k * (k + 1) / (n - k - 1) if n > k + 1 else math.inf)
