"""One call of each reward before the run, so that a broken one fails before anything is written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import TrainerState

from rewards.checked import Checked
from rewards.errors import RewardError
from rewards.gate import Gated, Once


def _ignore(name: str, value: Any) -> None:
    """Where nothing is logged yet."""


def outside_training(lengths: Sequence[int]) -> dict[str, Any]:
    """What a reward gets from the trainer beside the data's columns, for calls before there is one. Args: lengths: in tokens."""
    return {
        "completion_ids": [[0] * length for length in lengths],
        "mean_logp": [0.0] * len(lengths),
        "trainer_state": TrainerState(max_steps=1),
        "log_metric": _ignore,
        "log_extra": _ignore,
    }


def probe_rewards(functions: Sequence[Checked | Once | Gated], rows: Sequence[dict], group: int) -> None:
    """Call each reward once on empty completions of one prompt, so that a broken one fails before the run starts.

    Raises:
        RewardError: what the reward did wrong, or it took more than a minute.
    """
    row = rows[0]
    columns = {name: [value] * group for name, value in row.items() if name != "prompt"}
    columns |= outside_training([0] * group)
    chat = not isinstance(row["prompt"], str)
    completions = [[{"role": "assistant", "content": ""}]] * group if chat else [""] * group
    for function in functions:
        try:
            with _at_most(_PROBE):
                function([row["prompt"]] * group, completions, **columns)
        except _TooLong:
            raise RewardError(
                f"reward.{function.__name__} has not answered within {_PROBE:g} s for {group} empty completions. Does it wait for a "
                "server, or download something?"
            ) from None


_PROBE = 60.0  # seconds


class _TooLong(BaseException):
    """Not an Exception, so that no reward takes it for one of its own."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise _TooLong inside the context after so many seconds, where this is the main thread: others get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
