"""Which charts a run's report has, what each of them is for, and why one is missing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from rl.report import law, ledger
from rl.report.charts import (
    COLOURS,
    Chart,
    finite,
    heat_map,
    line,
    lines,
    over_steps,
    quantiles,
    with_marks,
)
from rl.report.facts import names
from rl.report.reading import Run
from rl.report.series import COMPLETIONS, COST, ENTROPY, FROM_0, NATS, REWARD, SHARE, UNSEEN, UPDATE, Plain


@dataclass(frozen=True)
class Section:
    """Charts that answer one question."""

    title: str
    charts: Sequence[Chart]

    @property
    def shown(self) -> list[Chart]:
        return [chart for chart in self.charts if chart.figure is not None]

    @property
    def missing(self) -> list[Chart]:
        return [chart for chart in self.charts if chart.figure is None]


def sections(run: Run, alarms: Sequence[int] = ()) -> list[Section]:
    """All charts of a run. Args: alarms: the steps that are marked in each chart over the steps."""
    frame = run.metrics
    if "rollout/zero_std_groups" in frame:
        frame = frame.assign(**{"live groups": 1 - frame["rollout/zero_std_groups"]})
    found = {
        "Reward": [
            _reward(frame, names(run.config, "reward")),
            *_plain(frame, REWARD),
            law.law(frame),
            law.forecast(frame),
        ],
        "Entropy": [_ribbon(run), _heat(run), *_plain(frame, ENTROPY)],
        "What the methods did": [*_methods(frame), _ledger(frame)],
        "Completions": [*_plain(frame, COMPLETIONS)],
        "The update": [*_plain(frame, UPDATE)],
        "Time and memory": [*_plain(frame, COST)],
    }
    known = {column for charts in found.values() for chart in charts for column in chart.series} | UNSEEN
    found["Every other series"] = [*_others(frame, [c for c in frame if c not in known], "other")]
    return [
        Section(title, [_over_the_run(chart, frame.index, alarms) for chart in charts])
        for title, charts in found.items()
        if charts
    ]


def _plain(frame: pd.DataFrame, table: Sequence[Plain]) -> Iterator[Chart]:
    for name, title, look, labels, axis, missing in table:
        yield Chart(name, title, look, lines(frame, labels, axis), missing, tuple(labels))


def _over_the_run(chart: Chart, steps: Sequence[int], alarms: Sequence[int]) -> Chart:
    """The chart over all steps of the run, also where its series begin late or end early, with the alarms."""
    if chart.figure is None or not chart.over_steps:
        return chart
    figure = with_marks(chart.figure, alarms)
    if steps[0] < steps[-1]:
        figure["layout"]["xaxis"]["range"] = [int(steps[0]), int(steps[-1])]
    return replace(chart, figure=figure)


def _reward(frame: pd.DataFrame, functions: Sequence[str]) -> Chart:
    """All rewards together, and each reward function; what these log besides, as reward/unparsed, is no reward."""
    own = {f"reward/{name}": name for name in functions if f"reward/{name}" in frame}
    labels = {"reward/mean": "all together", **own}
    if len(own) == 1 and np.allclose(frame[[*own]].squeeze(1), frame.get("reward/mean", np.nan), equal_nan=True):
        labels = own
    look = "Rises and levels off. One that rises while pass@1 on held-out problems does not is being gamed."
    figure = lines(frame, labels)
    return Chart("reward", "Mean reward", look, figure, "no step has a reward", ("reward/mean", *own), wide=True)


def _ribbon(run: Run) -> Chart:
    series = ("entropy/mean",)
    mean = finite(run.metrics, "entropy/mean")
    traces = []
    if "entropy/hist" in run.histograms:
        table = quantiles(run.histograms["entropy/hist"])
        low, middle, high = (table[share] for share in table)
        edge = {"line": {"color": "c1/0.35", "width": 1}, "meta": {"smooth": "only"}}
        if len(table):
            traces = [
                line(low, "5th percentile", "c1", **edge),
                line(high, "95th percentile", "c1", **edge, fill="tonexty", fillcolor="c1/0.12"),
                line(middle, "median", "c3"),
            ]
    if len(mean):
        traces.append(line(mean, "mean", "c1"))
    look = (
        "Per token, in nats. A mean near 0 with a high 95th percentile is healthy: sure of most tokens, torn at a few."
    )
    figure = over_steps(traces, NATS) if traces else None
    return Chart("entropy", "Entropy of the tokens", look, figure, "no step has entropy/mean", series, wide=True)


def _heat(run: Run) -> Chart:
    histogram = run.histograms.get("entropy/hist")
    look = "Every token of every step, log scale. The bottom row is certain tokens, the band at the top forks. Watch the band fade, sink or hold."
    figure = heat_map(histogram) if histogram is not None else None
    return Chart("entropy_map", "Where the tokens are", look, figure, "the run logged no entropy/hist", wide=True)


def _named(plugin: str, series: Sequence[str]) -> str:
    return f"{plugin} (shadow)" if any(c.startswith(f"shadow/{plugin}/") for c in series) else plugin


def _methods(frame: pd.DataFrame) -> Iterator[Chart]:
    """The audit of all plug-ins, then what each logs by itself, shadows beside the others."""
    own = [c for c in frame if c.startswith(("plugin/", "shadow/"))]
    audits = (
        ("touched", "Tokens touched", "Share of the tokens that each method changed. 0: it did nothing."),
        (
            "adv_mass",
            "Advantage mass left",
            "Sum of |advantage| after each method, over before it. 100 %: it moved, but took nothing.",
        ),
    )
    for key, title, look in audits:
        audited = [c for c in own if c.startswith("plugin/") and c.endswith(f"/{key}")]
        labels = {c: _named(c.split("/")[1], own) for c in audited}
        yield Chart(key, title, look, lines(frame, labels, SHARE), "the run has no plug-in", tuple(labels))
    shadows = {c: " ".join(c.split("/")[1:]) for c in own if c.startswith("shadow/")}
    look = "What a method that only watched would have done, against what was done: 1 the same, 0 nothing in common."
    yield Chart("shadows", "Shadows", look, lines(frame, shadows, FROM_0), "no method ran as a shadow", tuple(shadows))
    names = dict.fromkeys(c.split("/")[1] for c in own if c.startswith("plugin/"))
    for name in names:
        rest = [c for c in own if c.startswith(f"plugin/{name}/") and not c.endswith(("/touched", "/adv_mass"))]
        yield from _others(frame, rest, name, f"plugin/{name}/")


def _others(frame: pd.DataFrame, columns: Sequence[str], name: str, prefix: str = "") -> Iterator[Chart]:
    """Series that nothing is known of: those of one kind and of like size share a chart."""
    groups: dict[tuple, list[str]] = {}
    for column in columns:
        values = finite(frame, column)
        if len(values):
            size = math.floor(math.log10(max(float(values.abs().max()), 1e-12)))
            groups.setdefault((column.rpartition("/")[0], max(size, -1) if size < 1 else size), []).append(column)
    number = 0
    for (kind, _), of_group in groups.items():
        for start in range(0, len(of_group), 4):
            labels = {c: c.removeprefix(prefix or f"{kind}/") for c in of_group[start : start + 4]}
            title = (
                f"{name}: {', '.join(labels.values())}"
                if prefix
                else f"{kind}/ {', '.join(labels.values())}".strip("/ ")
            )
            look = f"What {name} logs by itself; its docstring says what it is." if prefix else "See docs/metrics.md."
            number += 1
            yield Chart(f"others_{name}_{number}", title, look, lines(frame, labels), series=tuple(labels))


def _ledger(frame: pd.DataFrame) -> Chart:
    series = ("entropy/predicted_change", "entropy/measured_change")
    title, look = (
        "Entropy: predicted against measured",
        "Sums of the changes so far, on two axes. Two falling lines look alike in any case; the numbers say more.",
    )
    both = ledger.pairs(frame)
    if len(both) < 2:
        return Chart(
            "ledger", title, look, None, "it needs entropy/predicted_change and the next step's entropy", series
        )
    sums = both.cumsum()
    layout = {
        "yaxis2": {
            "overlaying": "y",
            "side": "right",
            "title": {"text": "predicted"},
            "showgrid": False,
            "exponentformat": "power",
            "tickmode": "auto",
            "nticks": 5,
        }
    }
    traces = [
        line(sums["measured"], "measured, left axis", COLOURS[0], smooth=False),
        line(sums["predicted"], "predicted, right axis", COLOURS[1], smooth=False, yaxis="y2"),
    ]
    return Chart(
        "ledger",
        title,
        look,
        over_steps(traces, {"title": {"text": "nats"}}, **layout),
        series=series,
        wide=True,
        note=ledger.in_words(ledger.judge(frame)),
    )
