"""Hold the policy's mean entropy at a target that may move over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from rl.contract import Explanation, Signal, TokenBatch
from rl.errors import ConfigError
from rl.plugins.steps import StepEntropy

_POINTS = "Expected nats, as 0.3, or points of step and nats with rising steps, as [[0,0.6],[500,0.3]]."


class TargetEntropy:
    """Add an entropy bonus whose coefficient rises while the mean entropy is below its target, and falls while it is above.

    With h the mean entropy of the last step's trainable tokens on all ranks, T the target of this step, and c kept between
    ``coef_min`` and ``coef_max``; T is linear between points, and constant before the first and after the last::

        c <- c + delta  where h <= T,  else  c - delta;          once a step
        L <- L - c mean(H)  where c pulls towards T: c > 0 while h <= T, c < 0 while h > T; else L

    Source: adaptive entropy control of Skywork-OR1 (arXiv 2505.22312), which has one target and ``coef_min`` 0, as TRL's
    ``use_adaptive_entropy``; ``explain`` says what differs.

    Args:
        target: nats, or points of step and nats. coef: c of the first step. delta: by which c changes a step, >= 0.
        coef_min, coef_max: bounds of c; with coef_min < 0 entropy above the target is pushed down, not only left to fall.

    Raises:
        ConfigError: a value outside these.
    """

    needs = frozenset({"entropy.grad"})
    promises = frozenset({"alone"})
    neutral: Mapping[str, Any] = {"coef": 0.0, "delta": 0.0}

    def __init__(
        self,
        *,
        target: float | Sequence[Sequence[float]] = 0.2,
        coef: float = 0.005,
        delta: float = 0.005,
        coef_min: float = 0.0,
        coef_max: float = 1.0,
    ):
        self.points = _points(target)
        if not delta >= 0:
            raise ConfigError(f"plugin.target_entropy.delta={delta} would drive entropy away. Expected delta >= 0.")
        if not coef_min <= coef <= coef_max:
            raise ConfigError(
                f"plugin.target_entropy.coef={coef} is not between coef_min={coef_min} and coef_max={coef_max}. "
                "Expected coef_min <= coef <= coef_max."
            )
        self.delta, self.coef_min, self.coef_max = delta, coef_min, coef_max
        self.coef = coef
        self.last: float | None = None  # mean entropy of the step before
        self._seen = StepEntropy()

    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        if (over := self._seen.observe(tokens)) is not None:
            self.last = over.mean
            change = self.delta if over.mean <= self.target(over.step) else -self.delta
            self.coef = min(max(self.coef + change, self.coef_min), self.coef_max)
        target = self.target(tokens.step)
        towards = self.last is None or (self.coef > 0) == (self.last <= target)
        coef = self.coef if towards else 0.0
        for name, value in {"coef": coef, "target": target}.items():
            signal = signal.log(name, torch.full_like(tokens.entropy, value), tokens.mask)
        return signal.penalise("bonus", -tokens.entropy, coef, tokens.mask) if coef else signal

    def target(self, step: int) -> float:
        """Nats aimed at in a step."""
        for (start, low), (end, high) in pairwise(self.points):
            if start <= step < end:
                return low + (high - low) * (step - start) / (end - start)
        return self.points[0][1] if step < self.points[0][0] else self.points[-1][1]

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef, "last": self.last, "seen": self._seen.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.coef, self.last = state["coef"], state["last"]
        self._seen.load_state_dict(state["seen"])

    def explain(self) -> Explanation:
        """The controller at these settings, before it has seen anything."""
        where = [f"{nats:g} from step {step:g}" for step, nats in self.points]
        aim = f"T = {self.points[0][1]:g}" if len(self.points) == 1 else f"T = {', '.join(where)}, linear between"
        return Explanation(
            formula=[
                f"c = {self.coef:g} at first; after a step + {self.delta:g} where the mean H of its forwards <= T, else - {self.delta:g}; "
                f"kept in [{self.coef_min:g}, {self.coef_max:g}]",
                f"bonus = -H of all tokens, with c where it pulls towards T, else 0;  {aim}",
            ],
            reads=["entropy"],
            changes=[],
            statistics={"parts of mean H": "world"},
            penalties={"bonus": (self.coef, "all")} if self.coef else {},
            differs=list(self._differences()),
        )

    def _differences(self) -> Iterator[str]:
        if len(self.points) > 1:
            yield "the paper's target is constant"
        if self.coef_min < 0:
            yield "the paper never pushes entropy down: its smallest coefficient is 0"
        yield "the paper asks the entropy of this step's rollout whether c acts; here, as in TRL, that of the step before"
        if self.coef:
            yield "the paper's first coefficient is 0"


def _points(target: float | Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """The target as (step, nats).

    Raises:
        ConfigError: it is neither a number nor points.
    """
    points = [[0, target]] if isinstance(target, int | float) else list(target) if isinstance(target, Sequence) else []
    pairs = all(
        isinstance(point, Sequence) and len(point) == 2 and all(isinstance(x, int | float) for x in point)
        for point in points
    )
    if not points or isinstance(target, str | bool) or not pairs:
        raise ConfigError(f"plugin.target_entropy.target={target} is no target. {_POINTS}")
    if not all(0 <= nats < math.inf for _, nats in points) or any(a[0] >= b[0] for a, b in pairwise(points)):
        raise ConfigError(
            f"plugin.target_entropy.target={target} has negative nats or steps that do not rise. {_POINTS}"
        )
    return [(step, nats) for step, nats in points]
