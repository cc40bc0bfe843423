"""The charts of a comparison, as figures in Plotly's JSON. Every trace says in ``meta`` which method it is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rl.report import curves
from rl.report.charts import axes, band
from rl.report.compared import Comparison, Result
from rl.report.curves import Curve
from rl.report.page import numbers

COLOURS = 8
_DASHES = ("solid", "dash", "dot", "dashdot")
_MOST_BANDS = 6  # of more methods bands would be a fog
_PER_STEP = {
    "reward": ("reward/mean", "reward"),
    "entropy": ("entropy/mean", "nats"),
    "top20": ("entropy/top20_mean", "nats"),
}


def style(i: int) -> dict[str, str]:
    """Line of the i-th method: eight colours, then the same dashed."""
    return {"color": f"c{i % COLOURS + 1}", "dash": _DASHES[i // COLOURS % len(_DASHES)]}


def charts(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Figures by name; without those of which no method has anything."""
    results = comparison.results
    steps = curves.window([run for result in results for run in result.used])
    figures = {
        name: _curves(results, lambda r, s=series: curves.against_steps(r.used, s, steps), "step", unit)
        for name, (series, unit) in _PER_STEP.items()
    }
    spent = _curves(
        results, lambda r: curves.against_consumed(r.used, "reward/mean", steps), "entropy consumed (nats)", "reward"
    )
    figures |= {"consumed": spent, "pass_at": _pass_at(comparison), "seeds": _seeds(results)}
    return {name: figure for name, figure in figures.items() if figure["data"]}


def _curves(results: Sequence[Result], curve: Callable[[Result], Curve | None], x: str, y: str) -> dict[str, Any]:
    traces = []
    for i, result in enumerate(results):
        if (found := curve(result)) is not None:
            if found.runs > 1 and len(results) <= _MOST_BANDS:
                traces.append(band(list(found.x), found.low, found.high, style(i)["color"], meta=i))
            traces.append(_line(i, result.letter, found.x, found.middle))
    layout = {**axes(x, y), "showlegend": False}
    if len(results) > COLOURS:
        layout["hovermode"] = "closest"  # all of them would cover the chart
    return {"data": traces, "layout": layout}


def _line(i: int, letter: str, x: Sequence[float], y: Sequence[float], **more: Any) -> dict[str, Any]:
    dots = {"mode": "markers", "marker": {"color": style(i)["color"], "size": 9}} if len(x) == 1 else {"mode": "lines"}
    line = {"type": "scatter", **dots, "meta": i, "name": letter, "line": {**style(i), "width": 2}}
    return {**line, "x": numbers(x), "y": numbers(y), **more}


def _pass_at(comparison: Comparison) -> dict[str, Any]:
    traces: list[dict[str, Any]] = []
    for name, (ks, values) in comparison.before.items():
        line = {"color": "muted", "dash": "dot", "width": 2}
        traces.append(
            {"type": "scatter", "mode": "lines", "name": name, "line": line, "x": list(ks), "y": numbers(values)}
        )
    for i, result in enumerate(comparison.results):
        if len(result.problems):
            traces.append(_line(i, result.letter, list(result.ks), result.curves.mean(axis=0)))
    top = max((trace["x"][-1] for trace in traces), default=1)
    ticks = [2**i for i in range(int(np.log2(top)) + 1)]
    x = {"type": "log", "tickvals": ticks, "ticktext": [str(k) for k in ticks]}
    return {"data": traces, "layout": {**axes("k", "pass@k", x), "showlegend": False}}


def _seeds(results: Sequence[Result]) -> dict[str, Any]:
    """pass@1 of every run as a dot; mean and interval of each method beside them."""
    traces = []
    for i, result in enumerate(results):
        cell = result.cells.get("pass@1")
        if cell is None:
            continue
        having = [run for run in result.used if "pass@1" in result.measures[run.folder]]
        dots = {"color": f"{style(i)['color']}/0.55", "size": 8}
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "meta": i,
                "x": [result.letter] * len(having),
                "y": numbers(result.measures[run.folder]["pass@1"] for run in having),
                "text": [f"seed {run.config.get('seed')}" for run in having],
                "marker": dots,
                "hovertemplate": "%{y:.3f}, %{text}<extra></extra>",
            }
        )
        value, low, high = numbers((cell.value, cell.low, cell.high))
        bar = {"type": "data", "symmetric": False, "color": style(i)["color"], "thickness": 2, "width": 8}
        if cell.over:
            bar |= {"array": [high - value], "arrayminus": [value - low]}
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "meta": i,
                "x": [result.letter],
                "y": [value],
                "marker": {"color": style(i)["color"], "size": 18, "symbol": "line-ew-open", "line": {"width": 3}},
                "error_y": bar,
                "hovertemplate": f"{result.letter}: %{{y:.3f}}<extra></extra>",
            }
        )
    layout = axes("method", "pass@1", {"type": "category"})
    return {"data": traces, "layout": {**layout, "hovermode": "closest", "showlegend": False}}
