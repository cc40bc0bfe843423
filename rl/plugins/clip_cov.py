"""Drop a few random tokens among those whose probability and advantage rise together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from rl.contract import Explanation, Scope, Signal, TokenBatch
from rl.errors import ConfigError
from rl.plugins.checks import covariance, one_of
from rl.reduce import Reduce


class ClipCov:
    """Drop the policy gradient of a random few of the tokens whose update lowers entropy most.

    With p and A of the current policy, means over the N tokens of the scope, everything without gradient::

        cov = (A - mean A) (ln p - mean ln p)
        candidates: low < cov < high, and PPO does not clip the token
        drop max(1, floor(fraction N)) of them at random, all where there are fewer

    Source: The Entropy Mechanism (arXiv 2505.22617), Clip-Cov; verl's loss mode ``clip_cov``. The denominator stays all
    trainable tokens. A uses the advantages as earlier plug-ins shaped them. The draw is a hash of the step and of the
    completion up to the token: it repeats after a resume and on other numbers of ranks, and uses up no random numbers.

    Args:
        fraction: of the scope's tokens, 0 <= fraction <= 1; 0 is plain GRPO. low, high: the range of cov.
        epsilon_low, epsilon_high: the PPO clip range, whose tokens are no candidates.
        scope: "micro" one forward on one rank, as the code, or "world".

    Raises:
        ConfigError: a value outside these.
    """

    needs = frozenset()
    neutral: Mapping[str, Any] = {"fraction": 0.0}

    def __init__(
        self,
        *,
        fraction: float = 2e-4,
        low: float = 1.0,
        high: float = 5.0,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.28,
        scope: Scope = "micro",
    ):
        one_of("clip_cov.scope", scope, ("micro", "world"))
        if not 0 <= fraction <= 1:
            raise ConfigError(
                f"plugin.clip_cov.fraction={fraction} is no share. Expected 0 to 1; the paper's is 0.0002."
            )
        if not low < high:
            raise ConfigError(f"plugin.clip_cov.low={low} is not below high={high}. The paper's range is 1 to 5.")
        self.fraction, self.low, self.high, self.scope = fraction, low, high, scope
        self.epsilon_low, self.epsilon_high = epsilon_low, epsilon_high

    @torch.no_grad()
    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        if not self.fraction:
            return signal
        a, ratio = signal.advantages, (tokens.logp - tokens.old_logp).exp()
        clipped = ((a > 0) & (ratio > 1 + self.epsilon_high)) | ((a < 0) & (ratio < 1 - self.epsilon_low))
        cov = covariance(tokens, a, self.scope)
        candidates = tokens.mask & (cov > self.low) & (cov < self.high) & ~clipped
        n = max(1, int(self.fraction * tokens.reduce.count(self.scope).item()))
        dropped = Reduce(candidates).largest(_lots(tokens), n, self.scope)
        return signal.drop(dropped).log("candidates", candidates.float(), tokens.mask)

    def explain(self) -> Explanation:
        """The draw at these settings."""
        ends = f"[{1 - self.epsilon_low:.4g}, {1 + self.epsilon_high:.4g}]"
        return Explanation(
            formula=[
                "cov = (A - mean A) (ln p - mean ln p)",
                f"keep = 0 for max(1, floor({self.fraction:g} N)) random tokens of those with {self.low:g} < cov < {self.high:g}",
                f"that A does not pull further out of p / p_old in {ends}, where PPO clips them",
            ]
            if self.fraction
            else ["keep = 1: fraction is 0"],
            reads=["advantages", "logp", "old_logp", "ids"] if self.fraction else [],
            changes=["keep"] if self.fraction else [],
            statistics={"means, N and the draw": self.scope} if self.fraction else {},
            differs=list(self._differences()),
        )

    def _differences(self) -> Iterator[str]:
        yield "the code draws with torch's random numbers, here a hash of the completion and the step decides"
        if self.scope == "world":
            yield "the code takes means and draw of one rank's micro-batch, not of the world"
        if (self.epsilon_low, self.epsilon_high) != (1.0, 1.0):
            yield "its runs clip ratios at 0 and 2 only, as trainer.epsilon=1 trainer.epsilon_high=1 does"
        yield "its runs also clip ratios above 10 where A < 0 (dual clip), as trainer.delta=10 does"


def _lots(tokens: TokenBatch) -> Tensor:
    """(B, T) numbers in [0, 1) that look random, of the step and the tokens up to each; the same where those are."""
    place = torch.arange(1, tokens.ids.shape[1] + 1, device=tokens.ids.device)
    x = (_mix(tokens.ids.long() + 1) * (2 * place + 1)).cumsum(-1)  # integers wrap around
    return _mix(_mix(x + _mix(place)) + tokens.step).double() / 2**53


def _mix(x: Tensor) -> Tensor:
    """53 well mixed bits of each integer: the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return (x ^ ((x >> 31) & (2**33 - 1))) & (2**53 - 1)
