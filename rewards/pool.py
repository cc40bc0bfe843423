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
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pebble import ProcessExpired, ProcessPool

from rewards.errors import RewardError
from rewards.values import number, whole

Failure = Literal["timeout", "died", "raised"]

_CHUNK = 16  # samples a message to a worker; one that fails is done again sample by sample
_GRACE = 5.0  # seconds behind the timeout
_STALL = 30.0  # seconds behind timeout and grace without any result, after which the pool is remade
_START = 120.0  # seconds in which a worker must start; its imports may come from a slow, shared file system
_FRUITLESS = 3  # pools that break one after the other without a single result
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

    Raises:
        RewardError: a timeout or workers that do not work, or no worker could be started.
    """
    number("timeout", timeout, 0.0, above=True)
    whole("workers", workers, 1, none=True)
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
    """The results of all chunks; what a pool that broke left undone is done by the next."""
    workers, fruitless = workers or _share(), 0
    results: list[list | Failed | None] = [None] * len(chunks)
    while left := [i for i, result in enumerate(results) if result is None]:
        if fruitless == _FRUITLESS:
            _try_start(workers)
            results[left[0]] = Failed("died")  # workers start, so it is the first chunk that breaks them
            fruitless = 0
            continue
        found = _round(work, [chunks[i] for i in left], timeout, workers)
        for i, result in zip(left, found, strict=True):
            results[i] = result
        fruitless = fruitless + 1 if all(result is None for result in found) else 0
    return results


def _round(
    work: Callable[[list], list], chunks: list[list], timeout: float, workers: int
) -> list[list | Failed | None]:
    """One try at all chunks with one pool: None where the pool broke before there was a result."""
    pool, futures = _pool(workers), []
    try:
        with contextlib.suppress(RuntimeError):  # broke while chunks came in; BrokenProcessPool is one
            for chunk in chunks:
                futures.append(pool.schedule(_limited, args=[work, chunk, timeout], timeout=timeout))
        whole_pool = _wait(pool, futures, timeout)
        results = [_result(f, len(c)) if f.done() else None for f, c in zip(futures, chunks, strict=False)]
    except BaseException:  # Ctrl-C: what is under way must not go on behind our back
        stop()
        raise
    if not whole_pool or len(futures) < len(chunks):
        _discard(workers, pool)
    return results + [None] * (len(chunks) - len(results))


def _wait(pool: ProcessPool, futures: list, timeout: float) -> bool:
    """Wait for the futures; False when the pool broke, or when nothing came for so long that it must have.

    A pool breaks when a worker dies between two tasks. Pebble then ends the futures that are with the workers and leaves those
    that still wait for room in their pipe as they are, for ever.
    """
    done, moved = 0, time.monotonic()
    for future in futures:
        while not future.done():
            with contextlib.suppress(TimeoutError, CancelledError):
                future.exception(timeout=0.2)
                break
            if (now_done := sum(f.done() for f in futures)) > done:
                done, moved = now_done, time.monotonic()
            if not pool.active or time.monotonic() - moved > timeout + _GRACE + _STALL:
                return False
    return pool.active


def _try_start(workers: int) -> None:
    pool = _pool(workers)
    try:
        pool.schedule(len, args=[[]]).result(timeout=_START)
    except Exception as error:
        _discard(workers, pool)
        raise RewardError(
            f"The processes that grade answers could not be started ({type(error).__name__}: {error}). Expected room for "
            f"{workers} small Python processes; look for limits on processes and memory (ulimit -a)."
        ) from error


def _limited(work: Callable[[list], list], chunk: list, timeout: float) -> list:
    """The kernel ends a worker that is stuck, should the parent no longer be there to do it."""
    signal.setitimer(signal.ITIMER_REAL, timeout + _GRACE)
    try:
        return work(chunk)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _result(future, count: int) -> list | Failed | None:
    try:
        results = future.result()
        return results if len(results) == count else Failed("raised")
    except TimeoutError:
        return Failed("timeout")
    except ProcessExpired as error:
        return Failed("timeout" if error.exitcode == -signal.SIGALRM else "died")
    except (BrokenProcessPool, CancelledError):
        return None
    except Exception:
        return Failed("raised")


def _share() -> int:
    """Cores of this process, shared by the ranks of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


def _pool(workers: int) -> ProcessPool:
    with _lock:
        pool = _pools.get(workers)
        if pool is not None and not pool.active:  # a worker died while nothing was asked of it
            _end(_pools.pop(workers))
            pool = None
        if pool is None:
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
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = _MEMORY if most == resource.RLIM_INFINITY else min(_MEMORY, most)  # a limit may not be raised
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # when memory runs out, this goes first and not the training
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(OSError, AttributeError):  # ends with the server, even inside C code
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def _discard(workers: int, pool: ProcessPool) -> None:
    """End what is left of a pool that broke, unless another thread has already done so."""
    with _lock:
        if _pools.get(workers) is not pool:
            return
        del _pools[workers]
    _end(pool)


def _end(pool: ProcessPool) -> None:
    pool.stop()
    pool.join(5)


@atexit.register
def stop() -> None:
    """End all workers at once; the next call makes new ones."""
    with _lock:
        pools = list(_pools.values())
        _pools.clear()
    for pool in pools:
        _end(pool)
