"""Weigh down the tokens whose update would change entropy the most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rl.contract import Explanation, RunFacts, Scope, Signal, TokenBatch
from rl.errors import ConfigError
from rl.plugins.checks import one_of

Mapping_ = Literal["exp", "linear", "asymmetric"]
Form = Literal["code", "theorem"]

_FLOOR = 0.02  # of max |Omega|: below it the smallest weight stays above w_min (official code)
_TINY = 1e-8  # probabilities are clamped to [tiny, 1 - tiny] (official code)


class Steer:
    """Multiply each token's policy loss by a weight that falls with the entropy change its update would cause.

    Every formula is without gradient; p = current and o = old probability of the token, H = the old policy's entropy::

        code     Omega = (A / o) p (1 - p) (ln p + H)
        theorem  Omega = I_clip A (p / o) p (1 - p) (ln p + H),  I_clip = 0 where PPO clips the token
        exp      w = clamp(exp(-k |Omega|), w_min, 1),        k = -ln(w_min) / max(max |Omega|, 0.02)
        linear   w = w_max - (|Omega| - min) (w_max - w_min) / (max - min);  the middle where max == min
        asymmetric  w = clamp(exp(-k Omega), w_min, w_max): tokens that raise entropy gain weight

    Source: STEER (arXiv 2510.10150); "code" is the released loss mode ``entropy_control``, "asymmetric" its later addition;
    ``explain`` says what differs.
    Weights are not renormalised: the denominator stays all trainable tokens. Omega uses the advantages as earlier plug-ins
    shaped them, without their weights.

    Args:
        mapping, form: see above. w_min: smallest weight, 0 < w_min <= 1. w_max: largest, for linear and asymmetric.
        epsilon_low, epsilon_high: the PPO clip range, for the theorem's indicator.
        scope: where max and min are taken; the code takes the micro-batch.

    Raises:
        ConfigError: a value outside these.
    """

    neutral: Mapping[str, Any] = {"w_min": 1.0, "w_max": 1.0}

    def __init__(
        self,
        *,
        mapping: Mapping_ = "exp",
        form: Form = "code",
        w_min: float = 0.7,
        w_max: float = 1.0,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.28,
        scope: Scope = "micro",
    ):
        one_of("steer.mapping", mapping, get_args(Mapping_))
        one_of("steer.form", form, get_args(Form))
        one_of("steer.scope", scope, ("response", "micro", "world"))
        if not 0 < w_min <= 1:
            raise ConfigError(f"plugin.steer.w_min={w_min} is no weight. Expected 0 < w_min <= 1; the paper's is 0.7.")
        if w_max < w_min:
            raise ConfigError(f"plugin.steer.w_max={w_max} is below w_min={w_min}. Expected w_max >= w_min.")
        self.mapping, self.form, self.scope = mapping, form, scope
        self.w_min, self.w_max = w_min, w_max
        self.epsilon_low, self.epsilon_high = epsilon_low, epsilon_high
        self.needs = frozenset({"old_entropy"})
        self.promises = frozenset({"alone"} if scope == "response" else ())

    @torch.no_grad()
    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        weight = self._weight(tokens, self.omega(tokens, signal.advantages)).where(tokens.mask, 1.0)
        return signal.scale(weight).log("weight", weight, tokens.mask)

    @torch.no_grad()
    def omega(self, tokens: TokenBatch, advantages: Tensor) -> Tensor:
        """(B, T) first-order entropy change of each token's update, up to sign and step size; 0 where not finite."""
        p = tokens.logp.exp().clamp(_TINY, 1 - _TINY)
        old = tokens.old_logp.exp().clamp(_TINY, 1.0)
        omega = advantages / old * p * (1 - p) * (p.log() + tokens.old_entropy)
        if self.form == "theorem":
            ratio = (tokens.logp - tokens.old_logp).exp()
            clipped = (advantages > 0) & (ratio > 1 + self.epsilon_high)
            clipped |= (advantages < 0) & (ratio < 1 - self.epsilon_low)
            omega = (omega * p).masked_fill(clipped, 0.0)
        return omega.where(omega.isfinite(), 0.0)

    def explain(self) -> Explanation:
        """The weight at these settings."""
        low, high = self.w_min, self.w_max
        strength = f"k = {-math.log(low):.4g} / max(max |Ω|, {_FLOOR:g})"
        lines = {
            "exp": [f"w = clamp(exp(-k |Ω|), {low:g}, 1),  {strength}"],
            "asymmetric": [f"w = clamp(exp(-k Ω), {low:g}, {high:g}),  {strength}"],
            "linear": [
                f"w = {high:g} - {high - low:.4g} (|Ω| - min |Ω|) / (max |Ω| - min |Ω|), "
                f"{(low + high) / 2:.4g} where the two are equal"
            ],
        }
        omega = "Ω = (A / p_old) p (1 - p) (ln p + H)"
        if self.form == "theorem":
            ends = f"[{1 - self.epsilon_low:.4g}, {1 + self.epsilon_high:.4g}]"
            omega = f"Ω = A (p / p_old) p (1 - p) (ln p + H), 0 where A pulls p / p_old further out of {ends}"
        statistics: dict[str, Scope] = {"max |Ω|": self.scope}
        if self.mapping == "linear":
            statistics["min |Ω|"] = self.scope
        return Explanation(
            formula=[omega, *lines[self.mapping]],
            reads=["advantages", "logp", "old_logp", "old_entropy"],
            changes=["weight"],
            statistics=statistics,
            differs=list(self._differences()),
        )

    def _differences(self) -> Iterator[str]:
        if self.form == "code":
            yield "the paper's theorem has A p / p_old for A / p_old, and 0 where PPO clips; this is its released code"
        else:
            yield "the released code has A / p_old for A p / p_old, and no clip indicator; this is the paper's theorem"
        if self.mapping != "exp":
            yield "the paper and the released script map with exp"
        if self.scope != "micro":
            yield f"the code takes the largest |Ω| of one rank's micro-batch, not of the {self.scope}"
        if self.w_min != 0.7:
            yield "the paper's best smallest weight is 0.7, the released script's 0.8"
        yield "its runs also clip ratios above 10 where A < 0 (dual clip), as trainer.delta=10 does"

    def _weight(self, tokens: TokenBatch, omega: Tensor) -> Tensor:
        size = omega.abs()
        largest = tokens.reduce.max(size, self.scope).clamp(min=0.0)  # an empty scope has -inf
        if self.mapping == "linear":
            smallest = tokens.reduce.min(size, self.scope)
            spread = largest - smallest
            linear = self.w_max - (size - smallest) * (self.w_max - self.w_min) / spread
            return linear.clamp(self.w_min, self.w_max).where(spread > 0, (self.w_min + self.w_max) / 2)
        k = -math.log(self.w_min) / largest.clamp(min=_FLOOR)
        if self.mapping == "exp":
            return (-k * size).exp().clamp(self.w_min, 1.0)
        return (-k * omega).exp().clamp(self.w_min, self.w_max)

    def check(self, run: RunFacts) -> list[str]:
        if self.scope == "micro" and run.micro_batch < 8:
            return [f"the largest |Omega| is taken over micro-batches of {run.micro_batch}; scope=world is steadier."]
        return []
