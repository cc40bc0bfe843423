"""The folder of a sweep: which points there are, how they were started, and which processes of this machine run them.

runs/<sweep>/
  sweep.json        created, command, launcher, job ids
  sweep.jsonl       a line a point: number, overrides, run folder
  points.txt        line i is the run folder of point i, for array jobs
  processes.json    only while points run on this machine: pids of the launcher and of each point
  001_.../          an ordinary run folder a point
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import string
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rl.errors import CheckpointError, ConfigError, RunExistsError
from rl.rundir import write_json, write_text
from rl.sweep.points import Point


def sweep_name(asked: str | None, named: str | None, varies: Sequence[str]) -> str:
    """The name asked for, or ``<named sweep or what varies>_<four letters>``.

    Raises:
        ConfigError: it is no name of a folder.
    """
    if asked is None:
        letters = "".join(secrets.choice(string.ascii_lowercase) for _ in range(4))
        return f"{(named or '+'.join(varies) or 'sweep')[:80]}_{letters}"
    if not asked or asked in (".", "..") or Path(asked).name != asked or len(asked) > 100 or "=" in asked:
        raise ConfigError(
            f"sweep.name={asked} is no name of a folder. Expected up to 100 characters without / and = in it."
        )
    return asked


def check_free(folder: Path) -> None:
    """Raises: RunExistsError when something is there already."""
    if folder.exists():
        raise RunExistsError(
            f"{folder} exists already. Give another sweep.name, or run again what did not finish: entrl sweep retry {folder}."
        )


def find(target: str) -> Path:
    """The sweep folder that a person means by a path, or by a name in ``runs/``.

    Raises:
        CheckpointError: there is none.
    """
    for folder in (Path(target), Path("runs") / target):
        if (folder / "sweep.json").is_file():
            return folder
    raise CheckpointError(
        f"{target} is no sweep: {target}/sweep.json is not there. Give the folder that entrl sweep printed."
    )


def write_sweep(
    folder: Path,
    points: Sequence[Point],
    launcher: str,
    argv: Sequence[str],
    search: Mapping[str, Any] | None = None,
) -> None:
    """Write sweep.json, sweep.jsonl and points.txt; the folder of the sweep is there. ``search``: what a search goes on with."""
    write_json(
        folder / "sweep.json",
        {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["entrl", *argv]),
            "launcher": launcher,
            "jobs": [],
            "search": search,
        },
    )
    write_points(folder, points)


def write_points(folder: Path, points: Sequence[Point]) -> None:
    """Write sweep.jsonl and points.txt anew."""
    write_text(folder / "sweep.jsonl", "".join(json.dumps(point._asdict()) + "\n" for point in points))
    write_text(folder / "points.txt", "".join(f"{folder.resolve() / point.folder}\n" for point in points))


def read_points(folder: Path) -> list[Point]:
    """The points of a sweep, in order."""
    return [Point(**json.loads(line)) for line in (folder / "sweep.jsonl").read_text(encoding="utf-8").splitlines()]


def read_sweep(folder: Path) -> dict[str, Any]:
    """What sweep.json holds."""
    return json.loads((folder / "sweep.json").read_text(encoding="utf-8"))


def add_job(folder: Path, job: str, points: Sequence[int]) -> None:
    """Record a job array and the points that are its tasks."""
    sweep = read_sweep(folder)
    sweep["jobs"].append({"job": job, "points": list(points)})
    write_json(folder / "sweep.json", sweep)


class Processes:
    """``processes.json``: who runs the points on this machine, so that another shell can see and stop them.

    A process is its pid and its start time, which no later process of the same pid shares.
    """

    def __init__(self, folder: Path):
        self._path = folder / "processes.json"

    def read(self) -> dict[str, Any]:
        """``{"host", "launcher": {pid, start}, "points": {number: {pid, start}}}``; empty when nothing was left."""
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    def write(self, points: Mapping[int, int]) -> None:
        """Record this process as the launcher, and the pid of each running point."""
        write_json(
            self._path,
            {
                "host": os.uname().nodename,
                "launcher": _identify(os.getpid()),
                "points": {str(number): _identify(pid) for number, pid in points.items()},
            },
        )

    def remove(self) -> None:
        """Nothing runs any more."""
        self._path.unlink(missing_ok=True)

    def elsewhere(self) -> str | None:
        """The host that recorded them, when that is not this one: its processes cannot be seen from here."""
        host = self.read().get("host")
        return host if host not in (None, os.uname().nodename) else None

    def launcher(self) -> int | None:
        """The pid of a launcher that is alive on this machine."""
        return self._alive(self.read().get("launcher"))

    def points(self) -> dict[int, int]:
        """Number -> pid of the points that are alive on this machine."""
        recorded = self.read().get("points", {})
        return {int(number): pid for number, process in recorded.items() if (pid := self._alive(process))}

    def _alive(self, process: Mapping[str, int] | None) -> int | None:
        if process is None or process["start"] is None or self.elsewhere():
            return None
        if _start_time(process["pid"]) != process["start"]:
            return None
        return process["pid"]


def _identify(pid: int) -> dict[str, int | None]:
    return {"pid": pid, "start": _start_time(pid)}


def _start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process, None when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the program's name before it may hold anything
    return None if fields[0] in "ZX" else int(fields[19])
