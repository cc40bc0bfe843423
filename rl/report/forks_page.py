"""The page of a fork browser: a completion, its decisions, and what each of them is worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl.report.charts import band
from rl.report.page import numbers, write_page
from rl.report.text import short, visible, word

_TEXT = 1500  # characters of a continuation or a prompt; the middle of a longer one is left out
_SUCCESS = {
    "correct": "is correct",
    "majority": "gives the most frequent answer",
    "unknown": "is right, which is unknown here: no answer was found in what the model wrote",
}


def write_forks(report: Mapping[str, Any], out: Path) -> Path:
    """Render what :func:`rl.study.forks.as_json` made into the file ``out``.

    Raises:
        ReportError: the file cannot be written.
    """
    context = {
        "title": f"Forks: {visible(report['model'])}",
        "report": report,
        "prompt": short(report["prompt"], _TEXT, lines=True),
        "majority": None if report["majority"] is None else visible(report["majority"]),
        "success": _SUCCESS[report["measure"]],
        "decoding": _decoding(report["decoding"]),
    }
    data = {"forks": _for_page(report), "charts": {"value": value_chart(report)}}
    return write_page(out, "forks.html.j2", context, data, charts=True)


def value_chart(report: Mapping[str, Any]) -> dict[str, Any]:
    """V(prefix) along the completion, before and behind each fork, as a figure."""
    points = [(0, report["start"], "the prompt")]
    for number, fork in enumerate(report["forks"], start=1):
        points.append((fork["place"], fork["value"], f"before fork {number}"))
        taken = next(b for b in fork["branches"] if b["taken"])
        points.append((fork["place"] + 1, taken["value"], f"after {_plain(word(taken['text']))} at fork {number}"))
    if report["right"] is not None:
        outcome = float(report["right"])
        points.append((len(report["tokens"]), {"value": outcome, "low": outcome, "high": outcome}, "the end"))
    x = [place for place, _, _ in points]
    value, low, high = (numbers(p[1][name] for p in points) for name in ("value", "low", "high"))
    area = band(x, low, high, "c1", name="95 %, each point for itself")
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": x,
        "y": value,
        "text": [text for _, _, text in points],
        "hovertemplate": "%{text}: %{y:.2f}<extra></extra>",
        "line": {"color": "c1", "width": 2},
        "marker": {"size": 7},
        "name": "V(prefix)",
    }
    count = len(report["tokens"])
    axis = {"title": {"text": "tokens of the completion so far"}, "range": [-0.3, count + 0.3], "zeroline": False}
    if count <= 40:  # the words themselves fit below the axis
        axis |= {
            "tickvals": [i + 0.5 for i in range(count)],
            "ticktext": [_tick(t) for t in report["tokens"]],
            "tickangle": 0,
        }
        axis |= {"title": {"text": ""}}
    layout = {
        "xaxis": axis,
        "yaxis": {"range": [-0.03, 1.03], "title": {"text": "value"}, "zeroline": False},
        "hovermode": "closest",
    }
    return {"data": [area, line], "layout": layout}


def _tick(token: str) -> str:
    text = visible(token.strip()) or "␣"
    return _plain(text if len(text) <= 8 else text[:7] + "…")


def _plain(text: str) -> str:
    """For Plotly, which reads a little HTML in its texts."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _for_page(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's script draws, every text made harmless and short."""
    forks = [{**fork, "branches": [_branch(b) for b in fork["branches"]]} for fork in report["forks"]]
    return {
        "tokens": [visible(t, lines=True) for t in report["tokens"]],
        "entropy": numbers(report["entropy"]),
        "measure": report["measure"],
        "forks": forks,
    }


def _branch(branch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **branch,
        "text": "all other words" if branch["token"] is None else word(branch["text"]),
        "answers": [[None if a is None else short(a, 120, lines=True), n] for a, n in branch["answers"]],
        "examples": [{**e, "text": short(e["text"], _TEXT, lines=True)} for e in branch["examples"]],
    }


def _decoding(decoding: Mapping[str, Any]) -> str:
    """The temperature, and the filters that are on."""
    off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "typical_p": 1.0}
    on = [f"{name} {decoding[name]:g}" for name, value in off.items() if decoding[name] != value]
    return ", ".join([f"temperature {decoding['temperature']:g}", *on, f"at most {decoding['max_new_tokens']} tokens"])
