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
    """Two fits, `line` and `parabola`: the cost is the sum of coefficient k times n to the power of k.

    bend: quadratic part of the parabola at the longest n, as a share of its whole growth. better: which of the two has the
    lower AICc. exponent: slope of log cost over log n.
    """

    line: tuple[float, float]
    parabola: tuple[float, float, float]
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
    line, parabola = _fit(x, y, 1), _fit(x, y, 2)
    better = "quadratic" if _aicc(x, y, parabola) < _aicc(x, y, line) else "linear"
    a, b, c = map(float, parabola)
    return Growth(
        (float(line[0]), float(line[1])),
        (a, b, c),
        _bend(x, y, longest),
        percentile_interval(np.array(bends)),
        _slope(np.log(x), np.log(y)),
        percentile_interval(np.array(exponents)),
        better,
        len(x),
        len(set(x)),
    )


def cost_at(coefficients: Sequence[float], n: float) -> float:
    """What a fit says of the length n."""
    return sum(coefficient * n**power for power, coefficient in enumerate(coefficients))


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
