"""A reward that values unlikely correct answers above likely ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from rewards.errors import RewardError
from rewards.groups import groups_of
from rewards.text import Completion
from rewards.values import choice, number, whole


class Unlikeliness:
    """Another reward, taken down for the completions of a prompt that were likely: the more likely, the more.

    ``R' = R * (1 - beta * rank / G)``, rank 0 the smallest mean logp of the prompt's G completions; of equals the first has the
    smaller rank. Only R > 0 is changed. Source: arXiv 2506.02355, official code (``form="code"``). The paper's formula,
    ``R * (1 - beta * (G - r) / G)`` with r = 0 for the most likely, takes beta / G more from each (``form="paper"``).

    Args:
        reward: the reward that is changed. beta: share that the most likely completion loses, 0 to 1. group: completions a
            prompt must have in one call, so that a group split over ranks is an error instead of other ranks; None takes all.

    Raises:
        RewardError: a value that does not work, a group that is split, no ``mean_logp``, or one that is no finite number.
    """

    __name__ = "unlikeliness"
    needs_logp = (
        True  # asks the trainer for the column mean_logp: nats a token, under the policy that wrote the completion
    )

    def __init__(
        self,
        reward: Callable[..., list[float]],
        beta: float = 0.25,
        form: Literal["code", "paper"] = "code",
        group: int | None = None,
    ):
        number("reward.unlikeliness.fn.beta", beta, 0, 1)
        choice("reward.unlikeliness.fn.form", form, ("code", "paper"))
        whole("reward.unlikeliness.fn.group", group, 1, none=True)
        self.reward, self.beta, self.form, self.group = reward, beta, form, group

    def __call__(
        self,
        prompts: Sequence,
        completions: Sequence[Completion],
        mean_logp: Sequence[float] | None = None,
        **columns,
    ) -> list[float]:
        if mean_logp is None:
            raise RewardError(
                "reward.unlikeliness needs mean_logp, one number a completion, and got none: it ranks what the policy wrote, "
                "which only a training step knows."
            )
        for i, value in enumerate(mean_logp):
            if not math.isfinite(value):
                raise RewardError(
                    f"reward.unlikeliness got mean_logp={value} for completion {i}. Expected finite numbers."
                )
        values = self.reward(prompts, completions, mean_logp=mean_logp, **columns)
        factors = [1.0] * len(values)
        for members in groups_of(prompts, self.group, "unlikeliness"):
            for i, factor in zip(members, self.factors([mean_logp[i] for i in members]), strict=True):
                factors[i] = factor
        return [value * factor if value > 0 else value for value, factor in zip(values, factors, strict=True)]

    def factors(self, mean_logp: Sequence[float]) -> list[float]:
        """What each completion of one prompt keeps of its reward."""
        shift = 1 if self.form == "paper" else 0  # paper: G - r = ascending rank + 1
        return [1 - self.beta * (rank + shift) / len(mean_logp) for rank in ranks(mean_logp)]


def ranks(values: Sequence[float]) -> list[int]:
    """The place of each value in ascending order, from 0; of equals the first comes first."""
    out = [0] * len(values)
    for place, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        out[i] = place
    return out
