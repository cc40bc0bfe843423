"""Hold the tokens whose probability and advantage rise together most near the policy of the rollout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rl.contract import Explanation, RunFacts, Scope, Signal, TokenBatch
from rl.errors import ConfigError
from rl.plugins.checks import covariance, one_of


class KlCov:
    """Penalise how far the few tokens whose update lowers entropy most have moved from the rollout's policy.

    With p and A of the current policy, means over the N tokens of the scope::

        cov = (A - mean A) (ln p - mean ln p), without gradient
        L + coef 1/N sum |ln p - ln p_old| over the max(1, floor(fraction N)) tokens of largest cov

    Source: The Entropy Mechanism (arXiv 2505.22617), KL-Cov; verl's loss mode ``kl_cov``. A uses the advantages as earlier
    plug-ins shaped them. Before the first update from a rollout p is p_old, and the penalty has no gradient.

    Args:
        fraction: of the scope's tokens, 0 <= fraction <= 1; 0 is plain GRPO. coef: >= 0.
        scope: of means and selection: "micro" one forward on one rank, as the code, or "world".

    Raises:
        ConfigError: a value outside these.
    """

    needs = frozenset({"logp.grad"})
    neutral: Mapping[str, Any] = {"coef": 0.0}

    def __init__(self, *, fraction: float = 2e-3, coef: float = 1.0, scope: Scope = "micro"):
        one_of("kl_cov.scope", scope, ("micro", "world"))
        if not 0 <= fraction <= 1:
            raise ConfigError(f"plugin.kl_cov.fraction={fraction} is no share. Expected 0 to 1; the paper's is 0.002.")
        if not coef >= 0:
            raise ConfigError(f"plugin.kl_cov.coef={coef} would reward what it penalises. Expected coef >= 0.")
        self.fraction, self.coef, self.scope = fraction, coef, scope

    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        if not (self.fraction and self.coef):
            return signal
        cov = covariance(tokens, signal.advantages, self.scope)
        n = max(1, int(self.fraction * tokens.reduce.count(self.scope).item()))
        held = tokens.reduce.largest(cov, n, self.scope)
        moved = (tokens.logp - tokens.old_logp).abs()
        return signal.penalise("kl", moved, self.coef, held).log("cov", cov, held).log("moved", moved, held)

    def explain(self) -> Explanation:
        """The penalty at these settings."""
        if not (self.fraction and self.coef):
            return Explanation(formula=["no penalty: fraction or coef is 0"], reads=[], changes=[])
        return Explanation(
            formula=[
                "cov = (A - mean A) (ln p - mean ln p)",
                f"kl = |ln p - ln p_old| of the max(1, floor({self.fraction:g} N)) tokens of largest cov",
            ],
            reads=["advantages", "logp", "old_logp"],
            changes=[],
            statistics={"means, N and the largest cov": self.scope},
            penalties={"kl": (self.coef, "all")},
            differs=list(self._differences()),
        )

    def _differences(self) -> Iterator[str]:
        yield "the code has no PPO clip beside it, as trainer.epsilon=1 trainer.epsilon_high=1e6 leaves it out"
        yield "with several ranks it divides by one rank's tokens, here by those of all"
        if self.scope == "world":
            yield "the code takes means and selection of one rank's micro-batch, not of the world"
        if self.fraction != 2e-3:
            yield "the paper's fraction is 0.002 for 7B and 0.0002 for 32B, verl's default 0.0002"

    def check(self, run: RunFacts) -> list[str]:
        if run.on_policy and self.coef:
            return [
                "every update is the first from its rollout, where ln p = ln p_old and the penalty has no gradient. Set "
                "trainer.steps_per_generation to a multiple of trainer.gradient_accumulation_steps."
            ]
        return []
