"""The predicted change of entropy against the measured one, and what that comparison is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rl.report.charts import finite


@dataclass(frozen=True)
class Ledger:
    """Predicted change of entropy against the measured one.

    Attributes:
        steps: pairs. same_sign: share of them with one sign. by_chance: what it would be of independent signs that are as often
            negative. correlation, of_blocks: over the steps, and over sums of ``block`` steps; NaN where nothing moves.
    """

    steps: int
    same_sign: float
    by_chance: float
    correlation: float
    block: int
    of_blocks: float


def pairs(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns predicted and measured: what a step's update was predicted to do, and what the next step measured."""
    predicted, measured = finite(frame, "entropy/predicted_change"), finite(frame, "entropy/measured_change")
    after = measured.set_axis(measured.index - 1)
    return pd.DataFrame({"predicted": predicted, "measured": after}, dtype=float).dropna()


def judge(frame: pd.DataFrame, block: int = 10) -> Ledger | None:
    """How well the prediction did; None for fewer than 10 pairs."""
    both = pairs(frame)
    both = both[both["predicted"] != 0]  # while the learning rate is 0
    if len(both) < 10:
        return None
    p, m = (both[c] > 0 for c in both)
    chance = p.mean() * m.mean() + (1 - p.mean()) * (1 - m.mean())
    sums = both.groupby(np.arange(len(both)) // block).sum()[: len(both) // block]
    return Ledger(len(both), float((p == m).mean()), float(chance), _correlation(both), block, _correlation(sums))


def _correlation(both: pd.DataFrame) -> float:
    if len(both) < 3 or not (both.std() > 0).all():
        return math.nan
    return float(np.corrcoef(both.to_numpy().T)[0, 1])


def in_words(found: Ledger | None) -> str:
    if found is None:
        return "Fewer than 10 steps: too few to judge the prediction."
    verdict = (
        "as often as"
        if abs(found.same_sign - found.by_chance) < 1 / math.sqrt(found.steps)
        else ("more often than" if found.same_sign > found.by_chance else "less often than")
    )
    said = (
        f"Same sign in {found.same_sign:.0%} of {found.steps} steps, {verdict} by chance ({found.by_chance:.0%}); "
        f"correlation {_said(found.correlation)} step by step"
    )
    return f"{said}, {_said(found.of_blocks)} over sums of {found.block} steps."


def _said(correlation: float) -> str:
    return "unknown" if math.isnan(correlation) else f"{correlation:.2f}"
