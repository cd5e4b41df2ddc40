"""How sure a mean over questions is: bootstrap percentile intervals and a permutation test, seeded.

Knows nothing of what is measured.
Arrays are (questions, columns); NaN stands for "no value" and does not count.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES, SEED = 2000, 0
_FLIPS = 10_000  # random patterns of signs
_EXACT = 12  # up to so many questions all patterns are tried instead
_CHUNK = 250  # resamples or patterns in memory as floats at once
_KNOWN_SHARE = 0.95  # of the resamples must have a value, or there is no interval


@functools.lru_cache(maxsize=1)
def _draws(count: int) -> NDArray[np.uint16]:
    """How often each of `count` questions is drawn, in each resample: (resamples, count)."""
    drawn = np.random.default_rng(SEED).integers(count, size=(RESAMPLES, count))
    drawn += np.arange(RESAMPLES)[:, None] * count
    return np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.uint16)


def resampled_means(values: Floats) -> Floats:
    """Of (questions, columns) the columns' means in each resample of the questions: (resamples, columns)."""
    if not len(values):
        return np.full((RESAMPLES, values.shape[1]), np.nan)
    known = np.isfinite(values)
    both = np.concatenate([np.where(known, values, 0.0), known], axis=1)
    draws = _draws(len(values))
    totals = np.concatenate([draws[at : at + _CHUNK].astype(float) @ both for at in range(0, RESAMPLES, _CHUNK)])
    sums, counts = np.split(totals, 2, axis=1)
    means: Floats = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return means


@functools.lru_cache(maxsize=1)
def _signs(count: int) -> NDArray[np.int8]:
    """Patterns of signs, (patterns, count): all there are for a few questions, else some at random."""
    if count <= _EXACT:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
    else:
        bits = np.random.default_rng(SEED).integers(2, size=(_FLIPS, count), dtype=np.int8)
    return (2 * bits - 1).astype(np.int8)


def sign_flip_p_values(differences: Floats) -> Floats:
    """Of (questions, columns): how often a sum with random signs is as far from 0 as the sum itself, for each column."""
    if not len(differences):
        return np.full(differences.shape[1], np.nan)
    signs = _signs(len(differences))
    known = np.nan_to_num(differences, nan=0.0)
    least = np.abs(known.sum(axis=0)) * (1 - 1e-9) - 1e-12  # sums of the same numbers in another order differ a little
    hits = sum(
        (np.abs(signs[at : at + _CHUNK].astype(float) @ known) >= least).sum(axis=0)
        for at in range(0, len(signs), _CHUNK)
    )
    added = int(len(differences) > _EXACT)  # the pattern that was met, which a random choice lacks
    return np.asarray((hits + added) / (len(signs) + added), dtype=float)


def percentile_interval(samples: Floats) -> tuple[float, float] | None:
    """The middle 95 %; None where too many resamples have no value."""
    known = samples[np.isfinite(samples)]
    if not len(known) or len(known) < _KNOWN_SHARE * len(samples):
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)
