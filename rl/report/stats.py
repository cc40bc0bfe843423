"""What can be said of a few runs on the same problems: interquartile means, bootstrap intervals, sign-flip tests. numpy only.

Interquartile mean, stratified bootstrap and probability of improvement are those of Agarwal et al., "Deep Reinforcement Learning
at the Edge of the Statistical Precipice" (arXiv 2108.13264), and of their code, rliable.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from rl.estimators import pass_at_k

RESAMPLES = 2000
FLIPS = 10_000
_EXACT = 13  # up to so many differences other than 0, all 2^n sign assignments are fewer than FLIPS


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


class PValue(NamedTuple):
    """A two-sided p-value over ``n`` differences; ``smallest``: what it could be at best; ``exact``: all sign assignments counted."""

    p: float
    n: int
    smallest: float
    exact: bool


def iqm(values: np.ndarray, axis: int | None = None) -> np.ndarray | float:
    """Mean without the lowest and the highest floor(n / 4) values: of fewer than four, the mean.

    With ``axis=None`` over all runs and tasks at once, as in rliable.
    """
    values = np.asarray(values, dtype=float)
    if axis is None:
        values, axis = values.ravel(), 0
    ordered = np.sort(values, axis=axis)
    n = ordered.shape[axis]
    return ordered.take(range(n // 4, n - n // 4), axis=axis).mean(axis=axis)


def over_runs(scores: np.ndarray, seed: int = 0) -> Interval:
    """Interquartile mean of scores (runs, tasks) and its percentile bootstrap: runs are drawn anew within each task (stratum).

    Of one run the interval is NaN.
    """
    scores = np.asarray(scores, dtype=float)
    runs, tasks = scores.shape
    value = float(iqm(scores))
    if runs < 2:
        return Interval(value, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(runs, size=(RESAMPLES, runs, tasks))
    means = iqm(scores[drawn, np.arange(tasks)].reshape(RESAMPLES, -1), axis=1)
    return Interval(value, *map(float, np.quantile(means, [0.025, 0.975])))


def band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Interquartile mean of curves (runs, points) at each point, with low and high.

    From four runs on the 95 % percentile bootstrap over runs; of two and three the lowest and the highest run; of one, itself.
    """
    ordered = np.sort(np.asarray(curves, dtype=float), axis=0)
    runs = len(ordered)
    middle = iqm(ordered, axis=0)
    if runs < 4:
        return middle, ordered[0], ordered[-1]
    # a resample is the same ranks at every point, so its means are one matrix product with the sorted values
    means = _middle_ranks(runs) @ ordered
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return middle, low, high


@lru_cache(maxsize=64)
def _middle_ranks(n: int) -> np.ndarray:
    """(RESAMPLES, n): how much each rank weighs in the interquartile mean of a resample of n."""
    drawn = np.sort(np.random.default_rng(0).integers(n, size=(RESAMPLES, n)), axis=1)[:, n // 4 : n - n // 4]
    weights = np.zeros((RESAMPLES, n))
    np.add.at(weights, (np.arange(RESAMPLES)[:, None], drawn), 1 / drawn.shape[1])
    return weights


def sign_flip(differences: np.ndarray) -> PValue:
    """Paired permutation test that the mean difference is 0: how often flipped signs give a mean at least as far from it.

    Exact up to 13 differences other than 0; beyond, (1 + hits) / (1 + 10,000) of seeded random flips.
    """
    differences = np.asarray(differences, dtype=float)
    moved = differences[differences != 0]
    n = len(moved)
    seen = abs(moved.sum())
    edge = seen - 1e-9 * max(1.0, np.abs(moved).sum())  # sums that are equal up to rounding count
    if n <= _EXACT:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return PValue(
            float(np.mean(np.abs(signs @ moved) >= edge)), len(differences), 2.0 ** (1 - n) if n else 1.0, True
        )
    hits = int((np.abs(_signs(n) @ moved) >= edge).sum())
    return PValue((1 + hits) / (1 + FLIPS), len(differences), 1 / (1 + FLIPS), False)


@lru_cache(maxsize=4)
def _signs(n: int) -> np.ndarray:
    return np.random.default_rng(0).choice(np.array([-1.0, 1.0]), size=(FLIPS, n))


@lru_cache(maxsize=4)
def problem_weights(n: int) -> np.ndarray:
    """(RESAMPLES, n): the share of each of n problems in a bootstrap resample; the same for everything on n problems."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n


def over_problems(values: np.ndarray) -> Interval:
    """Mean of one value a problem, and its percentile bootstrap over problems."""
    values = np.asarray(values, dtype=float)
    low, high = np.quantile(problem_weights(len(values)) @ values, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that may each be held against the level of all tests together."""
    order = np.argsort(p, kind="stable")
    out, worst = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        out[i] = worst
    return out


def improvement(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Interval:
    """P(a run of a is better than one of b), ties by half, mean over tasks; scores are (runs, tasks), higher is better.

    Interval: runs of both drawn anew within each task; NaN where one of them has a single run.
    """

    def probability(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # (..., runs, tasks)
        difference = a[..., :, None, :] - b[..., None, :, :]
        return ((difference > 0) + 0.5 * (difference == 0)).mean(axis=(-3, -2, -1))

    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    value = float(probability(a, b))
    if min(len(a), len(b)) < 2:
        return Interval(value, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    tasks = np.arange(a.shape[1])
    drawn = [s[rng.integers(len(s), size=(RESAMPLES, *s.shape)), tasks] for s in (a, b)]
    return Interval(value, *map(float, np.quantile(probability(*drawn), [0.025, 0.975])))


def pass_curves(right: np.ndarray, n: int, ks: Sequence[int]) -> np.ndarray:
    """Unbiased pass@k of each problem, (problems, ks). Args: right: of n samples each."""
    return _pass_table(n, tuple(ks))[np.asarray(right, dtype=int)]


@lru_cache(maxsize=16)
def _pass_table(n: int, ks: tuple[int, ...]) -> np.ndarray:
    return np.array([[pass_at_k(n, c, k) for k in ks] for c in range(n + 1)])


def crossover(a: np.ndarray, b: np.ndarray, ks: Sequence[int]) -> Interval:
    """The first k at which b's mean curve overtakes a's, linear between the ks; curves are (problems, ks).

    ks[0] where b leads from the start, infinity where it never does, as where both are equal at every k. Interval: percentile
    bootstrap over problems; an end of the interval is infinity where b did not overtake a in that many resamples.
    """
    difference = np.asarray(b - a, dtype=float)
    ks = np.asarray(ks, dtype=float)
    value = _crossings(difference.mean(axis=0)[None], ks)[0]
    drawn = np.sort(_crossings(problem_weights(len(difference)) @ difference, ks))
    # no interpolation: between a number and infinity there is none
    return Interval(float(value), float(drawn[int(0.025 * len(drawn))]), float(drawn[int(0.975 * len(drawn))]))


def _crossings(lead: np.ndarray, ks: np.ndarray) -> np.ndarray:
    """For leads (rows, ks) of b over a, the first k at which b is ahead."""
    ahead = lead > 1e-12
    first = ahead.argmax(axis=1)
    rows = np.arange(len(lead))
    before = np.maximum(first - 1, 0)
    span = lead[rows, first] - np.minimum(lead[rows, before], 0.0)
    share = np.divide(-np.minimum(lead[rows, before], 0.0), span, out=np.zeros_like(span), where=span > 0)
    found = ks[before] + share * (ks[first] - ks[before])
    return np.where(ahead.any(axis=1), np.where(first == 0, ks[0], found), np.inf)
