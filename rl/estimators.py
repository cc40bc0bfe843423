"""Estimators of evaluation over n samples a problem. Plain numbers in, plain numbers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased probability that one of k of n samples is right: ``1 - C(n - c, k) / C(n, k)``.

    Source: Chen et al. (arXiv 2107.03374), equation 1.

    Raises:
        ValueError: k outside 1..n, or correct outside 0..n.
    """
    if not 1 <= k <= n:
        raise ValueError(
            f"pass@{k} cannot be estimated from {n} samples. Expected 1 <= k <= samples: raise eval.samples."
        )
    if not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n} samples. Expected 0 <= correct <= samples.")
    return 1.0 - comb(n - correct, k) / comb(n, k)


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
    per_problem: Sequence[float], seed: int, level: float = 0.95, resamples: int = 1000
) -> tuple[float, float]:
    """Percentile interval of the mean over problems, problems drawn with replacement."""
    values = np.asarray(per_problem, dtype=float)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
