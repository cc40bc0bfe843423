"""Errors a user can act on: each says what is wrong, what was got, what is allowed and what to do. The CLI prints one and exits 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from rl.streams import unheard

# Exit codes of every command that trains.
DONE, CRASHED, MISTAKE, REQUEUE, LEFT = (
    0,
    1,
    2,
    85,
    130,
)  # 85: stopped with a checkpoint, start it again; 130: left at once


class Stopped(Exception):
    """A signal ended the run at a step boundary, with a checkpoint; not an error. The exit code is ``REQUEUE``."""


class EntrlError(Exception):
    """Base of every error that is the user's to mend; also the matching built-in error."""


class ConfigError(EntrlError, ValueError):
    """A configuration value that cannot work."""


class MissingError(ConfigError):
    """A value that nobody gave; ``key`` is where it belongs."""

    def __init__(self, key: str):
        super().__init__(f"{key} is not set. Give it on the command line: {key}=...")
        self.key = key


class RunExistsError(EntrlError, FileExistsError):
    """A run name that is taken."""


class CheckpointError(EntrlError, FileNotFoundError):
    """A folder that is not a model, a checkpoint or a run."""


class SaveError(EntrlError, OSError):
    """A checkpoint that could not be written, for want of disk usually."""


class SeamError(EntrlError, ImportError):
    """An installed TRL that entrl's seam was not tested against."""


class ReportError(EntrlError, ValueError):
    """A run folder, or what was asked of it, that no page or table can be made of."""


class ServerError(EntrlError, RuntimeError):
    """A vLLM server that does not start or does not stay."""


def user_errors() -> tuple[type[Exception], ...]:
    """Every error that is the user's to mend, those of the other packages included."""
    from data.errors import DataError
    from rewards.errors import RewardError

    return EntrlError, DataError, RewardError


def guarded(work: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """What ``work(argv)`` returns, or the exit code of how it ended; an error of the user's is printed as one sentence."""
    with unheard():
        try:
            return work(argv)
        except KeyboardInterrupt:
            print("\nentrl: interrupted.", file=sys.stderr)
            return LEFT
        except Stopped as stopped:
            if int(os.environ.get("RANK", "0")) == 0:
                print(f"\nentrl: {stopped}. Exit code {REQUEUE}: start it again to go on.", file=sys.stderr)
            return REQUEUE
        except Exception as error:
            mine = isinstance(error, user_errors()) and not os.environ.get("ENTRL_DEBUG")
            if "ENTRL_LAUNCHER" in os.environ:  # a rank: the launcher prints the error of the one that failed first
                return MISTAKE if mine else CRASHED
            if not mine:
                raise
            print(f"entrl: {error}", file=sys.stderr)
            return MISTAKE
