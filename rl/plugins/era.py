"""Sharpen or flatten the policy of correct completions whose entropy leaves a range, so that the update moves it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rl.contract import Explanation, RunFacts, Signal, TokenBatch
from rl.errors import ConfigError
from rl.plugins.checks import fraction as check_fraction
from rl.reduce import Reduce


class Era:
    """Take the loss of correct completions of low entropy from sharper logits, of high entropy from flatter ones.

    With H_top the mean of each completion's highest ``fraction`` of entropies, of the current policy and without gradient,
    logits z and A > 0::

        H_top < low   p' = softmax(k z),  A' = A / k
        H_top > high  p' = softmax(z / k),  A' = A k
        otherwise, and for A <= 0:  p' = p,  A' = A

    Rollouts are drawn from p; the loss has r = p' / p'_old, which is 1 in value: it needs an on-policy run. The gradient of the
    logits is that of p' for A: a policy that is too certain looks more certain still to the update, which then has less reason to
    make it so. Source: Entropy Regularizing Activation (arXiv 2510.08549), its activation for language models; ``explain`` says
    what differs from its code.

    Args:
        low, high: nats, low < high. k: > 0; 1 is plain GRPO. fraction: of a completion's tokens, at least one.
        scale_advantages: False leaves A' = A, as the released script.

    Raises:
        ConfigError: a value outside these.
    """

    needs = frozenset({"logit_scale"})
    promises = frozenset({"alone"})
    neutral: Mapping[str, Any] = {"k": 1.0}

    def __init__(
        self,
        *,
        low: float = 0.45,
        high: float = 3.0,
        k: float = 2.0,
        fraction: float = 0.2,
        scale_advantages: bool = True,
    ):
        check_fraction("era.fraction", fraction, "0.2 takes the top 20 %.")
        if not low < high:
            raise ConfigError(f"plugin.era.low={low} is not below high={high}. The paper's range is 0.45 to 3 nats.")
        if not k > 0:
            raise ConfigError(f"plugin.era.k={k} scales no logits. Expected k > 0; the paper's is 2.")
        self.low, self.high, self.k, self.fraction = low, high, k, fraction
        self.scale_advantages = scale_advantages

    @torch.no_grad()
    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        if self.k == 1:
            return signal
        top = self._top(tokens)
        right = (signal.advantages > 0) & tokens.mask
        low, high = right & (top < self.low), right & (top > self.high)
        scale = torch.ones_like(signal.advantages).masked_fill(low, self.k).masked_fill(high, 1 / self.k)
        if self.scale_advantages:
            signal = signal.shape(signal.advantages / scale)
        signal = signal.scale_logits(scale).log("entropy_top", top.expand_as(scale), tokens.mask)
        return signal.log("low", low.float(), tokens.mask).log("high", high.float(), tokens.mask)

    def _top(self, tokens: TokenBatch) -> Tensor:
        """(B, 1) the mean of each completion's highest entropies."""
        count = (self.fraction * tokens.mask.sum(-1, keepdim=True)).long().clamp(min=1)
        highest = tokens.reduce.largest(tokens.entropy, count, "response")
        return Reduce(highest).mean(tokens.entropy, "response")

    def explain(self) -> Explanation:
        """The activation at these settings."""
        if self.k == 1:
            return Explanation(formula=["p' = p: k is 1"], reads=[], changes=[])
        k, low, high = f"{self.k:g}", f"{self.low:g}", f"{self.high:g}"
        shaped = (f",  A' = A / {k}", f",  A' = A x {k}") if self.scale_advantages else ("", "")
        return Explanation(
            formula=[
                f"A > 0 and H_top < {low}:  p' = softmax({k} z){shaped[0]}",
                f"A > 0 and H_top > {high}:  p' = softmax(z / {k}){shaped[1]}",
                f"H_top = mean of the max(1, floor({self.fraction:g} n)) highest H of the n tokens; r = p' / p'_old",
            ],
            reads=["advantages", "entropy"],
            changes=["logit_scale", *(["advantages"] if self.scale_advantages else [])],
            statistics={"H_top": "response"},
            differs=list(self._differences()),
        )

    def check(self, run: RunFacts) -> list[str]:
        if not run.on_policy and self.k != 1:
            return ["it needs one update from each rollout, and the trainer will refuse this run."]
        return []

    def _differences(self) -> Iterator[str]:
        if self.scale_advantages:
            yield "the released script leaves A as it is (adv_scale=False)"
            yield "where its code scales A, it does so for A < 0 too, whose logits it does not scale"
        else:
            yield "the paper divides A by the scale of the logits; this is its released script"
        yield "its runs clip ratios at 0 and 2 only, and above 10 where A < 0: trainer.epsilon=1 trainer.epsilon_high=1 trainer.delta=10"
        yield "the script also takes log-probabilities among the 20 likeliest words only (topk=True)"
