"""Starts the ranks of a run folder on this machine: ``python -m rl.launch RUN``. One process runs in place.

Signals are handed on to the ranks, which stop at a step boundary; a second Ctrl-C ends everything at once. When a rank fails the
others are ended, and the first failing rank's traceback is the last thing printed. Nothing heavy is imported here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from rl.errors import CRASHED, LEFT, MISTAKE, REQUEUE, CheckpointError, guarded
from rl.rundir import finish

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_GRACE = 10.0  # seconds the other ranks have to say what they saw of a failure


def main(argv: Sequence[str]) -> int:
    """Run the folder named on the command line to its end; the exit code is the run's."""
    folder = Path(argv[0])
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        engine, server = config["engine"], config["rollout"].get("server")
        processes, nodes, threads = engine["processes"], engine["nodes"], engine["threads"]
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder} is no run folder: config.yaml cannot be read ({error}).") from error
    if nodes > 1:
        raise CheckpointError(
            f"{folder} is for {nodes} nodes, and this starts processes on one. Use entrl slurm submit, or on every node: torchrun "
            f"--nnodes {nodes} --nproc-per-node {processes} --rdzv-endpoint HOST:PORT -m rl.rank {folder}."
        )
    if server is not None:
        return _beside_a_server(folder, processes, threads)
    if processes == 1:
        from rl.rank import main as rank

        return rank([str(folder)])
    return Launcher(folder, processes, threads).run()


def _beside_a_server(folder: Path, processes: int, threads: int | None) -> int:
    """The ranks, once vLLM's server answers; a server that was started for them ends with them."""
    from omegaconf import OmegaConf

    from rl.server import server_of, serving

    with serving(server_of(OmegaConf.load(folder / "config.yaml")), folder / "logs" / "server.log") as environment:
        return Launcher(folder, processes, threads, environment).run()


class Launcher:
    """``processes`` ranks on this machine.

    Args:
        threads: CPU threads of each rank; None shares the cores among them. environment: what the ranks get beside this process's.
    """

    def __init__(self, folder: Path, processes: int, threads: int | None, environment: Mapping[str, str] | None = None):
        self.folder, self.processes, self.threads = folder, processes, threads
        self.environment = dict(environment or {})
        self.ranks: list[subprocess.Popen] = []
        self.interrupted = False
        self.ended: set[int] = set()  # ranks that this launcher has ended itself

    def run(self) -> int:
        """Start the ranks and wait for them."""
        began = time.time()
        before = {number: signal.signal(number, self._hand_on) for number in _SIGNALS}
        try:
            self.ranks = [self._start(rank, port) for port in [_free_port()] for rank in range(self.processes)]
            codes = self._wait()
        finally:
            self._kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.interrupted and LEFT in codes:
            return LEFT
        if all(code in (0, REQUEUE) for code in codes):
            return max(codes)
        return self._explain(codes, began)

    def _start(self, rank: int, port: int) -> subprocess.Popen:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.processes, "LOCAL_WORLD_SIZE": self.processes}
        environ = {**os.environ, **self.environment, **{name: str(value) for name, value in places.items()}}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ENTRL_LAUNCHER": str(os.getpid())}
        environ["PYTHONSAFEPATH"] = "1"  # a folder called data where the run was started would hide ours
        threads = self.threads or max(1, (os.cpu_count() or 1) // self.processes)
        environ.setdefault("OMP_NUM_THREADS", str(threads))
        return subprocess.Popen(
            [sys.executable, "-m", "rl.rank", str(self.folder)],
            env=environ,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal comes here only, and is handed on once
        )

    def _hand_on(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.interrupted:
            self._kill()
            os._exit(LEFT)
        self.interrupted |= number == signal.SIGINT
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(number)

    def _wait(self) -> list[int]:
        """Exit codes of all ranks; once one fails the others get a moment and are then killed."""
        failed_at = None
        while any(process.poll() is None for process in self.ranks):
            time.sleep(0.1)
            if failed_at is None and any(p.poll() not in (None, 0, REQUEUE) for p in self.ranks):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _GRACE:
                self._kill()
        return [process.wait() for process in self.ranks]

    def _kill(self) -> None:
        for rank, process in enumerate(self.ranks):
            if process.poll() is None:
                self.ended.add(rank)
                with contextlib.suppress(ProcessLookupError):  # its session: workers of the data and of rewards too
                    os.killpg(process.pid, signal.SIGKILL)

    def _explain(self, codes: list[int], began: float) -> int:
        """Print the error of the rank that failed first, last of all."""
        written = [
            path for path in self.folder.glob("logs/attempt_*/rank_*.error") if path.stat().st_mtime >= began - 1
        ]
        first = min(written, key=lambda path: path.stat().st_mtime, default=None)
        # one that was killed leaves no traceback, and the others then tell of its absence
        killed = [r for r, code in enumerate(codes) if code < 0 and r not in self.ended]
        if first is not None and not killed:
            rank = int(first.stem.removeprefix("rank_"))
            code, log = codes[rank], first.with_suffix(".log")
            where = f" (its output: {log})" if rank and log.is_file() else ""
            text = first.read_text(encoding="utf-8").rstrip()
            print(f"\nrank {rank} of {self.processes} failed first{where}:\n\n{text}", file=sys.stderr, flush=True)
        else:
            rank = killed[0] if killed else next(r for r, code in enumerate(codes) if code not in (0, REQUEUE))
            code = codes[rank]
            why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            memory = " That is often the system running out of memory." if code == -signal.SIGKILL else ""
            print(
                f"\nrank {rank} of {self.processes} {why} and left no traceback.{memory}", file=sys.stderr, flush=True
            )
            finish(self.folder, "FAILED", f"rank {rank} {why}")
        return MISTAKE if code == MISTAKE else CRASHED


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
