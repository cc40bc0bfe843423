"""Is a setting of a reward one that works? Each check raises the RewardError that says what would."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

from rewards.errors import RewardError


def whole(key: str, value: int, least: int, none: bool = False) -> None:
    """A whole number from ``least``, with ``none`` also None."""
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        null = ", or null" if none else ""
        raise RewardError(f"{key}={value!r} does not work. Expected a whole number from {least}{null}.")


def number(key: str, value: float, low: float, high: float = math.inf, above: bool = False) -> None:
    """A finite number from ``low`` to ``high``, with ``above`` greater than ``low``."""
    fine = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
    if not fine or (above and value == low):
        lower = f"above {low:g}" if above else f"from {low:g}"
        raise RewardError(
            f"{key}={value!r} does not work. Expected a number {lower}{'' if high == math.inf else f' to {high:g}'}."
        )


def choice(key: str, value: str, known: Sequence[str]) -> None:
    """One of the names that are known."""
    if value not in known:
        raise RewardError(f"{key}={value!r} is not known. Expected one of: {', '.join(known)}.")


def truth(key: str, value: bool) -> None:
    """True or false, and not a word that only looks like it."""
    if not isinstance(value, bool):
        raise RewardError(f"{key}={value!r} does not work. Expected true or false.")
