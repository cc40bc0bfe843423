"""One process of a run: ``python -m rl.rank RUN``, started by ``rl.launch``, torchrun or srun.

Its place among the others comes from RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or from Slurm. A run folder that was
stopped goes on from its newest good checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from rl import rundir
from rl.errors import DONE, Stopped, guarded, user_errors
from rl.quiet import settle_environment
from rl.stop import StopSignal


def main(argv: Sequence[str]) -> int:
    """Work on the run folder named on the command line; the exit code is the run's."""
    folder = rundir.named(argv)
    with StopSignal() as stop:  # before the slow imports, so that no signal is lost
        _end_with_the_launcher()
        settle_environment()
        rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
        with attempt(folder, rank, redirect=True):
            from rl.engine import take_place
            from rl.train import work

            take_place(os.environ)
            work(folder, stop)
    return DONE


@contextlib.contextmanager
def attempt(folder: Path, rank: int, redirect: bool) -> Iterator[None]:
    """One start of a rank: whatever happens, the folder says how it ended.

    Each rank leaves ``logs/attempt_<n>/rank_<r>.log`` and, of an error, ``rank_<r>.error``; the first one DONE or STOPPED, and the first
    that fails FAILED. However it ended, a run with any step gets its ``report.html``.

    Args:
        redirect: send the output of ranks above 0 to their log; the first rank keeps the console.

    Raises:
        ConfigError: another process trains in the folder, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        log = _new_log(folder, rank)
        if redirect and rank:
            with open(log, "a", encoding="utf-8") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
        try:
            if rank == 0:
                stack.enter_context(rundir.held(folder))
                rundir.reopen(folder)  # long before the ranks meet, so that none has failed yet
            try:
                yield
            except Stopped as stopped:
                if rank == 0:
                    rundir.finish(folder, "STOPPED", f"{stopped}; go on: entrl resume {folder}")
                    _report(folder)
                raise
            except BaseException as error:
                # the first rank to fail says why; the others then fail of its absence
                if rundir.state(folder) == "open":
                    with contextlib.suppress(OSError):  # a full disk, say, which is then the error
                        rundir.finish(folder, "FAILED", f"{type(error).__name__}: {error}")
                if rank == 0 and isinstance(error, Exception):  # and not when somebody wants to leave at once
                    _report(folder)
                raise
            if rank == 0:
                rundir.finish(folder, "DONE")
                _report(folder)
        except BaseException as error:
            if not isinstance(error, Stopped):
                _say_why(log, error)
            raise


def _report(folder: Path) -> None:
    """Leave the page of a run that has any step; what goes wrong with it is one line and nothing more."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file() or not metrics.stat().st_size:
        return
    try:
        from rl.report.run_page import write_report

        write_report(folder)
    except Exception as error:  # of any kind: the run is what matters
        reason = (str(error).splitlines() or [""])[0][:200]
        print(f"report.html was not written ({type(error).__name__}: {reason}). Try entrl report {folder}")


def _new_log(folder: Path, rank: int) -> Path:
    logs, number = folder / "logs", 1
    while (logs / f"attempt_{number}" / f"rank_{rank}.log").exists():
        number += 1
    log = logs / f"attempt_{number}" / f"rank_{rank}.log"
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"rank {rank}, process {os.getpid()}, {os.uname().nodename}, {began}\n", encoding="utf-8")
    except OSError as error:
        raise rundir.not_writable(folder, error) from error
    return log


def _say_why(log: Path, error: BaseException) -> None:
    """Leave the error beside the log, where the launcher finds it; on the console where the disk is full."""
    mine = isinstance(error, user_errors())
    text = f"entrl: {error}" if mine else "".join(traceback.format_exception(error))
    try:
        rundir.write_text(log.with_suffix(".error"), text)
    except OSError:
        if "ENTRL_LAUNCHER" in os.environ:
            print(text, file=sys.stderr, flush=True)


def _end_with_the_launcher() -> None:
    """A launcher that is killed hard takes its ranks along: they get a SIGTERM, and stop with a checkpoint (Linux)."""
    launcher = os.environ.get("ENTRL_LAUNCHER")
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(launcher):
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
