"""Take a quantile of a prompt's rewards for the baseline instead of their mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from rl.contract import Explanation, Rollout, Signal, TokenBatch
from rl.plugins.checks import fraction, one_of

Form = Literal["code", "paper"]

_EPSILON = 1e-4  # TRL's, of its own advantages


class QuantileBaseline:
    """Measure each completion against the ``k``-quantile of its prompt's rewards, so that most completions get no advantage.

    With R_i the rewards of a prompt's G completions and sigma their sample deviation::

        A_i = (R_i - Q_k) / (sigma + 1e-4)
        code   Q_k interpolates between the two nearest rewards (torch.quantile)
        paper  Q_k = the smallest R with F(R) >= k, F the share of rewards up to R

    With rewards 0 and 1 the paper's baseline is 0 for prompts solved at most 1 - k of the time, where only the right ones are
    trained on, and 1 for the others, where only the wrong ones are. Source: Quantile Advantage Estimation (arXiv 2509.22611)
    and the lines of its code that its description shows; ``explain`` says what differs. Advantages that earlier plug-ins
    shaped, and trainer.scale_rewards, are replaced.

    Args:
        quantile: k, 0 < k <= 1. form: which of the two baselines.

    Raises:
        ConfigError: a value outside these.
    """

    needs = frozenset({"zero_advantage"})  # a reward that equals its group's mean need not equal the quantile
    promises = frozenset({"recorded", "alone"})
    neutral: None = None  # it replaces the advantages

    def __init__(self, *, quantile: float = 0.4, form: Form = "code"):
        fraction("quantile_baseline.quantile", quantile, "the paper's is 0.4.")
        one_of("quantile_baseline.form", form, get_args(Form))
        self.quantile, self.form = quantile, form

    def at_rollout(self, rollout: Rollout) -> Mapping[str, Tensor]:
        """The advantage of each completion."""
        return {"advantage": rollout.own(self.advantages(rollout.groups(rollout.reward)))}

    def advantages(self, rewards: Tensor) -> Tensor:
        """(P, G) of the (P, G) rewards of P prompts."""
        if self.form == "code":
            baseline = torch.quantile(rewards, self.quantile, dim=1, keepdim=True)
        else:
            place = max(1, math.ceil(self.quantile * rewards.shape[1] - 1e-9))  # 0.28 * 25 is a little more than 7
            baseline = rewards.kthvalue(place, dim=1, keepdim=True).values
        return (rewards - baseline) / (rewards.std(1, keepdim=True) + _EPSILON)

    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        a = tokens.noted["advantage"].to(signal.advantages).unsqueeze(1).expand(tokens.mask.shape)
        return signal.shape(a.where(tokens.mask, signal.advantages)).log("trained", (a != 0).float(), tokens.mask)

    def explain(self) -> Explanation:
        """The baseline at these settings."""
        k = f"{self.quantile:g}"
        rule = (
            f"the {k}-quantile of the rewards R, interpolated"
            if self.form == "code"
            else f"the smallest of the rewards R that at least a share {k} of them does not exceed"
        )
        return Explanation(
            formula=[f"A' = (R - Q) / (σ + {_EPSILON:g}),  Q = {rule}"],
            reads=["reward"],
            changes=["advantages"],
            statistics={"Q": "group", "σ": "group"},
            differs=list(self._differences()),
        )

    def _differences(self) -> Iterator[str]:
        if self.form == "code":
            yield (
                "the paper's two regimes have Q either 0 or 1; its code interpolates, as here, and between the two Q is a fraction"
            )
        else:
            yield "the code interpolates the quantile (torch.quantile); this is the paper's definition"
        if self.quantile != 0.4:
            yield "the paper's k is 0.4"
        yield "the code adds 1e-6 to σ; this is TRL's 1e-4"
        yield "its runs are DAPO's: groups without spread are resampled there"
