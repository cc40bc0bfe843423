"""Reward entropy in the loss, with a fixed coefficient or one that is steered by a target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rl.contract import Denominator, Explanation, Scope, Signal, TokenBatch
from rl.errors import ConfigError
from rl.plugins.steps import StepEntropy


class EntropyBonus:
    """Subtract the mean entropy of all tokens, times a coefficient, from the loss.

    ``L - c mean H``, with gradient through H, the mean over the trainable tokens of a forward on all ranks; micro-batches are
    averaged. With a ``target``, after every update whose mean H over its tokens was e::

        c = min(c + delta, coef_max) if e <= target else max(c - delta, coef_min)
        the next update has the bonus if e <= target, none otherwise;  the first has none

    Source: TRL's ``entropy_coef`` and ``use_adaptive_entropy``, whose defaults these are; the latter is Skywork-OR1's adaptive
    entropy control (arXiv 2505.22312). As a plug-in it composes with others, counts tokens over ranks, and reports c.

    Args:
        coef: c, with a target its first value; below 0 it lowers entropy. target: nats, None for a fixed c.
        delta: step of c. coef_min, coef_max: its range. The three need a target.

    Raises:
        ConfigError: a value outside these.
    """

    needs = frozenset({"entropy.grad"})
    neutral: Mapping[str, Any] = {"coef": 0.0, "target": None}

    def __init__(
        self,
        *,
        coef: float = 0.001,
        target: float | None = None,
        delta: float = 0.005,
        coef_min: float = 0.0,
        coef_max: float = 1.0,
    ):
        if target is not None and not target > 0:
            raise ConfigError(
                f"plugin.entropy_bonus.target={target} is no entropy to hold. Expected nats above 0, or null for a fixed coef."
            )
        if not delta >= 0:
            raise ConfigError(f"plugin.entropy_bonus.delta={delta} would steer away from the target. Expected >= 0.")
        if target is not None and not coef_min <= coef <= coef_max:
            raise ConfigError(
                f"plugin.entropy_bonus.coef={coef} is outside coef_min={coef_min} to coef_max={coef_max}. Expected it between."
            )
        self.first, self.coef, self.target, self.delta = coef, coef, target, delta
        self.coef_min, self.coef_max = coef_min, coef_max
        self._entropy: float | None = None  # of the last update
        self._seen = StepEntropy()

    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        if self.target is not None and (over := self._seen.observe(tokens)) is not None:
            self._steer(over.mean)
        if self.applied:
            signal = signal.penalise("bonus", -tokens.entropy, self.applied, tokens.mask)
        h = tokens.entropy.detach()
        return signal.log("coef", torch.full_like(h, self.applied), tokens.mask)

    @property
    def applied(self) -> float:
        """The coefficient of the update under way: 0 while the last one's entropy was above the target."""
        below = self.target is None or (self._entropy is not None and self._entropy <= self.target)
        return self.coef if below else 0.0

    def _steer(self, entropy: float) -> None:
        below, self._entropy = entropy <= self.target, entropy
        self.coef = min(self.coef + self.delta, self.coef_max) if below else max(self.coef - self.delta, self.coef_min)

    def state_dict(self) -> dict[str, Any]:
        """The coefficient, the last update's entropy, and what is known of the one under way; empty with a fixed coefficient."""
        if self.target is None:
            return {}
        return {"coef": self.coef, "entropy": self._entropy, "seen": self._seen.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; where one of the two runs has a fixed coefficient, from ``coef``."""
        if self.target is not None and state:
            self.coef, self._entropy = state["coef"], state["entropy"]
            self._seen.load_state_dict(state["seen"])

    def explain(self) -> Explanation:
        """The bonus at these settings."""
        lines = [f"bonus = -H over all tokens, times c = {self.first:g}"]
        if self.target is not None:
            lines = [
                "bonus = -H over all tokens, times c where mean H of the last update was at most "
                f"{self.target:g}, else times 0",
                f"c = {self.first:g} at first; it then grows by {self.delta:g} up to {self.coef_max:g}, else it shrinks "
                f"to {self.coef_min:g}",
            ]
        penalties: dict[str, tuple[float, Denominator]] = {"bonus": (self.applied, "all")} if self.applied else {}
        statistics: dict[str, Scope] = {} if self.target is None else {"mean H": "world"}
        return Explanation(
            formula=lines,
            reads=["entropy"] if self.coef or self.target is not None else [],
            changes=[],
            statistics=statistics,
            penalties=penalties,
            differs=list(self._differences()),
        )

    def _differences(self) -> Iterator[str]:
        yield "with several ranks TRL averages each rank's mean; here it is the mean over the tokens of all ranks"
        if self.target is not None:
            yield "the paper compares the current step's entropy with the target; TRL, as here, the last update's"
