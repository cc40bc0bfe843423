"""A reward function whose mistakes are found at the sample where they happen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real

from rewards.errors import RewardError
from rewards.text import Completion, text_of


class Checked:
    """Wraps a reward: a wrong count, None, NaN, infinity, a non-number or an exception becomes a RewardError that names the
    reward, and where it can the sample. TRL would turn some of these into a silent zero."""

    def __init__(self, name: str, fn: Callable[..., list[float]]):
        self.__name__ = name  # TRL takes the metric's name from here
        self.fn = fn
        self.settings = set(
            getattr(fn, "keywords", {})
        )  # of a functools.partial: a column of that name would replace them
        self.needs_logp = bool(getattr(fn, "needs_logp", False))  # asks the trainer for the column mean_logp

    def __call__(self, prompts: Sequence, completions: Sequence[Completion], **columns) -> list[float]:
        if clash := sorted(self.settings & set(columns)):
            raise RewardError(
                f"reward.{self.__name__}.fn.{clash[0]} would give way to the column {clash[0]} of the data. "
                "Rename the column with data.columns, or drop it."
            )
        try:
            values = self.fn(prompts=prompts, completions=completions, **columns)
        except RewardError:
            raise
        except (Exception, SystemExit) as error:
            index = self._culprit(prompts, completions, columns)
            where = "" if index is None else f" on {_sample(index, prompts, completions)}"
            raise RewardError(f"reward.{self.__name__} raised {type(error).__name__}: {error}{where}.") from error
        if hasattr(values, "tolist"):  # numpy, torch
            values = values.tolist()
        if not isinstance(values, Sequence) or len(values) != len(completions):
            got = f"{len(values)} values" if isinstance(values, Sequence) else type(values).__name__
            raise RewardError(
                f"reward.{self.__name__} returned {got} for {len(completions)} completions. Expected a list with one number each."
            )
        for i, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise RewardError(
                    f"reward.{self.__name__} returned {value!r} for {_sample(i, prompts, completions)}. "
                    "Expected a finite number; 0.0 for a completion that cannot be scored."
                )
        return [float(value) for value in values]

    def _culprit(self, prompts, completions, columns) -> int | None:
        """The first sample that fails when scored alone; None when each one passes alone, or wants its whole group."""
        for i in range(len(completions)):
            one = {k: [v[i]] if isinstance(v, list) and len(v) == len(completions) else v for k, v in columns.items()}
            try:
                self.fn(prompts=[prompts[i]], completions=[completions[i]], **one)
            except RewardError:
                return None  # a reward of groups refuses every single sample: that blames none of them
            except (Exception, SystemExit):
                return i
        return None


def _sample(i: int, prompts: Sequence, completions: Sequence[Completion]) -> str:
    return f"sample {i} (prompt {_short(text_of(prompts[i]))}, completion {_short(text_of(completions[i]))})"


def _short(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= width else text[: width - 3] + "...")
