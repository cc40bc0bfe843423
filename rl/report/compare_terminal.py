"""A comparison on the terminal, within 100 columns: methods wrap, numbers do not."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rl.report.compared import FEW, Cell, Comparison, Pair, Result

WIDEST = 100
_GAP = 3  # between columns
_PAIRS = 10  # beyond, those with the first method


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print methods, what differs, the measures with intervals, the pairs and the notes."""
    console = console or _console()
    words = [table for table in (_methods(comparison), _settings(comparison)) if table]
    numbers = [*_measures(comparison, console.width), *_pairs(comparison)]
    for table in words:
        console.print(table)
        console.print()
    wide = [Measurement.get(console, console.options.update(max_width=10_000), table).maximum for table in numbers]
    console.width = max(console.width, *wide)  # a number that is cut off is worse than a line that the terminal wraps
    for table in numbers:
        console.print(table)
        console.print()
    for note in comparison.notes:
        console.print(Text(f"note  {note}"))


def _console() -> Console:
    console = Console(highlight=False, markup=False, emoji=False)
    console.width = min(console.width, WIDEST) if sys.stdout.isatty() else WIDEST
    return console


def number(value: float) -> str:
    """Three decimals below 10, fewer above; thousands with commas."""
    if not math.isfinite(value):
        return ""
    size = abs(value)
    return f"{value:.3f}" if size < 10 else f"{value:.1f}" if size < 1000 else f"{value:,.0f}"


def cell(found: Cell | None, used: int) -> str:
    """Value, interval (``p``: over problems), and of how many runs where some lack it."""
    if found is None:
        return ""
    interval = f" [{number(found.low)}, {number(found.high)}]" if found.over else ""
    return f"{number(found.value)}{interval}{'p' if found.over == 'problems' else ''}" + (
        f" ({found.runs} of {used})" if found.runs < used else ""
    )


def p_value(p: float | None, smallest: float = 0.0) -> str:
    """A p-value, or that it is below what can be told."""
    if p is None:
        return ""
    return f"<{smallest * 1.1:.4f}" if 0 < smallest < 0.001 and p <= smallest * 1.0001 else f"{p:.4f}"


def crossing(pair: Pair) -> str:
    """Where the curves of pass@k cross."""
    found = pair.crossover
    if found is None:
        return ""
    if math.isinf(found.k):
        return f"none up to {found.upto}"
    high = f"{found.high:.1f}" if math.isfinite(found.high) else f">{found.upto}"
    return f"{found.overtaker} from k={found.k:.1f} [{found.low:.1f}, {high}]"


def _table(title: str) -> Table:
    return Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title, title_justify="left", title_style="bold"
    )


def _methods(comparison: Comparison) -> Table:
    table = _table("methods")
    table.add_column("")
    table.add_column("", overflow="fold")
    for name in ("runs", "used", "seeds"):
        table.add_column(name, justify="right" if name != "seeds" else "left", overflow="fold")
    for result in comparison.results:
        seeds = ", ".join(map(str, result.method.seeds))
        unfinished = "" if result.finished else " unfinished"
        table.add_row(
            result.letter,
            Text(result.method.label),
            str(len(result.method.runs)),
            f"{len(result.used)}{unfinished}",
            seeds,
        )
    return table


def _settings(comparison: Comparison) -> Table | None:
    """A row a key that differs, and who has which value: any number of methods."""
    keys = list(comparison.results[0].method.settings)
    if not keys:
        return None
    table = _table("configuration: what differs")
    table.show_header = False
    table.add_column("", overflow="fold")
    table.add_column("", overflow="fold")
    for key in keys:
        having: dict[str, list[str]] = {}
        for result in comparison.results:
            having.setdefault(result.method.settings[key], []).append(result.letter)
        table.add_row(
            Text(key), Text("   ".join(f"{', '.join(letters)}: {value}" for value, letters in having.items()))
        )
    return table


def _measures(comparison: Comparison, room: int) -> list[Table]:
    """A column a method, as many beside each other as there is room for."""
    left = room - max(map(len, comparison.names), default=0)
    blocks: list[list[tuple[Result, int]]] = []
    for result in comparison.results:
        width = max([16, *(len(cell(found, len(result.used))) for found in result.cells.values())])
        if not blocks or sum(w + _GAP for _, w in [*blocks[-1], (result, width)]) > left:
            blocks.append([])
        blocks[-1].append((result, width))
    return [_block(comparison.names, block) for block in blocks]


def _block(names: Sequence[str], block: Sequence[tuple[Result, int]]) -> Table:
    table = _table("interquartile mean over seeds [95 %]")
    table.add_column("", no_wrap=True)
    for result, width in block:
        table.add_column(Text(f"{result.letter}  {result.method.label}"), overflow="fold", width=width)
    for name in names:
        table.add_row(name, *(cell(result.cells.get(name), len(result.used)) for result, _ in block))
    return table


def _pairs(comparison: Comparison) -> list[Table]:
    """Over problems, and over seeds where there are several."""
    pairs, more = comparison.pairs, ""
    if len(pairs) > _PAIRS:
        pairs = [pair for pair in pairs if pair.a == comparison.results[0].letter]
        more = f"; {len(pairs)} of {len(comparison.pairs)} pairs, all are in --html and --json"
    kinds = (
        (f"pass@1 over held-out problems, seeds averaged{more}", PROBLEMS, problem_words, lambda p: p.difference),
        (f"pass@1 over seeds{more}", SEEDS, seed_words, lambda p: p.improvement or p.seeds_test),
    )
    tables = []
    for title, columns, words, known in kinds:
        if any(known(pair) for pair in pairs):
            table = _table(title)
            for name in ("", *columns):
                table.add_column(name, no_wrap=True)
            for pair in filter(known, pairs):
                table.add_row(f"{pair.b} - {pair.a}", *words(pair))
            tables.append(table)
    return tables


PROBLEMS = ("problems", "difference", "p", "p (Holm)", "overtakes in pass@k")
SEEDS = ("P(better)", "shared seeds", "p", "p (Holm)")


def problem_words(pair: Pair) -> list[str]:
    """The columns PROBLEMS of a pair."""
    d, test = pair.difference, pair.test
    if d is None or test is None:
        return [str(pair.problems), "", "", "", ""]
    smallest = 0.0 if test.exact else test.smallest
    difference = f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
    return [str(pair.problems), difference, p_value(test.p, smallest), p_value(pair.holm), crossing(pair)]


def seed_words(pair: Pair) -> list[str]:
    """The columns SEEDS of a pair."""
    better, test = pair.improvement, pair.seeds_test
    probability = f"{better.value:.2f} [{better.low:.2f}, {better.high:.2f}]" if better else ""
    p = f"{p_value(test.p)} (at best {test.smallest:.4f})" if test else f"needs {FEW} seeds"
    return [probability, str(len(pair.seeds)), p, p_value(pair.seeds_holm)]
