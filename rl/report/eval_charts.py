"""pass@k over k, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl.report.charts import Chart, axes
from rl.report.facts import Measured
from rl.report.page import numbers


def pass_at_k(name: str, evaluated: Mapping[str, Mapping[str, Measured]]) -> Chart:
    """The curves of a set. Args: evaluated: measures by "before" and "after"."""
    traces = [_curve(when, values, colour) for when, colour in _COLOURS.items() if (values := evaluated.get(when))]
    traces = [trace for trace in traces if trace["x"]]
    ks = _ks(traces)
    x = {"type": "log", "tickvals": ks, "ticktext": ks}
    layout = axes("k, samples that may be tried", "pass@k", x, {"tickformat": ".2~%"})
    return Chart(
        name=f"pass_{name}",
        title=f"pass@k on {name}",
        look="Up at the left: right more often. Down at the right: some problems it could solve before, it now never does.",
        figure={"data": traces, "layout": layout} if traces else None,
        missing="no evaluation before or after training is in summary.json",
        over_steps=False,
    )


_COLOURS = {"before": "c8", "after": "c1"}


def _ks(traces: list[dict[str, Any]]) -> list[int]:
    return sorted({k for trace in traces for k in trace["x"]})


def _curve(when: str, values: Mapping[str, Measured], colour: str) -> dict[str, Any]:
    points = sorted((int(m[5:]), v) for m, v in values.items() if m.startswith("pass@") and m[5:].isdigit())
    up = [v.high - v.value if v.high is not None else None for _, v in points]
    down = [v.value - v.low if v.low is not None else None for _, v in points]
    spread = {"type": "data", "symmetric": False, "array": numbers(up), "arrayminus": numbers(down), "color": colour}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [k for k, _ in points],
        "y": numbers(v.value for _, v in points),
        "error_y": {**spread, "thickness": 1},
        "name": when,
        "line": {"color": colour, "width": 1.8},
        "marker": {"color": colour, "size": 6},
    }
