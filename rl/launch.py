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

from rl import rundir
from rl.errors import CRASHED, DONE, LEFT, MISTAKE, REQUEUE, CheckpointError, guarded
from rl.stop import SIGNALS

_RANK = (sys.executable, "-m", "rl.rank")
_GRACE = 10.0  # seconds the other ranks have to say what they saw of a failure


def main(argv: Sequence[str]) -> int:
    """Run the folder named on the command line to its end; the exit code is the run's."""
    folder = rundir.named(argv)
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        engine, server = config["engine"], config["rollout"].get("server")
        processes, nodes, threads = int(engine["processes"]), int(engine["nodes"]), engine["threads"]
    except (OSError, KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{folder}/config.yaml cannot be used: {error!r}. Was it edited?") from error
    if nodes > 1:
        raise CheckpointError(
            f"{folder} is for {nodes} nodes, and this starts processes on one. Use entrl slurm submit, or on every node: torchrun "
            f"--nnodes {nodes} --nproc-per-node {processes} --rdzv-endpoint HOST:PORT -m rl.rank {folder}."
        )
    if processes <= 1 and server is None:  # the rank refuses 0
        from rl.rank import main as rank

        return rank(argv)
    rundir.held(folder).close()  # the first rank holds it then; but this can say so at once
    if server is None:
        return Launcher(folder, processes, threads).run()
    return _beside_a_server(folder, processes, threads)


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
        command: what starts a rank, before the folder.
    """

    def __init__(
        self,
        folder: Path,
        processes: int,
        threads: int | None,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = _RANK,
    ):
        self.folder, self.processes, self.threads, self.command = folder, processes, threads, command
        self.environment = dict(environment or {})
        self.ranks: list[subprocess.Popen] = []
        self.told: list[int] = []  # signals
        self.ended: set[int] = set()  # ranks that this launcher has ended itself

    def run(self) -> int:
        """Start the ranks and wait for them."""
        earlier = set(self._errors())
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # in the ranks too, until they listen
            try:
                port = _free_port()
                for rank in range(self.processes):
                    self.ranks.append(self._start(rank, port))
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            codes = self._wait()
        finally:
            self._kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        if LEFT in codes and signal.SIGINT in self.told:
            return LEFT
        if all(code in (DONE, REQUEUE) for code in codes):
            return max(codes)
        return self._explain(codes, earlier)

    def _start(self, rank: int, port: int) -> subprocess.Popen:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.processes, "LOCAL_WORLD_SIZE": self.processes}
        environ = {**os.environ, **self.environment, **{name: str(value) for name, value in places.items()}}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ENTRL_LAUNCHER": str(os.getpid())}
        environ["PYTHONSAFEPATH"] = "1"  # a folder called data where the run was started would hide ours
        threads = self.threads or max(1, (os.cpu_count() or 1) // self.processes)
        environ.setdefault("OMP_NUM_THREADS", str(threads))
        return subprocess.Popen(
            [*self.command, str(self.folder)],
            env=environ,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal comes here only, and is handed on once
        )

    def _take(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and number in self.told:
            self._kill()
            os._exit(LEFT)
        self.told.append(number)

    def _wait(self) -> list[int]:
        """Exit codes of all ranks, which get the signals; once one fails the others get a moment and are then killed."""
        failed_at, handed_on = None, 0
        while any(process.poll() is None for process in self.ranks):
            for number in self.told[handed_on:]:
                handed_on += 1
                for process in self.ranks:
                    process.send_signal(number)
            time.sleep(0.1)
            if failed_at is None and any(p.poll() not in (None, DONE, REQUEUE) for p in self.ranks):
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

    def _errors(self) -> list[Path]:
        """What ranks have left of their errors, oldest first."""
        return sorted(self.folder.glob("logs/attempt_*/rank_*.error"), key=lambda path: path.stat().st_mtime)

    def _explain(self, codes: list[int], earlier: set[Path]) -> int:
        """Print the error of the rank that failed first, last of all."""
        written = [path for path in self._errors() if path not in earlier]
        # one that was killed leaves no traceback, and the others then tell of its absence
        killed = [r for r, code in enumerate(codes) if code < 0 and r not in self.ended]
        if written and not killed:
            rank, log = int(written[0].stem.removeprefix("rank_")), written[0].with_suffix(".log")
            where = f" (its output: {log})" if rank else ""
            text = written[0].read_text(encoding="utf-8").rstrip()
            self._print(f"rank {rank} of {self.processes} failed first{where}:\n\n{text}")
            return MISTAKE if codes[rank] == MISTAKE else CRASHED
        rank = killed[0] if killed else next(r for r, code in enumerate(codes) if code not in (DONE, REQUEUE))
        code = codes[rank]
        why = f"was killed by {_name(-code)}" if code < 0 else f"ended with exit code {code}"
        memory = " That is often the system running out of memory." if code == -signal.SIGKILL else ""
        self._print(f"rank {rank} of {self.processes} {why} and left no traceback.{memory}")
        rundir.finish(self.folder, "FAILED", f"rank {rank} {why}")
        return CRASHED

    @staticmethod
    def _print(text: str) -> None:
        print(f"\n{text}", file=sys.stderr, flush=True)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time one
        return f"signal {number}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
