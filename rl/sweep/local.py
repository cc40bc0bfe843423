"""The local launcher: some points of a sweep at a time, each in processes of its own, so that none takes the others down."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from rl.errors import LEFT, ConfigError
from rl.sweep.folder import Processes
from rl.sweep.points import Point

LAUNCH = (sys.executable, "-m", "rl.launch")  # plus a run folder
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PATIENCE = 30.0  # seconds after the second Ctrl-C until what still runs is killed


class Running(NamedTuple):
    """A point that runs now."""

    point: Point
    process: subprocess.Popen
    since: float
    slot: int


class Ended(NamedTuple):
    """A point that ended: its exit code and seconds. A negative code is the signal that killed it, 130 one that was asked for."""

    point: Point
    code: int
    seconds: float


class Local:
    """Runs points, at most ``at_once`` at a time, and passes signals on to them.

    The first INT, TERM or USR1 stops every point at the end of its step and starts no further one. A second INT ends them at
    once, and what is still there half a minute later is killed; further TERM and USR1 change nothing, as for a single run.

    Args:
        gpus: what CUDA_VISIBLE_DEVICES may name; empty leaves the variable alone.
        gpus_per_point: how many of them each point is given, so that points side by side do not share one.
        command: starts a point when a run folder is added to it.
    """

    def __init__(
        self,
        folder: Path,
        at_once: int,
        gpus: Sequence[str] = (),
        gpus_per_point: int = 1,
        command: Sequence[str] = LAUNCH,
    ):
        self.folder, self.at_once = folder, at_once
        self.stopping = self.leaving = False
        self._gpus, self._per_point, self._command = gpus, gpus_per_point, command
        self.running: list[Running] = []
        self._processes = Processes(folder)
        self._interrupted = False
        self._deadline = float("inf")

    def run(
        self,
        points: Iterator[Point],
        started: Callable[[Point], None],
        ended: Callable[[Ended], None],
        watch: Callable[[Sequence[Running], bool], None],
        pause: float = 0.5,
    ) -> list[Ended]:
        """Run them all; the callbacks hear of every start and end, ``watch`` is called every ``pause`` seconds with
        what runs and whether it was told to stop.

        Raises:
            ConfigError: another process runs points of this sweep.
        """
        if (other := self._processes.launcher()) is not None:
            raise ConfigError(
                f"{self.folder} is being run by process {other} already. Wait for it, or entrl sweep cancel {self.folder}."
            )
        before = {s: signal.signal(s, self._pass_on) for s in _SIGNALS}
        done: list[Ended] = []
        more = True
        try:
            while self.running or (more and not self.stopping):
                while more and not self.stopping and len(self.running) < self.at_once:
                    point = next(points, None)
                    more = point is not None
                    if point is not None and not self.stopping:
                        started(point)
                        self._start(point)
                for run in self._reap():
                    code = run.process.returncode
                    if self.stopping and -code in _SIGNALS:  # told to stop before it could listen
                        code = LEFT
                    done.append(Ended(run.point, code, time.monotonic() - run.since))
                    ended(done[-1])
                watch(self.running, self.stopping)
                if self.running:
                    time.sleep(pause)
                if self.leaving:
                    self._leave()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._kill()
            self._processes.remove()
        return done

    def _start(self, point: Point) -> None:
        run = self.folder / point.folder
        slot = next(i for i in range(self.at_once) if i not in {r.slot for r in self.running})
        logs = run / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / "launch.log").open("ab") as log:
            process = subprocess.Popen(
                [*self._command, str(run)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "PYTHONSAFEPATH": "1",
                    **self._devices(slot),
                },  # a folder "data" here would hide ours
                start_new_session=True,  # Ctrl-C in the terminal reaches this process only, which passes it on
            )
        self.running.append(Running(point, process, time.monotonic(), slot))
        if self.stopping:  # the signal came while the process was being made
            process.send_signal(signal.SIGTERM)
        self._record()

    def _devices(self, slot: int) -> dict[str, str]:
        if not self._gpus:
            return {}
        first = slot * self._per_point
        mine = [self._gpus[(first + i) % len(self._gpus)] for i in range(min(self._per_point, len(self._gpus)))]
        return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}

    def _reap(self) -> list[Running]:
        over = [run for run in self.running if run.process.poll() is not None]
        if over:
            self.running = [run for run in self.running if run not in over]
            self._record()
        return over

    def _record(self) -> None:
        self._processes.write({run.point.number: run.process.pid for run in self.running})

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted and not self.leaving:
            self.leaving, self._deadline = True, time.monotonic() + _PATIENCE
        self._interrupted |= number == signal.SIGINT
        self.stopping = True
        self._send(number)

    def _leave(self) -> None:
        if time.monotonic() > self._deadline:
            self._kill()
        else:
            self._send(signal.SIGINT)  # again and again: a run that has just got its first one waits for a second

    def _send(self, number: int) -> None:
        for run in self.running:
            if run.process.poll() is None:
                run.process.send_signal(number)

    def _kill(self) -> None:
        for run in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait()


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, or else the numbers of all GPUs."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [word.strip() for word in named.split(",") if word.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
