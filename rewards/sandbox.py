"""Runs programs that a model wrote, each in a process of its own, away from files, network and secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Literal

from rewards.errors import RewardError

Ended = Literal["exit", "failed", "timeout"]

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/alternatives")
_NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ssl", "/etc/ca-certificates", "/etc/pki")
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/program", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Sandbox:
    """A program sees the Python of this process and the system's libraries, read-only, and an empty /program of 64 MB.

    With ``confined=False`` only the limits hold: the program runs as you, with your files and your network, in an empty
    folder; processes that leave its process group outlive it, and ``processes`` counts all processes you have.

    Args:
        timeout: seconds of wall time a program, and one more of CPU time a process. memory_mb: address space of each process.
            output_kb: what a program may write to standard output, or to one file. processes: and threads, at once.
    """

    confined: bool = True
    network: bool = False
    timeout: float = 10.0
    memory_mb: int = 1024
    output_kb: int = 1024
    processes: int = 16

    def run(self, arguments: Sequence[str], stdin: str = "", files: Mapping[str, str] = {}) -> tuple[Ended, str]:
        """How Python ended that was started with these arguments, and what it wrote to standard output.

        "exit" is an exit with status 0; "failed" anything else but running out of time.

        Raises:
            RewardError: the program could not be started as it should be.
        """
        launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("confine.py"))]
        with TemporaryDirectory(prefix="entrl_") as root, TemporaryFile() as out:
            order = self._order(root, out.fileno(), arguments, stdin, files)
            with subprocess.Popen(
                launcher,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[out.fileno()],
                env={},
                start_new_session=True,  # Ctrl-C goes to the trainer, which decides
                text=True,
            ) as process:
                try:
                    ended, reason = process.communicate(json.dumps(order), timeout=self.timeout + 60)
                except BaseException:
                    process.kill()
                    raise
            if process.returncode:
                raise RewardError(self._refusal(reason))
            out.seek(0)
            return ended.strip(), out.read().decode("utf-8", "replace")

    def check(self) -> None:
        """Run one program, to see whether this machine can.

        Raises:
            RewardError: it cannot, and why.
        """
        if sys.platform != "linux":
            raise RewardError(f"reward.code_exec runs programs on Linux only, not on {sys.platform}. Drop the reward.")
        ended, output = self.run(["-c", "print('ready')"])
        if (ended, output.strip()) != ("exit", "ready"):
            raise RewardError(
                f"reward.code_exec: Python ended with {ended!r} on a program of one line. Give it more memory "
                f"(reward.code_exec.fn.memory_mb={self.memory_mb}) or time (timeout={self.timeout:g})."
            )

    def _order(self, root: str, out: int, arguments: Sequence[str], stdin: str, files: Mapping[str, str]) -> dict:
        megabyte, seconds = 1 << 20, int(self.timeout) + 2
        return {
            "argv": [sys.executable, "-I", "-B", "-X", "utf8", *arguments],
            "environment": _ENVIRONMENT if self.confined else {**_ENVIRONMENT, "HOME": root},
            "stdin": stdin,
            "files": dict(files),
            "out": out,
            "root": root,
            "confined": self.confined,
            "network": self.network,
            "visible": self._visible,
            "timeout": self.timeout,
            "limits": {
                "RLIMIT_AS": self.memory_mb * megabyte,
                "RLIMIT_CPU": seconds,
                "RLIMIT_FSIZE": self.output_kb << 10,
                "RLIMIT_NOFILE": 64,
                "RLIMIT_NPROC": self.processes,
                "RLIMIT_CORE": 0,
            },
        }

    @cached_property
    def _visible(self) -> list[str]:
        python = {p for prefix in (sys.prefix, sys.base_prefix) for p in (prefix, os.path.realpath(prefix))}
        found: list[str] = []
        for path in sorted({*_SYSTEM, *python, *(_NETWORK if self.network else ())}):
            if os.path.exists(path) and not any(path.startswith(f"{above}/") for above in found):
                found.append(path)
        return found

    def _refusal(self, reason: str) -> str:
        why = (reason.strip().splitlines() or ["it said nothing"])[-1].rstrip(".")
        if not self.confined:
            return f"reward.code_exec could not start a program: {why}."
        return (
            f"reward.code_exec cannot keep a model's programs away from your files and your network on this machine: {why}. "
            "Run where unprivileged user namespaces are allowed, or accept that they reach both with "
            "reward.code_exec.fn.sandbox=none."
        )
