"""Forks in a terminal: the completion with its places marked, and a table of their branches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from rl.report.text import short, visible, word

_WIDTH = 160  # characters of a text in a line
_NAMES = {"correct": "correct", "majority": "with the majority's answer", "unknown": "of unknown value"}


def print_forks(report: Mapping[str, Any]) -> None:
    """Print what :func:`rl.study.forks.as_json` made."""
    right, wrong = ("the majority's", "not the majority's") if report["majority"] is not None else ("right", "wrong")
    said = {True: right, False: wrong, None: "not graded"}[report["right"]]
    print(f"\n{report['model']}, {report['problem']}")
    print(f"prompt      {short(report['prompt'], _WIDTH)}")
    print(f"completion  {_marked(report)}   ({said}{', truncated' if report['truncated'] else ''})")
    if report["majority"] is not None:
        print(
            f"majority    {short(report['majority'], _WIDTH)}, the most frequent answer of {report['samples']} completions; it need not be right"
        )
    print(
        f"value       {_interval(report['start'])} of {report['samples']} completions of the prompt are {_NAMES[report['measure']]}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("place", "left"),
        ("nats", "right"),
        ("word", "left"),
        ("prob", "right"),
        ("value (95 %)", "left"),
        ("gain (95 %)", "left"),
        ("answers", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)
    for number, fork in enumerate(report["forks"], start=1):
        table.add_row(
            f"[{number}] token {fork['place']}",
            f"{fork['entropy']:.2f}",
            "any",
            "1",
            _interval(fork["value"]),
            "",
            "",
            style="bold",
        )
        for b in fork["branches"]:
            text = "all others" if b["token"] is None else word(b["text"])
            value = _number(b["value"]["value"]) + " (ends here)" if b["over"] else _interval(b["value"])
            marked = f"> {text}" if b["taken"] else f"  {text}"
            table.add_row("", "", marked, _share(b["prob"]), value, _interval(b["gain"], "+"), str(b["distinct"]))
        table.add_section()
    console = Console(highlight=False, markup=False, emoji=False)
    # a number that is cut off is worse than a line that wraps
    console.width = max(
        console.width, Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    )
    print()
    console.print(table)
    print(
        "\n> taken. Value: share of continuations that succeed. Gain: value of the word - value of its place. Each interval is for itself."
    )


def _marked(report: Mapping[str, Any]) -> str:
    """The completion with the number of each fork before its word."""
    numbers = {fork["place"]: i for i, fork in enumerate(report["forks"], start=1)}
    texts = [visible(text) for text in report["tokens"]]
    marks = {place: f"[{number}]" for place, number in numbers.items()}
    spaces = [len(text) - len(text.lstrip(" ")) for text in texts]
    return "".join(t[:n] + marks.get(i, "") + t[n:] for i, (t, n) in enumerate(zip(texts, spaces, strict=True)))


def _number(value: float | None, sign: str = "") -> str:
    return "?" if value is None else f"{round(value, 2) + 0.0:{sign}.2f}"  # + 0.0: never -0.00


def _interval(estimate: Mapping[str, float | None], sign: str = "") -> str:
    value, low, high = (_number(estimate[name], sign) for name in ("value", "low", "high"))
    return value if estimate["value"] is None else f"{value} ({low} to {high})"


def _share(prob: float) -> str:
    return f"{prob:.3f}" if prob >= 0.001 else "<0.001"
