"""A model's passport as a page, and as a block of Markdown for its model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl.report.charts import axes, band
from rl.report.page import numbers, write_page
from rl.report.text import word as shown_token


def write_passport(out: Path, found: Mapping[str, Any]) -> Path:
    """Write the page of what :func:`rl.study.passport.passport` found."""
    words = [
        {**word, "shown": shown_token(word["token"]), "bar": round(100 * word["mean"] / found["forking"][0]["mean"], 1)}
        for word in found["forking"]
    ]
    context = {
        "title": f"Entropy passport of {found['model']}",
        "found": found,
        "words": words,
        "half": (len(words) + 1) // 2,
    }
    return write_page(out, "passport.html.j2", context, {"charts": _charts(found)}, charts=True)


def card(found: Mapping[str, Any]) -> str:
    """A block for the model card, in Markdown."""
    entropy, geometry, curve = found["entropy"], found["geometry"], found["pass_at_k"]
    top20, ks = (
        entropy["share_of_top"][20],
        sorted({1, *(k for k in (2, 4, 8, 16, 32, 64, 128) if k < len(curve)), len(curve)}),
    )
    rows = {
        "tokens sampled": f"{found['tokens']:,} ({found['problems']} problems of {found['data']} x {found['samples']}, temperature {found['temperature']:g})",
        "token entropy, nats": f"mean {entropy['mean']:.3f}, p50 {entropy['p50']:.3f}, p80 {entropy['p80']:.3f}, p95 {entropy['p95']:.3f}",
        "entropy held by the top 20 % tokens": f"{top20:.0%}",
        "sampled token is the most likely one": f"{found['ranks']['1']:.1%}",
        "pass@k": ", ".join(f"{curve[k - 1]['value']:.3f} (k={k})" for k in ks),
        "completion length, tokens": f"{found['len']:.1f}, {found['truncated']:.1%} truncated",
        "last hidden states": f"RankMe {_number(geometry['rankme'])} of {geometry['dimensions']}, alpha-ReQ {_number(geometry['alpha'])} ({geometry['states']} prompts)",
        "forking vocabulary": ", ".join(
            f"`{shown_token(word['token']).replace('`', '´')}`" for word in found["forking"][:12]
        ),
    }
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["## Entropy passport", "", "| | |", "|---|---|", *lines, "", "Made by `entrl passport`."]) + "\n"


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2f}"


def _charts(found: Mapping[str, Any]) -> dict[str, Any]:
    entropy, ranks, curve, values = (
        found["entropy"],
        found["ranks"],
        found["pass_at_k"],
        found["geometry"]["eigenvalues"],
    )
    edges, counts = entropy["histogram"]["edges"], entropy["histogram"]["counts"]
    width = math.log10(edges[2] / edges[1])
    middles = [
        math.log10(edges[1]) + width * (i - 0.5) for i in range(len(counts))
    ]  # the first bin, from 0, is as wide as the others
    shares = numbers(100 * c / max(1, found["tokens"]) for c in counts)
    names = [f"{a:.3g} to {b:.3g} nats" for a, b in zip(edges, edges[1:], strict=False)]
    ks = [point["k"] for point in curve]
    bounds = {bound: numbers(point[bound] for point in curve) for bound in ("value", "low", "high")}
    area = band(ks, bounds["low"], bounds["high"], "c3", name="95 %")
    rank_of = list(range(1, len(values) + 1))
    return {
        "histogram": {
            "data": [{"type": "bar", "x": numbers(middles), "y": shares, "customdata": names, "hovertemplate": "%{customdata}: %{y} %<extra></extra>", "marker": {"color": "c1"}, "width": 0.85 * width}],
            "layout": axes("entropy, nats", "% of tokens", x={"tickvals": [-4, -3, -2, -1, 0, 1], "ticktext": ["0.0001", "0.001", "0.01", "0.1", "1", "10"]}) | {"hovermode": "closest", "showlegend": False},
        },
        "lorenz": {
            "data": [
                {"type": "scatter", "x": list(range(101)), "y": numbers(100 * s for s in entropy["share_of_top"]), "line": {"color": "c2"}, "name": "this model"},
                {"type": "scatter", "x": [0, 100], "y": [0, 100], "line": {"color": "muted", "dash": "dot"}, "name": "all tokens alike", "hoverinfo": "skip"},
            ],
            "layout": axes("% most uncertain tokens", "% of all entropy"),
        },
        "ranks": {
            "data": [{"type": "bar", "x": list(ranks), "y": numbers(100 * share for share in ranks.values()), "marker": {"color": "c4"}, "hovertemplate": "rank %{x}: %{y} %<extra></extra>"}],
            "layout": axes("rank of the sampled token", "% of tokens (log)", x={"type": "category"}, y={"type": "log"}) | {"hovermode": "closest", "showlegend": False},
        },
        "pass": {
            "data": [area, {"type": "scatter", "x": ks, "y": bounds["value"], "line": {"color": "c3"}, "name": "pass@k"}],
            "layout": axes("k", "pass@k", x={"type": "log", "tickvals": ks if len(ks) <= 4 else [k for k in ks if k & (k - 1) == 0]}, y={"range": [0, 1.02]}) | {"hovermode": "closest"},
        },
        "spectrum": {
            "data": [{"type": "scatter", "mode": "lines+markers", "x": rank_of, "y": numbers(values), "line": {"color": "c7"}, "marker": {"size": 4}, "name": "eigenvalue"}],
            "layout": axes("number of the eigenvalue", "eigenvalue", x={"type": "log"}, y={"type": "log", "exponentformat": "power"}) | {"showlegend": False},
        },
    }  # fmt: skip
