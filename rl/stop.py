"""Signals that end a run well: at the next step boundary, with a checkpoint, on all ranks at once. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType, TracebackType
from typing import Self

from rl.errors import LEFT

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """What this process was told while the context is open; open it before anything slow begins, in the main thread.

    A second SIGINT leaves at once with exit code 130: files are written under other names and renamed, so nothing on disk is
    harmed. Further SIGTERM and SIGUSR1 change nothing, since schedulers repeat them.

    Attributes:
        received: the first signal. agreed: all ranks know and have ended their training at the same step.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self.agreed = False
        self._interrupted = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a launcher blocks them until somebody listens
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.received is not None

    def __str__(self) -> str:
        return self.received.name if self.received else "a signal to another rank"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            os._exit(LEFT)
        self._interrupted |= number == signal.SIGINT
        if self.received is None:
            self.received = signal.Signals(number)
            again = " Ctrl-C again leaves at once." if self._interrupted else ""
            text = f"\n{self.received.name}: stopping at the end of this step, with a checkpoint.{again}\n"
            with contextlib.suppress(OSError):  # the reader of a pipe got the Ctrl-C as well
                os.write(2, text.encode())  # a print might interrupt another one, whose stream is not reentrant
