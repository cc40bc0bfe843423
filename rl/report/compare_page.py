"""The page of ``entrl compare --html``."""

from __future__ import annotations

from pathlib import Path

from rl.report.compare_charts import charts, style
from rl.report.compare_terminal import PROBLEMS, SEEDS, cell, problem_words, seed_words
from rl.report.compared import Comparison, Pair
from rl.report.page import write_page

# (name of the chart, heading, what to look for)
_CHARTS = (
    ("reward", "Training reward", "Higher, and sooner, is better; a curve that bends down has lost what it had."),
    ("entropy", "Entropy of all tokens", "A curve near 0 has stopped exploring; where it goes while the reward still rises is the method's price."),
    ("consumed", "Reward against entropy consumed", "Further up at the same x: more reward bought with the same entropy. A dot at 0: nothing consumed."),
    ("pass_at", "pass@k on held-out problems", "Where curves cross, the method that was behind solves more problems with k tries. Below the dotted line at large k: problems were lost."),
    ("seeds", "pass@1, every run a dot", "Methods whose dots mingle are not told apart by these seeds; the tests are below."),
    ("top20", "Entropy of the top 20 % of tokens", "The forking tokens: flat is exploration kept where decisions are made."),
)  # fmt: skip


def write_comparison(comparison: Comparison, out: Path) -> Path:
    """Write the page.

    Raises:
        ReportError: it cannot be written, or would be too large.
    """
    drawn = charts(comparison)
    results = comparison.results
    letters = [result.letter for result in results]
    context = {
        "title": f"{len(results)} methods compared" if len(results) > 1 else f"{results[0].method.label}, its runs",
        "runs": sum(len(result.method.runs) for result in results),
        "results": results,
        "swatches": [_swatch(i) for i in range(len(results))],
        "keys": list(results[0].method.settings),
        "names": comparison.names,
        "cells": [[cell(r.cells.get(name), len(r.used)) for name in comparison.names] for r in results],
        "values": [[r.cells[name].value if name in r.cells else "" for name in comparison.names] for r in results],
        "problem_columns": PROBLEMS,
        "seed_columns": SEEDS,
        "problem_rows": [_row(pair, letters, problem_words(pair)) for pair in comparison.pairs if pair.difference],
        "seed_rows": [
            _row(pair, letters, seed_words(pair)) for pair in comparison.pairs if pair.improvement or pair.seeds_test
        ],
        "notes": comparison.notes,
        "charts_shown": [chart for chart in _CHARTS if chart[0] in drawn],
    }
    return write_page(out, "compare.html.j2", context, {"charts": drawn}, charts=True)


def _swatch(i: int) -> dict[str, str]:
    line = style(i)
    dashes = {"solid": "none", "dash": "8 4", "dot": "2 3", "dashdot": "8 3 2 3"}
    return {"colour": line["color"], "dashes": dashes[line["dash"]]}


def _row(pair: Pair, letters: list[str], words: list[str]) -> dict:
    return {
        "a": letters.index(pair.a),
        "b": letters.index(pair.b),
        "words": [f"{pair.b} - {pair.a}", *words],
    }
