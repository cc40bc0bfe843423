"""What a person sees of an evaluation: the prompt and the extractor first, one line while it draws, a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from rl.callbacks.progress import clock
from rl.draw import Drawn

_EVERY = 30  # seconds between lines into a file


def show_problems(
    name: str, count: int, prompt: str, answers: Callable, strict_answers: Callable | None, width: int = 160
) -> None:
    """The first prompt as the model sees it, and what finds the answers: where evaluations disagree, it is mostly one of the two."""
    shown = "".join(c if c.isprintable() else "?" for c in prompt.replace("\n", "\\n"))
    if len(shown) > width:
        shown = f"{shown[: width // 2]} ... {shown[-width // 2 :]}"
    strict = f"; strict: {_function(strict_answers)}" if strict_answers else ""
    print(f"set       {name}, {count:,} problems")
    print(f"prompt    {shown}")
    print(f"answers   {_function(answers)}{strict}")


def _function(fn: Callable[..., Any]) -> str:
    """``module.name(key=value)`` of a function, whether or not arguments are bound to it."""
    bound = fn.keywords if isinstance(fn, partial) else {}
    inner = fn.func if isinstance(fn, partial) else fn
    name = getattr(inner, "__qualname__", type(inner).__name__)
    arguments = ", ".join(f"{k}={v}" for k, v in bound.items())
    return f"{inner.__module__}.{name}({arguments})" if arguments else f"{inner.__module__}.{name}"


class Drawing:
    """The progress of one drawing in one line: batches, samples, tokens/s, ETA.

    On a terminal the line is rewritten in place; into a file, one is printed every half minute, so none of a short drawing.
    """

    def __init__(self, name: str):
        self.name, self.samples, self.tokens = name, 0, 0
        self._start = self._last = self._printed = time.perf_counter()
        self._found, self._before = 0, (0, 0)

    def __call__(self, drawn: Drawn) -> None:
        now = time.perf_counter()
        if drawn.first:  # the next drawing: greedy ones come after the samples
            self._start, self._found, self._before = self._last, 0, (self.samples, self.tokens)
        if drawn.samples == 0:  # found on disk: that says nothing about what is left
            self._start, self._found = now, drawn.batches
        self._last = now
        self.samples, self.tokens = self._before[0] + drawn.samples, self._before[1] + drawn.tokens
        seconds = now - self._start
        fresh = drawn.batches - self._found
        left = seconds / fresh * (drawn.of - drawn.batches) if fresh else None
        speed = drawn.tokens / seconds if seconds else 0.0
        line = f"{self.name}  batch {drawn.batches}/{drawn.of}  {speed:,.0f} tok/s  ETA {clock(left)}"
        if sys.stdout.isatty():
            last = drawn.batches == drawn.of
            print("\r\x1b[K" if last else f"\r\x1b[K{line}", end="", flush=True)
        elif now - self._printed >= _EVERY:
            self._printed = now
            print(line, flush=True)

    def summary(self, seconds: float) -> str:
        """What was drawn now, and how fast, grading included."""
        if not self.samples:
            return "nothing new"
        return f"{self.samples:,} samples, {self.tokens / seconds:,.0f} tokens/s, in {clock(seconds)}"


def show_sets(metrics: Mapping[str, Mapping[str, float]], counts: Mapping[str, int], title: str) -> None:
    """One row a set: pass@k, maj@k, greedy, strict pass@1, extracted, truncated, length; pass@1 with its interval."""
    names = [n for m in metrics.values() for n in m if n.startswith(("pass@", "maj@")) and not n.endswith(_ENDS)]
    rest = ["greedy", "strict/pass@1", "extracted", "truncated", "len"]
    columns = [n for n in dict.fromkeys([*names, *rest]) if any(n in m for m in metrics.values())]
    first = columns[0]
    rows = [
        [name, f"{counts[name]:,}", *(_cell(m, column, column == first) for column in columns)]
        for name, m in metrics.items()
    ]
    _print(title, ["", "problems", *columns], rows)


def show_tasks(metrics: Mapping[str, float], title: str) -> None:
    """One row a metric, by the name that another harness gave it."""
    _print(title, ["metric", "value"], [[name, f"{value:.4f}"] for name, value in metrics.items()])


_ENDS = ("/low", "/high")


def _cell(metrics: Mapping[str, float], name: str, interval: bool) -> str:
    if name not in metrics:
        return ""
    if name == "len":
        return f"{metrics[name]:.0f}"
    between = f" ({metrics[f'{name}/low']:.3f} to {metrics[f'{name}/high']:.3f})" if interval else ""
    return f"{metrics[name]:.3f}{between}"


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=True, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False, emoji=False)
    # a number that is cut off is worse than a line that wraps
    wide = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.width = max(console.width, wide)
    print(f"\n{title}")
    console.print(table)
