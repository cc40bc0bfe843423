"""What a person sees while a run goes on: one line, some completions, and the table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from rl.dynamics import Histogram


class Progress:
    """One line a step: step, reward, mean entropy, completion length, tokens/s, ETA. No other number competes.

    On a terminal the line is rewritten in place; into a file, one line every ``every`` steps is printed.
    """

    def __init__(self, total_steps: int, every: int = 10):
        self.total, self.every = total_steps, every
        self._start, self._first = time.perf_counter(), None

    def __call__(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        if self._first is None:  # the first step warms caches up; it would spoil the estimate
            self._start, self._first = time.perf_counter(), step
        done = step - self._first
        left = (time.perf_counter() - self._start) / done * (self.total - step) if done else None
        line = (
            f"step {step:>4}/{self.total}  reward {metrics.get('reward/mean', float('nan')):.3f}"
            f"  H {metrics.get('entropy/mean', float('nan')):.3f}  len {metrics.get('rollout/len', float('nan')):.1f}"
            f"  {metrics.get('time/tokens_per_second', 0):,.0f} tok/s  ETA {clock(left)}"
        )
        last = step == self.total
        if sys.stdout.isatty():
            print(f"\r\x1b[K{line}", end="\n" if last else "", flush=True)
        elif last or step == 1 or step % self.every == 0:
            print(line, flush=True)


def clock(seconds: float | None) -> str:
    """``1:05`` or ``2:03:04``."""
    if seconds is None:
        return "--"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def show_sample(step: int, rows: Sequence[Mapping]) -> None:
    """A few recorded completions with their rewards."""
    if not rows:
        return
    table = Table(title=f"completions at step {step}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("reward", "mean H", "prompt", "completion"):
        table.add_column(column, overflow="ellipsis", no_wrap=True, max_width=60)
    for row in rows:
        entropy = sum(row["entropy"]) / max(1, len(row["entropy"]))
        # a completion is the model's text: no markup, emoji name or control character in it may be interpreted
        table.add_row(f"{row['reward']:.2f}", f"{entropy:.2f}", _plain(row["prompt"]), _plain(row["completion"]))
    print()
    Console(highlight=False, markup=False, emoji=False).print(table)


def _plain(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# metric -> what the table calls it
ROWS = {
    "greedy": "greedy",
    "strict/pass@1": "pass@1, strict",
    "entropy/mean": "mean token entropy, nats",
    "entropy/top20_mean": "top 20 % token entropy, nats",
    "distinct": "distinct answers",
    "len": "completion length, tokens",
    "truncated": "truncated",
    "extracted": "with an answer",
}


def show_table(before: Mapping[str, float] | None, after: Mapping[str, float] | None, title: str) -> None:
    """Before -> after on held-out problems; either may be missing."""
    have = after or before or {}
    names = [n for n in have if n.startswith(("pass@", "maj@")) and "/" not in n]
    table = Table(title=title, title_justify="left")
    table.add_column("")
    columns = [(label, values) for label, values in (("before", before), ("after", after)) if values]
    for label, _ in columns:
        table.add_column(label, justify="right")
    for name in [*names, *ROWS]:
        if name in have:
            cells = [f"{values[name]:.3f}{_interval(values, name)}" for _, values in columns]
            table.add_row(ROWS.get(name, name), *cells)
    Console(highlight=False, markup=False, emoji=False).print(table)


def _interval(values: Mapping[str, float], name: str) -> str:
    low, high = values.get(f"{name}/low"), values.get(f"{name}/high")
    return "" if low is None else f"  ({low:.2f} to {high:.2f})"
