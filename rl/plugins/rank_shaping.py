"""Shape advantages by how likely and how highly ranked each sampled token was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rl.contract import Explanation, Signal, TokenBatch
from rl.errors import ConfigError


class RankShaping:
    """Scale positive advantages by the token's probability, and shift negative ones by its rank.

    With p and rank of the sampled token under the current policy, detached::

        A > 0:  A' = A (1 - p)^beta
        A < 0:  A' = A + (lam_head if rank <= k else lam_tail)

    beta < 0 strengthens confident correct tokens (precision), beta > 0 weakens them (diversity); lam_tail < 0 pushes the
    tail down, lam_head > 0 spares the likely alternatives. Source: "Diversity or Precision?" (arXiv 2512.22955),
    equations 11 to 13, carried from its next-token objective (``rl.warmstart.next_token_loss``) to RL; ``explain`` says
    what differs. Tokens with A exactly 0 stay untouched, otherwise groups without reward spread would train on the
    shaping alone.

    Args:
        beta: exponent > -1, where (1 - p)^(1 + beta), the gradient's size, stays bounded. lam_head, lam_tail: shifts.
        k: ranks 1..k are the head.

    Raises:
        ConfigError: a value outside these.
    """

    neutral: Mapping[str, Any] = {"beta": 0.0, "lam_head": 0.0, "lam_tail": 0.0}

    def __init__(self, *, beta: float = -0.25, lam_head: float = 0.0, lam_tail: float = 0.0, k: int = 100):
        if not beta > -1:
            raise ConfigError(f"plugin.rank_shaping.beta={beta} is too low. Expected beta > -1; the paper's is -0.25.")
        if not (isinstance(k, int) and k >= 0):
            raise ConfigError(f"plugin.rank_shaping.k={k} is no count. Expected an integer >= 0; the paper's is 100.")
        self.beta, self.lam_head, self.lam_tail, self.k = beta, lam_head, lam_tail, k
        self.needs, self.promises = frozenset({"rank"} if lam_head or lam_tail else ()), frozenset({"alone"})

    def explain(self) -> Explanation:
        """The shaping at these settings."""
        lines, reads = [], ["advantages"]
        if self.beta:
            lines.append(f"A > 0:  A' = A (1 - p)^{self.beta:g}")
            reads.append("logp")
        if self.lam_head or self.lam_tail:
            lines.append(f"A < 0:  A' = A + ({self.lam_head:g} where rank <= {self.k}, else {self.lam_tail:g})")
            reads.append("rank")
        return Explanation(
            formula=lines or ["A' = A: all settings are neutral"],
            reads=reads if lines else [],
            changes=["advantages"] if lines else [],
            differs=[
                "the paper shapes the next-token objective before RL, by its equations 11 to 13; in RL this is a reconstruction",
                "its factor 1 / p is left out: sampling from the policy brings it already",
                "there is no official code",
            ],
        )

    @torch.no_grad()
    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        a = signal.advantages
        shaped = a
        if self.beta:
            rest = (1 - tokens.logp.exp()).clamp(min=1e-6)
            shaped = (a * rest**self.beta).where((a > 0) & tokens.mask, shaped)
        if self.lam_head or self.lam_tail:
            head = tokens.rank <= self.k
            shift = torch.where(head, a.new_tensor(self.lam_head), a.new_tensor(self.lam_tail))
            shaped = (a + shift).where((a < 0) & tokens.mask, shaped)
            signal = signal.log("head", head.float(), tokens.mask)
        return signal.shape(shaped)
