"""From what a person names to the runs in it: run folders, sweeps, folders of runs, W&B projects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rl.errors import ReportError
from rl.report.reading import Run, read_run
from rl.wandb_run import Record

_ASIDE = re.compile(r".*\.old-\d+")  # moved there by run.overwrite=true
_DEEPEST = 3  # runs/, a sweep in it, a run in that


def gather(targets: Sequence[str]) -> tuple[list[Run], list[str]]:
    """All runs that the targets name, each once, and notes about what was left out.

    Raises:
        ReportError: a target that is not there or has no run in it, a named run that cannot be read, or no run that has begun.
    """
    runs: dict[str, Run] = {}
    notes: list[str] = []
    for target in targets:
        read = _fetch(target) if target.startswith("wandb:") else _read(Path(target).expanduser(), notes)
        found = {_identity(run): run for run in read}
        twice = len(read) - len(found.keys() - runs.keys())
        if twice:
            notes.append(
                f"{target}: {twice} of its runs {'was' if twice == 1 else 'were'} named before and counted once."
            )
        runs |= {key: run for key, run in found.items() if key not in runs}
    begun = [run for run in runs.values() if len(run.metrics) or run.summary]
    if len(begun) < len(runs):
        notes.append(f"{_count(len(runs) - len(begun), 'run')} left out: no step yet.")
    if not begun:
        raise ReportError(f"{' '.join(targets)}: no run there has made a step yet. Nothing can be compared.")
    torn = sum(run.torn for run in begun)
    if torn:
        names = ", ".join(run.name for run in begun if run.torn)
        notes.append(f"{_count(torn, 'line')} of metrics.jsonl cut off by a kill and left out: {names}.")
    return begun, notes


def _fetch(target: str) -> list[Run]:
    from rl.report.wandb_runs import fetch

    return fetch(target)


def _identity(run: Run) -> str:
    """W&B's id of a run where it has one, else its folder: a run read from both, or a copied folder, is one run."""
    if "wandb" in run.manifest:
        return run.manifest["wandb"]["id"]
    try:
        record = Record.load(run.folder)
    except (ValueError, TypeError):  # cut off, or of a later entrl
        record = None
    return record.id if record else str(run.folder)


def _read(folder: Path, notes: list[str]) -> list[Run]:
    if (folder / "config.yaml").is_file():
        return [read_run(folder)]
    if not folder.is_dir():
        raise ReportError(f"{folder} is not there. Give run folders, sweeps or folders of them, as runs/NAME.")
    places, aside = _inside(folder, 1)
    if aside:
        notes.append(f"{folder}: {_count(aside, 'run')} moved aside (.old-<n>) left out; name one to compare it.")
    if (folder / "sweep.jsonl").is_file():
        points = len((folder / "sweep.jsonl").read_text(encoding="utf-8").splitlines())
        if points > len(places):
            notes.append(f"{folder}: {points - len(places)} of its {points} points have no run folder yet.")
    runs = []
    for place in places:
        try:
            runs.append(read_run(place))
        except ReportError as error:
            notes.append(f"left out: {error}")
    if not runs:
        raise ReportError(
            f"{folder} has no run in it that can be read. Expected folders that entrl train wrote, as {folder}/NAME."
            + "".join(f" {note}" for note in notes if note.startswith("left out"))
        )
    return runs


def _inside(folder: Path, depth: int) -> tuple[list[Path], int]:
    """Run folders below a folder, by name, and how many were moved aside."""
    found, aside = [], 0
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if (inner / "config.yaml").is_file():
            if _ASIDE.fullmatch(inner.name):
                aside += 1
            else:
                found.append(inner)
        elif depth < _DEEPEST:
            deeper, more = _inside(inner, depth + 1)
            found, aside = found + deeper, aside + more
    return found, aside


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
