"""What a person sees while the points of a sweep run on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live

from rl.callbacks.progress import clock
from rl.sweep.local import Ended, Running
from rl.sweep.points import Point
from rl.sweep.read import progress
from rl.sweep.status import counts, standings, table


class Watch:
    """On a terminal a table that is rewritten in place; in a file a line when a point starts and one when it ends."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._live = None
        self._first: dict[int, tuple[int, float]] = {}  # point -> its first step seen here, and when
        self._next, self._stopping = 0.0, False

    def __enter__(self) -> Watch:
        if sys.stdout.isatty():
            console = Console(highlight=False, markup=False, emoji=False)
            self._live = Live(console=console, auto_refresh=False, transient=True).__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self._live is not None:
            self._live.__exit__(*error)

    def started(self, point: Point) -> None:
        """A point starts."""
        if self._live is None:
            print(f"{'start':<9}{point.folder}", flush=True)

    def ended(self, end: Ended, state: str) -> None:
        """A point ended."""
        if self._live is None:
            at = progress(self._folder / end.point.folder)
            numbers = "" if at.step is None else f"  step {at.step}/{end.point.steps or '?'}"
            for name, value in (("reward", at.reward), ("H", at.entropy)):
                numbers += "" if value is None else f"  {name} {value:.3f}"
            print(f"{state:<9}{end.point.folder}{numbers}  {clock(end.seconds)}", flush=True)

    def __call__(self, running: Sequence[Running], stopping: bool) -> None:
        """Show how it stands, at most once a second."""
        if stopping and not self._stopping:
            self._stopping = True
            if self._live is None:
                print(
                    f"stopping {len(running)} points at the end of their step; Ctrl-C again leaves at once", flush=True
                )
        if self._live is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 1.0
        found = standings(self._folder)
        left = {run.point.number: self._left(run) for run in running}
        shown = [s for s in found if s.state == "running"] if len(found) > 30 else found
        board = table(shown, left)
        hint = "stopping; Ctrl-C again leaves at once" if stopping else "Ctrl-C stops all at the end of a step"
        board.caption = f"{counts(found)}; {hint}"
        self._live.update(board, refresh=True)

    def _left(self, run: Running) -> str:
        step = progress(self._folder / run.point.folder).step
        if step is None or run.point.steps is None:
            return ""
        first, since = self._first.setdefault(run.point.number, (step, time.monotonic()))
        if step == first:
            return "--"
        return clock((time.monotonic() - since) / (step - first) * (run.point.steps - step))
