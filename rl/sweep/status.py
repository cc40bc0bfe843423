"""How every point of a sweep stands, told from the run folders, the processes of this machine and Slurm's queue."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from rl import rundir
from rl.errors import ConfigError
from rl.sweep.folder import Processes, find, read_points, read_sweep
from rl.sweep.points import Point
from rl.sweep.read import Progress, progress, reason, summary_value

# failed: says why; stopped: has a checkpoint and goes on; lost: was started, left no word and runs nowhere; new: never started
AGAIN = ("failed", "stopped", "lost", "new")
LIVE = ("running", "waiting")
_ORDER = ("done", "running", "waiting", "stopped", "failed", "lost", "new")
# Slurm's words for a task that will run, or runs, without anyone doing anything
_PENDING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_RUNNING = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "SUSPENDED", "STOPPED"}


class Standing(NamedTuple):
    """How one point stands; ``note`` says why, or which job has it."""

    point: Point
    state: str
    note: str
    progress: Progress
    pass_at_1: float | None


def standings(folder: Path) -> list[Standing]:
    """All points of a sweep.

    Raises:
        ConfigError: Slurm has points of it and does not answer.
    """
    points, sweep = read_points(folder), read_sweep(folder)
    markers = {point.number: rundir.state(folder / point.folder) for point in points}
    finished = all(marker == "done" for marker in markers.values())
    where = {} if finished or not sweep["jobs"] else slurm_tasks(sweep["jobs"])
    processes = Processes(folder)
    alive, launched = processes.points(), processes.launcher() is not None
    elsewhere = processes.elsewhere()
    out = []
    for point in points:
        run = folder / point.folder
        marker = markers[point.number]
        task, word = where.get(point.number, ("", ""))
        if marker == "done":
            state, note = "done", ""
        elif point.number in alive:
            state, note = "running", f"process {alive[point.number]}"
        elif word in _RUNNING or word in _PENDING:
            state, note = "running" if word in _RUNNING else "waiting", f"job {task} {word}"
        elif marker in ("failed", "stopped"):
            state, note = marker, reason(run)
        elif elsewhere:
            state, note = "running", f"perhaps: started on {elsewhere}, which alone can tell"
        elif launched:
            state, note = "waiting", ""
        else:
            begun = (run / "logs").is_dir() or (run / "metrics.jsonl").is_file() or word
            state, note = ("lost", f"no word left{f'; job {task} {word}' if word else ''}") if begun else ("new", "")
        out.append(Standing(point, state, note, progress(run), summary_value(run, "eval.after.pass@1")))
    return out


def slurm_tasks(jobs: Sequence[Mapping]) -> dict[int, tuple[str, str]]:
    """Point -> (task, its state) in the newest job array that has the point; the state is empty where Slurm forgot it."""
    from rl import slurm

    states = slurm.states([job["job"] for job in jobs])
    newest = {number: f"{job['job']}_{number}" for job in jobs for number in job["points"]}
    return {number: (task, states.get(task, "")) for number, task in newest.items()}


def counts(found: Iterable[Standing]) -> str:
    """``3 done, 1 failed``."""
    number = Counter(s.state for s in found)
    return ", ".join(f"{number[state]} {state}" for state in _ORDER if number[state])


def show(folder: Path, found: Sequence[Standing]) -> None:
    """Print the table, the counts, and what to do about points that did not finish."""
    Console(highlight=False, markup=False, emoji=False).print(table(found))
    for s in found:
        if s.state in ("failed", "lost"):
            print(f"{s.state:<9} {folder / s.point.folder}: {s.note}")
    print(f"{folder}: {counts(found)}")
    if any(s.state in AGAIN for s in found):
        print(f"again      entrl sweep retry {folder}")
    if any(s.state in LIVE for s in found):
        print(f"stop       entrl sweep cancel {folder}")


def table(found: Sequence[Standing], left: Mapping[int, str] | None = None) -> Table:
    """A row a point: what varies, how it stands; ``left`` adds the time left of the running ones."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    keys = list(dict.fromkeys(key for s in found for key in s.point.varies))
    out.add_column("", justify="right")
    for key in keys:
        out.add_column(key)
    out.add_column("state")
    for title in ("step", "reward", "H", "pass@1", *(["left"] if left is not None else [])):
        out.add_column(title, justify="right")
    for s in found:
        step = "" if s.progress.step is None else f"{s.progress.step}/{s.point.steps or '?'}"
        numbers = ("" if v is None else f"{v:.3f}" for v in (s.progress.reward, s.progress.entropy, s.pass_at_1))
        time_left = [] if left is None else [left.get(s.point.number, "")]
        out.add_row(
            str(s.point.number), *(s.point.varies.get(key, "") for key in keys), s.state, step, *numbers, *time_left
        )
    return out


def show_status(target: str) -> int:
    """Print how a sweep stands."""
    folder = find(target)
    show(folder, standings(folder))
    return 0


def cancel(target: str) -> int:
    """Stop what runs and take back what waits; points on this machine end at a step boundary, a second cancel ends them at once."""
    folder = find(target)
    found = standings(folder)
    processes = Processes(folder)
    if elsewhere := processes.elsewhere():
        raise ConfigError(f"{folder} runs on {elsewhere}. Cancel it there.")
    jobs = [job["job"] for job in read_sweep(folder)["jobs"]]
    waiting = [s for s in found if s.state in LIVE]
    if not waiting:
        print(f"{folder}: {counts(found)}; nothing runs.")
        return 0
    if jobs:
        from rl import slurm

        slurm.cancel(jobs)
    launcher = processes.launcher()
    # the launcher passes it on; where it was killed, its points are still there
    for pid in [launcher] if launcher is not None else processes.points().values():
        os.kill(pid, signal.SIGINT)
    print(f"{folder}: asked {len(waiting)} points to stop. See entrl sweep status {folder}.")
    return 0
