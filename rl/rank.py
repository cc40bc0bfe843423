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

from rl.errors import DONE, ConfigError, Stopped, guarded, user_errors
from rl.quiet import settle_environment
from rl.rundir import hold
from rl.stop import StopSignal


def main(argv: Sequence[str]) -> int:
    """Work on the run folder named on the command line; the exit code is the run's."""
    folder = Path(argv[0])
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
    """Keep what one start of a rank says: ``logs/attempt_<n>/rank_<r>.log`` and, of a failure, ``rank_<r>.error``.

    Args:
        redirect: send the output of ranks above 0 to their log; the first rank keeps the console.
    """
    logs = folder / "logs"
    lock = hold(folder) if rank == 0 else None
    if rank == 0 and lock is None:
        raise ConfigError(f"{folder} is being trained by another process. Wait for it, or stop it first.")
    number = 1
    while (logs / f"attempt_{number}" / f"rank_{rank}.log").exists():
        number += 1
    log = logs / f"attempt_{number}" / f"rank_{rank}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    log.write_text(f"rank {rank}, process {os.getpid()}, {os.uname().nodename}, {began}\n", encoding="utf-8")
    if redirect and rank:
        with open(log, "a", encoding="utf-8") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Stopped):
            mine = isinstance(error, user_errors())
            text = f"entrl: {error}" if mine else "".join(traceback.format_exception(error))
            log.with_suffix(".error").write_text(text, encoding="utf-8")
        raise
    finally:
        if lock is not None:
            lock.close()


def _end_with_the_launcher() -> None:
    """A launcher that is killed hard takes its ranks along: they get a SIGTERM, and stop with a checkpoint (Linux)."""
    launcher = os.environ.get("ENTRL_LAUNCHER")
    if launcher and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(launcher):
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
