"""What controllers steer by: the mean entropy of the step before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rl.contract import TokenBatch


class Over(NamedTuple):
    """A step that is over, and the mean entropy of its tokens, in nats."""

    step: int
    mean: float


class StepEntropy:
    """The mean entropy of each step's trainable tokens on all ranks, known as the next step begins; its state may be saved in between."""

    def __init__(self):
        self._step, self._total, self._count = 0, 0.0, 0.0

    def observe(self, tokens: TokenBatch) -> Over | None:
        """Count the tokens of a forward. At the first one of a step: the step before, None if it had no token. Every rank must call it."""
        over = None
        if tokens.step != self._step:
            if self._count:
                over = Over(self._step, self._total / self._count)
            self._step, self._total, self._count = tokens.step, 0.0, 0.0
        self._total += tokens.reduce.sum(tokens.entropy.detach(), "world").item()
        self._count += tokens.reduce.count("world").item()
        return over

    def state_dict(self) -> dict[str, Any]:
        """The tokens of the step under way."""
        return {"step": self._step, "total": self._total, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step, self._total, self._count = state["step"], state["total"], state["count"]
