"""Estimators of evaluation over n samples a problem. Plain numbers in, plain numbers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased probability that one of k of n samples is right: ``1 - C(n - c, k) / C(n, k)``.

    As the product ``1 - prod_{i = n - c + 1}^{n} (1 - k / i)``, of which no factor overflows. Source: Chen et al.
    (arXiv 2107.03374), equation 1 and figure 3.

    Raises:
        ValueError: k outside 1..n, or correct outside 0..n.
    """
    if not 1 <= k <= n:
        raise ValueError(
            f"pass@{k} cannot be estimated from {n} samples. Expected 1 <= k <= samples: raise eval.samples."
        )
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n} samples. Expected 0 <= correct <= samples.")
    if n - correct < k:
        return 1.0  # every choice of k has a right one
    # by logarithms, so that a rate near zero keeps its digits
    return float(-np.expm1(np.log1p(-k / np.arange(n - correct + 1, n + 1)).sum()))


def vote(answers: Sequence[str | None]) -> int | None:
    """Index of the first sample that gives the most frequent answer; None (no answer) never wins, ties go to the first."""
    counts = Counter(a for a in answers if a is not None)
    if not counts:
        return None
    return answers.index(counts.most_common(1)[0][0])


def maj_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Share of the consecutive blocks of k samples whose majority answer is right; a remainder is left out.

    Raises:
        ValueError: fewer than k samples.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} needs at least {k} samples, got {len(answers)}: raise eval.samples.")
    starts = range(0, len(answers) - k + 1, k)
    winners = [(start, vote(answers[start : start + k])) for start in starts]
    return sum(i is not None and bool(correct[start + i]) for start, i in winners) / len(starts)


def bootstrap_interval(
    per_problem: Sequence[float], seed: int, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Interval for the mean over the problems that these were drawn from, by the Bayesian bootstrap over problems.

    Each resample weighs the problems by Dirichlet(1, ..., 1) (Rubin 1981), and beside them a problem never solved and one
    always solved of weight Dirichlet(1/2) each. Of rights and wrongs this is exactly Jeffreys' interval, which covers the truth
    at its rate down to few problems and rates near 0 and 1 (Brown, Cai and DasGupta 2001); the percentile bootstrap does not:
    of all wrong it makes the interval 0 to 0.

    Args:
        per_problem: values from 0 to 1, one a problem.
    """
    values = np.asarray(per_problem, dtype=float)
    rng = np.random.default_rng(seed)
    weights = rng.standard_exponential((resamples, len(values)))
    never, always = rng.standard_gamma(0.5, (2, resamples))
    means = (weights @ values + always) / (weights.sum(1) + never + always)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # as Brown, Cai and DasGupta recommend: an end is open only where something was seen there
    low, high = 0.0 if not values.any() else low, 1.0 if (values == 1).all() else high
    # values that almost agree and almost reach 0 or 1 are pulled past their own mean
    return float(min(low, values.mean())), float(max(high, values.mean()))


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95 % interval of a rate of which n independent samples gave ``correct`` (Wilson 1927); an end is 0 or 1 where all agree.

    Raises:
        ValueError: no sample, or correct outside 0..n.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n} samples. Expected 0 <= correct <= samples, of at least one.")
    rate, z2 = correct / n, Z95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * np.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n))
    return (0.0 if correct == 0 else float(centre - half)), (1.0 if correct == n else float(centre + half))


def combined_interval(
    weights: Sequence[float], rates: Sequence[float], lows: Sequence[float], highs: Sequence[float]
) -> tuple[float, float]:
    """95 % interval of ``sum(weights * rates)`` from those of independent rates; weights may be negative.

    Method of variance estimates recovery (Zou and Donner 2008): each rate contributes the distance to the end of its own
    interval that moves the sum the same way, and the distances add up as standard errors do.
    """
    w, rate, low, high = (np.asarray(x, dtype=float) for x in (weights, rates, lows, highs))
    total = w @ rate
    down = np.where(w > 0, rate - low, high - rate) * w
    up = np.where(w > 0, high - rate, rate - low) * w
    return float(total - np.sqrt((down**2).sum())), float(total + np.sqrt((up**2).sum()))
