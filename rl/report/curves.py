"""Series of a method's runs as one curve: against steps, and against the entropy that was consumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from rl.report.reading import Run
from rl.report.stats import band

POINTS = 120  # of a curve: more than a chart can show, few enough for many methods on a page
FIRST = 5  # steps whose mean is where the entropy began


class Curve(NamedTuple):
    """Interquartile mean over ``runs`` runs with its band at each x; see :func:`rl.report.stats.band`."""

    x: np.ndarray
    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray
    runs: int


def window(runs: Sequence[Run]) -> int:
    """Steps that curves are averaged over: a twentieth of the longest run, so that all methods are smoothed alike."""
    return max([1, *(round(len(run.metrics) / 20) for run in runs)])


def against_steps(runs: Sequence[Run], series: str, steps: int) -> Curve | None:
    """A series averaged over the last ``steps`` steps, at the steps that all runs have; None where no run has the series."""
    found = [_smooth(run.metrics[series].dropna(), steps) for run in runs if series in run.metrics]
    found = [values for values in found if len(values)]
    if not found:
        return None
    frame = pd.concat(found, axis=1, join="inner")
    frame = frame.iloc[_thinned(len(frame))]
    return Curve(frame.index.to_numpy(), *band(frame.to_numpy().T), runs=len(found)) if len(frame) else None


def consumed(entropy: pd.Series, steps: int) -> pd.Series:
    """Entropy consumed up to each step, in nats: the largest fall so far of the smoothed entropy below that of the first 5 steps.

    It never falls: entropy that comes back was spent all the same, and a method that holds its entropy stays at 0.
    """
    return (entropy.head(FIRST).mean() - _smooth(entropy, steps)).clip(lower=0).cummax()


def against_consumed(runs: Sequence[Run], series: str, steps: int) -> Curve | None:
    """What a series (smoothed) had come to when so many nats were consumed: at the last step that had consumed no more.

    That is where a training with this budget of entropy would have stopped. Up to what all runs consumed.
    """
    found = []
    for run in runs:
        if {series, "entropy/mean"} <= set(run.metrics):
            both = run.metrics[[series, "entropy/mean"]].dropna()
            if len(both):
                found.append(
                    (consumed(both["entropy/mean"], steps).to_numpy(), _smooth(both[series], steps).to_numpy())
                )
    if not found:
        return None
    budgets = np.unique(
        np.linspace(0.0, min(spent[-1] for spent, _ in found), POINTS)
    )  # one point where nothing was consumed
    # the first step where a run begins below the mean of its first steps
    at = [values[np.maximum(np.searchsorted(spent, budgets + 1e-12, side="right") - 1, 0)] for spent, values in found]
    return Curve(budgets, *band(np.array(at)), runs=len(found))


def _smooth(values: pd.Series, steps: int) -> pd.Series:
    return values.rolling(steps, min_periods=1).mean()


def _thinned(n: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, POINTS)).round().astype(int)) if n else np.arange(0)
