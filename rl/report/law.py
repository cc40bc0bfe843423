"""Reward against e^H, where the law R = -a e^H + b of Cui et al. (arXiv 2505.22617) is a line, and the forecast of its end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from rl.forecast import fit
from rl.report.charts import Chart, axes, finite, line, over_steps, thin
from rl.report.page import numbers


def law(frame: pd.DataFrame) -> Chart:
    """Every step's reward over e^H, the fitted line, and the ceiling that it forecasts."""
    both = pd.DataFrame({"h": finite(frame, "entropy/mean"), "r": finite(frame, "reward/mean")}, dtype=float).dropna()
    title = "Reward bought with entropy"
    look = "Each point is a step, strong ones late. A falling line: reward is paid for with entropy, and ends where it is spent, left."
    if len(both) < 3:
        return Chart("law", title, look, None, "it needs 3 steps with reward/mean and entropy/mean")
    x, y = np.exp(thin(both["h"])), thin(both["r"])
    steps = [int(step) for step in x.index]
    points = {
        "type": "scatter",
        "mode": "markers",
        "x": numbers(x),
        "y": numbers(y),
        "name": "steps",
        "marker": {
            "size": 6,
            "color": steps,
            "colorscale": [[0, "line"], [1, "c1"]],
            "colorbar": {"title": {"text": "step", "side": "right"}, "thickness": 10, "outlinewidth": 0},
        },
        "customdata": steps,
        "hovertemplate": "step %{customdata}<br>e^H %{x}, reward %{y}<extra></extra>",
    }
    traces, note = _fitted(both, float(x.max()))
    layout = {**axes("e to the power of the mean entropy", "reward"), "hovermode": "closest", "showlegend": False}
    figure = {"data": [points, *traces], "layout": layout}
    return Chart("law", title, look, figure, over_steps=False, note=note)


def _fitted(both: pd.DataFrame, right: float) -> tuple[list[dict[str, Any]], str]:
    found = fit(both["h"].tolist(), both["r"].tolist())
    if found is None:
        return [], "Too few steps, or too little movement of the entropy, for a forecast."
    of_line = {
        "type": "scatter",
        "mode": "lines",
        "name": "fit",
        "line": {"color": "c2", "width": 1.6},
        "hoverinfo": "skip",
    }
    ends = [1.0, right]
    spread = {"array": numbers([found.high - found.ceiling]), "arrayminus": numbers([found.ceiling - found.low])}
    ceiling = {
        "type": "scatter",
        "mode": "markers",
        "name": "at entropy 0",
        "x": [1.0],
        "y": numbers([found.ceiling]),
        "error_y": {"type": "data", "symmetric": False, "color": "c2", **spread},
        "marker": {"color": "c2", "size": 9, "symbol": "diamond"},
        "hovertemplate": "at entropy 0: %{y}<extra></extra>",
    }
    note = (
        f"Fitted: reward {found.ceiling:.3f} ({found.low:.2f} to {found.high:.2f}) when all entropy is spent, R2 {found.r2:.2f}; "
        "a description of this run."
    )
    return [{**of_line, "x": numbers(ends), "y": numbers(found.b - found.a * x for x in ends)}, ceiling], note


def forecast(frame: pd.DataFrame) -> Chart:
    """What the run forecast while it went on, beside the reward."""
    name, title = "forecast", "Forecast of the final reward"
    look = "Where the reward ends if this run keeps buying it with entropy. A narrow band is a sure forecast, not a true one."
    ceiling, low, high = (finite(frame, f"forecast/{key}") for key in ("ceiling", "low", "high"))
    series = tuple(c for c in frame if c.startswith("forecast/"))
    if ceiling.empty or low.empty or high.empty:
        why = "the run logged none: too few steps, too little movement of its entropy, or an earlier entrl"
        return Chart(name, title, look, None, why, series)
    edge = {"line": {"color": "c2/0.35", "width": 1}, "smooth": False}
    traces = [
        line(low, "lower end", "c2", **edge),
        line(high, "upper end", "c2", **edge, fill="tonexty", fillcolor="c2/0.12"),
        line(ceiling, "forecast", "c2", smooth=False),
        line(finite(frame, "reward/mean"), "reward", "c1"),
    ]
    top, bottom = _view(frame, ceiling)
    figure = over_steps(traces, {"range": [bottom, top]})
    return Chart(name, title, look, figure, series=series, note=_departed(frame))


def _view(frame: pd.DataFrame, ceiling: pd.Series) -> tuple[float, float]:
    """The range that the reward and most of the forecast need; early bands are far wider and would flatten all the rest."""
    values = pd.concat([finite(frame, "reward/mean"), ceiling])
    low, high = values.quantile(0.02), values.quantile(0.98)
    room = 0.25 * max(high - low, 1e-6)
    return float(f"{high + room:.4g}"), float(f"{low - room:.4g}")


def _departed(frame: pd.DataFrame) -> str:
    left = finite(frame, "forecast/departed")
    left = left[left > 0]
    if left.empty:
        return ""
    return f"In {len(left)} steps, first {left.index[0]}, the run was off this law: something else moved the reward."
