"""Charts of series over the steps, as plain dicts in Plotly's JSON; colours are names of the page's theme.

The page's ``steps.js`` smooths the lines, marks one step in every chart, and writes each chart's numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from rl.report.page import numbers
from rl.report.reading import HistogramSeries

MAX_POINTS = 1000  # of a line; more than a screen shows
MAX_COLUMNS = 400  # of a heat map
COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
QUANTILES = (0.05, 0.50, 0.95)


@dataclass(frozen=True)
class Chart:
    """A chart, or why there is none.

    Attributes:
        look: one line that says what to look for. figure: Plotly's {"data", "layout"}, None where the run lacks the series; then
            ``missing`` says why. series: the columns that it shows. wide: over the whole width. over_steps: whether the x axis is the
            step. note: a sentence on what this run's numbers say.
    """

    name: str
    title: str
    look: str
    figure: dict[str, Any] | None = None
    missing: str = ""
    series: Sequence[str] = ()
    wide: bool = False
    over_steps: bool = True
    note: str = ""


def finite(frame: pd.DataFrame, column: str) -> pd.Series:
    """The finite values of a column by step; empty where there is none."""
    if column not in frame:
        return pd.Series(dtype=float)
    return frame[column].replace([np.inf, -np.inf], np.nan).dropna()


def bin_of_steps(steps: np.ndarray, at_most: int) -> tuple[np.ndarray, int]:
    """For each step the bin it falls into, bins of equally many steps counted from the first, and how many that is."""
    if not len(steps):
        return np.zeros(0, dtype=int), 1
    width = -(-int(steps[-1] - steps[0] + 1) // at_most)
    return (steps - steps[0]) // width, width


def thin(series: pd.Series, at_most: int = MAX_POINTS) -> pd.Series:
    """A series with so many points at most: each the mean of equally many steps, at the last of them."""
    steps = series.index.to_numpy()
    bins, width = bin_of_steps(steps, at_most)
    if width == 1:
        return series
    groups = pd.DataFrame({"step": steps, "value": series.to_numpy()}).groupby(bins)
    return groups["value"].mean().set_axis(groups["step"].max())


def line(series: pd.Series, label: str, colour: str, smooth: bool = True, **more: Any) -> dict[str, Any]:
    """A trace; with ``smooth`` the page may draw a moving average over it."""
    short = thin(series)
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(short) < 12 else "lines",
        "x": [int(step) for step in short.index],
        "y": numbers(short),
        "name": label,
        "line": {"color": colour, "width": 1.6},
        "marker": {"color": colour, "size": 5},
        "meta": {"smooth": smooth},
        **more,
    }


def band(x: Sequence[float], low: Iterable[float], high: Iterable[float], colour: str, **more: Any) -> dict[str, Any]:
    """A trace: the area between low and high."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": numbers([*x, *reversed(x)]),
        "y": numbers([*high, *reversed([*low])]),
        "fill": "toself",
        "fillcolor": f"{colour}/0.15",
        "line": {"width": 0},
        "hoverinfo": "skip",
        **more,
    }


def axes(
    x_title: str, y_title: str, x: Mapping[str, Any] | None = None, y: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A layout: both axes with their titles. Args: x, y: more of Plotly's xaxis and yaxis."""
    return {"xaxis": {"title": {"text": x_title}, **(x or {})}, "yaxis": {"title": {"text": y_title}, **(y or {})}}


def over_steps(
    traces: Sequence[Mapping[str, Any]], y: Mapping[str, Any] | None = None, **layout: Any
) -> dict[str, Any]:
    """A figure whose x axis is the step, and whose legend steps.js writes. Args: y: of Plotly's yaxis."""
    axes = {"xaxis": {"title": {"text": "step"}}, "yaxis": dict(y or {})}
    return {"data": list(traces), "layout": {**axes, "showlegend": False, **layout}}


def lines(frame: pd.DataFrame, labels: Mapping[str, str], y: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """A figure of the columns that have a value, under their labels; None where none has."""
    found = {column: finite(frame, column) for column in labels}
    traces = [
        line(series, labels[column], COLOURS[i % len(COLOURS)])
        for i, (column, series) in enumerate(found.items())
        if len(series)
    ]
    return over_steps(traces, y) if traces else None


def with_marks(figure: dict[str, Any], steps: Sequence[int]) -> dict[str, Any]:
    """The figure with a dotted line at each of these steps."""
    shapes = [
        {
            "type": "line",
            "x0": step,
            "x1": step,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"color": "warn", "width": 1, "dash": "dot"},
        }
        for step in steps
    ]
    layout = figure["layout"]
    return {**figure, "layout": {**layout, "shapes": [*layout.get("shapes", []), *shapes]}}


def quantiles(histogram: HistogramSeries, shares: Sequence[float] = QUANTILES) -> pd.DataFrame:
    """Quantiles of each step's histogram, interpolated within a bin: one row a step with any count, one column a share."""
    counts, edges = histogram.counts, histogram.edges
    total = counts.sum(1)
    rows = {}
    for step, of_step, n in zip(histogram.steps, counts, total, strict=True):
        if n:
            reached = np.concatenate([[0.0], np.cumsum(of_step) / n])
            bins = np.clip(np.searchsorted(reached, shares, side="left") - 1, 0, len(of_step) - 1)
            inside = (np.asarray(shares) - reached[bins]) / np.maximum(reached[bins + 1] - reached[bins], 1e-12)
            rows[step] = edges[bins] + np.clip(inside, 0, 1) * (edges[bins + 1] - edges[bins])
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(shares), dtype=float)


def add_up(histogram: HistogramSeries, at_most: int = MAX_COLUMNS) -> HistogramSeries:
    """The histogram with so many steps at most: the counts of equally many steps added up, at the last of them."""
    bins, width = bin_of_steps(histogram.steps, at_most)
    if width == 1:
        return histogram
    starts = np.unique(bins, return_index=True)[1]
    last = np.append(starts[1:], len(bins)) - 1
    return HistogramSeries(histogram.steps[last], np.add.reduceat(histogram.counts, starts, axis=0), histogram.edges)


def heat_map(histogram: HistogramSeries) -> dict[str, Any] | None:
    """Share of tokens by entropy (log axis) over the steps; None where nothing was counted. The lowest bin, 0 to the second
    edge, is drawn as wide as the next."""
    short = add_up(histogram)
    used = np.flatnonzero(short.counts.sum(0))
    if not len(used):
        return None
    top = used[-1] + 1
    edges = short.edges[: top + 1].astype(float).copy()
    if edges[0] <= 0 and len(edges) > 2:
        edges[0] = edges[1] ** 2 / edges[2]
    shares = 100 * short.counts[:, :top] / np.maximum(short.counts.sum(1, keepdims=True), 1)
    limit = (
        float(np.quantile(shares[:, 1:], 0.995)) if top > 1 else 0.0
    )  # the bin at 0 would leave no colour to the others
    return {
        "data": [
            {
                "type": "heatmap",
                "x": [int(step) for step in short.steps],
                "y": numbers(edges),
                "z": [numbers(column, 3) for column in shares.T],
                "zmin": 0,
                "zmax": limit or float(shares.max()),
                "colorscale": [[0, "panel"], [1, "c1"]],
                "colorbar": {"title": {"text": "% of tokens", "side": "right"}, "thickness": 10, "outlinewidth": 0},
                "hovertemplate": "step %{x}<br>%{y:.2g} nats<br>%{z:.2f} % of the tokens<extra></extra>",
            }
        ],
        "layout": {
            "xaxis": {"title": {"text": "step"}},
            "yaxis": {"title": {"text": "entropy, nats"}, "type": "log", "exponentformat": "power", "dtick": 1},
            "hovermode": "closest",
            "showlegend": False,
        },
    }
