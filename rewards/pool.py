"""Work on untrusted text in processes that can be killed: one endless expression costs its own score and no more."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pebble import ProcessExpired, ProcessPool

Failure = Literal["timeout", "died", "raised"]

_CHUNK = 16  # samples a message to a worker; one that fails is done again sample by sample
_GRACE = 5.0  # seconds behind the timeout
_MEMORY = 4 << 30  # bytes of address space of a worker
_PRELOAD = "rewards.math_grading"  # imported once, so that a replaced worker starts in milliseconds

_lock = threading.Lock()
_starting = threading.Lock()
_pools: dict[int, ProcessPool] = {}


class Failed:
    """What stands where a result is missing, and why."""

    def __init__(self, why: Failure):
        self.why = why


def run(
    work: Callable[[list], list], samples: Sequence[Any], *, timeout: float, workers: int | None = None
) -> list[Any]:
    """``work`` on all samples in other processes: results in the samples' order, ``Failed`` where there is none.

    Args:
        work: a function of a module, from a list of samples to a list of results; it must not raise for a single bad sample.
        timeout: seconds a sample may take; its worker is killed then and replaced. workers: processes; None for the cores of
            this machine shared by the ranks on it.
    """
    chunks = [list(samples[i : i + _CHUNK]) for i in range(0, len(samples), _CHUNK)]
    found: list[Any] = []
    for chunk, results in zip(chunks, _gather(work, chunks, timeout, workers), strict=True):
        if isinstance(results, Failed) and len(chunk) > 1:
            alone = _gather(work, [[sample] for sample in chunk], timeout, workers)
            found += [result if isinstance(result, Failed) else result[0] for result in alone]
        else:
            found += [results] if isinstance(results, Failed) else results
    return found


def _gather(
    work: Callable[[list], list], chunks: list[list], timeout: float, workers: int | None
) -> list[list | Failed]:
    pool = _pool(workers or _share())
    futures = [pool.schedule(_limited, args=[work, chunk, timeout], timeout=timeout) for chunk in chunks]
    try:
        return [_result(future, len(chunk)) for future, chunk in zip(futures, chunks, strict=True)]
    except BaseException:  # Ctrl-C: what is under way must not go on behind our back
        stop()
        raise


def _limited(work: Callable[[list], list], chunk: list, timeout: float) -> list:
    """The kernel ends a worker that is stuck, should the parent no longer be there to do it."""
    signal.setitimer(signal.ITIMER_REAL, timeout + _GRACE)
    try:
        return work(chunk)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _result(future, count: int) -> list | Failed:
    try:
        results = future.result()
        return results if len(results) == count else Failed("raised")
    except TimeoutError:
        return Failed("timeout")
    except ProcessExpired:
        return Failed("died")
    except Exception:
        return Failed("raised")


def _share() -> int:
    """Cores of this process, shared by the ranks of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _pool(workers: int) -> ProcessPool:
    with _lock:
        pool = _pools.get(workers)
        if pool is None or not pool.active:
            # fork is not safe beside torch's threads; a fork server is quick and has none
            context = _Context()
            context.set_forkserver_preload([_PRELOAD])
            pool = _pools[workers] = ProcessPool(workers, initializer=_prepare, context=context)
        return pool


class _Process(ForkServerProcess):
    """Started without the user's main script, which multiprocessing would run again in every worker."""

    @staticmethod
    def _Popen(process_obj):
        with _starting:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")
            try:
                return Popen(process_obj)
            finally:
                sys.modules["__main__"] = main


class _Context(ForkServerContext):
    Process = _Process


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # acts inside C code too, where no handler of Python's runs
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # when memory runs out, this goes first and not the training
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(OSError, AttributeError):  # ends with the server, even inside C code
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


@atexit.register
def stop() -> None:
    """End all workers at once; the next call makes new ones."""
    with _lock:
        pools = list(_pools.values())
        _pools.clear()
    for pool in pools:
        pool.stop()
        pool.join(5)
