"""Add a share of each token's entropy to its advantage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rl.contract import Explanation, Signal, TokenBatch
from rl.errors import ConfigError


class EntropyAdvantage:
    """Raise the advantage of uncertain tokens, never so much that it changes its sign.

    With H the current policy's entropy, without gradient::

        psi = min(alpha H, |A| / kappa),  A' = A + psi

    Correct tokens gain what wrong ones lose less by; A = 0 stays 0. Source: Reasoning with Exploration: An Entropy
    Perspective (arXiv 2506.14758), its entropy-based advantage.

    Args:
        alpha: >= 0, advantage per nat; 0 is plain GRPO. kappa: > 1, so that psi is less than |A|.

    Raises:
        ConfigError: a value outside these.
    """

    needs = frozenset()
    promises = frozenset({"alone"})
    neutral: Mapping[str, Any] = {"alpha": 0.0}

    def __init__(self, *, alpha: float = 0.4, kappa: float = 2.0):
        if not alpha >= 0:
            raise ConfigError(f"plugin.entropy_advantage.alpha={alpha} is too low. Expected >= 0; the paper's is 0.4.")
        if not kappa > 1:
            raise ConfigError(
                f"plugin.entropy_advantage.kappa={kappa} could turn a wrong token into a right one. Expected kappa > 1; "
                "the paper's is 2."
            )
        self.alpha, self.kappa = alpha, kappa

    @torch.no_grad()
    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        a = signal.advantages
        psi = torch.minimum(self.alpha * tokens.entropy, a.abs() / self.kappa).where(tokens.mask, 0.0)
        return signal.shape(a + psi).log("psi", psi, tokens.mask)

    def explain(self) -> Explanation:
        """The shaping at these settings."""
        return Explanation(
            formula=[f"A' = A + min({self.alpha:g} H, |A| / {self.kappa:g})"] if self.alpha else ["A' = A: alpha is 0"],
            reads=["advantages", "entropy"] if self.alpha else [],
            changes=["advantages"] if self.alpha else [],
            differs=["the paper's formula; its code was not compared"],
        )
