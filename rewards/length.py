"""Rewards that look at nothing but the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rewards.errors import RewardError
from rewards.text import Completion
from rewards.values import number, whole


def overlong(
    prompts: Sequence,
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    buffer: int | None = None,
    factor: float = 1.0,
    **columns,
) -> list[float]:
    """DAPO's soft overlong punishment: 0 up to ``max_tokens - buffer``, then linearly down to ``-factor`` at ``max_tokens``.

    With L tokens (end of text included): ``min(0, -(L - (max_tokens - buffer)) / buffer) * factor``, and ``-factor`` beyond
    ``max_tokens``. Source: DAPO (arXiv 2503.14476), eq. 13; there 20480, 4096 and 1.

    Args:
        buffer: tokens; None is one fifth of ``max_tokens`` as in the paper, at least 1.

    Raises:
        RewardError: a size that does not work.
    """
    whole("reward.overlong.fn.max_tokens", max_tokens, 1)
    whole("reward.overlong.fn.buffer", buffer, 1, none=True)
    if buffer is None:
        buffer = max(1, max_tokens // 5)
    if buffer > max_tokens:
        raise RewardError(
            f"reward.overlong.fn.buffer={buffer} is more than max_tokens={max_tokens}. Expected at most that; null is a fifth."
        )
    number("reward.overlong.fn.factor", factor, 0)
    start = max_tokens - buffer
    return [-factor * min(1.0, max(0.0, (len(ids) - start) / buffer)) for ids in completion_ids]


class LengthBudget:
    """A triangle over the number of tokens: 0 at 0, ``best`` at the budget, 0 from twice the budget on; the budget shrinks.

    ``best * max(0, 1 - |L - B_t| / B_t)`` with ``B_t = max(floor, floor(start * gamma^(t/T)))`` (``budget``) and t/T the
    trainer's step / its number of steps. Without a trainer (evaluation) t = 0. Series: ``reward/budget``, tokens.
    Source: Reinforcement Mid-Training (arXiv 2509.24375); its r_max is not published, and its total reward is
    ``(1 - w) * correct + w * r_len``: the weights of the rewards here. Differs: L counts all tokens of the completion, the
    paper those of the thought, and the paper's prompt asks for B_t tokens.

    Args:
        start: B_0. floor: B_min. gamma: share of B_0 that is left at the end. best: r_max.

    Raises:
        RewardError: a value that does not work.
    """

    __name__ = "length_budget"

    def __init__(self, start: int = 800, floor: int = 1, gamma: float = 0.2, best: float = 1.0):
        _check_budget(start, floor, gamma)
        number("reward.length_budget.fn.best", best, 0, above=True)
        self.start, self.floor, self.gamma, self.best = start, floor, gamma, best

    def __call__(
        self,
        prompts: Sequence,
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        trainer_state=None,
        log_metric=None,
        **columns,
    ) -> list[float]:
        started = trainer_state is not None and trainer_state.max_steps > 0
        now = budget(
            trainer_state.global_step / trainer_state.max_steps if started else 0.0, self.start, self.floor, self.gamma
        )
        if log_metric is not None:
            log_metric("reward/budget", float(now))
        return [self.best * max(0.0, 1 - abs(len(ids) - now) / now) for ids in completion_ids]


def budget(progress: float, start: int = 800, floor: int = 1, gamma: float = 0.2) -> int:
    """B_t of ``LengthBudget``, in tokens, at ``progress`` = t/T in [0, 1] of the training; what is outside is cut off.

    Raises:
        RewardError: a value that does not work.
    """
    _check_budget(start, floor, gamma)
    return max(floor, math.floor(start * gamma ** min(1.0, max(0.0, progress))))


def _check_budget(start: int, floor: int, gamma: float) -> None:
    whole("reward.length_budget.fn.start", start, 1)
    whole("reward.length_budget.fn.floor", floor, 1)
    if floor > start:
        raise RewardError(f"reward.length_budget.fn.floor={floor} is more than start={start}. Expected at most that.")
    number("reward.length_budget.fn.gamma", gamma, 0, 1, above=True)
