"""Train on the forking tokens only: the most uncertain ``rho`` of the tokens keep their gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from rl.contract import Denominator, Scope, Signal, TokenBatch
from rl.plugins.checks import fraction, n_all_over_kept, one_of

Selector = Literal["quantile", "topk"]
Policy = Literal["current", "rollout"]


class ForkMask:
    """Drop the policy gradient of every token outside the top ``rho`` by entropy.

    ``J = 1/N_all sum_t 1[H_t >= tau_rho] min(r_t A, clip(r_t) A)`` with H the policy's entropy at the rollout
    temperature and tau over all tokens of the scope, never through the gradient. Source: Beyond the 80/20 Rule
    (arXiv 2506.01939), section 5. KL and other penalties keep all tokens.

    Differs from the official code in the defaults: the code takes ``selector="topk", scope="micro", denominator="kept"``,
    the paper's equation divides by all tokens. TRL's ``top_entropy_quantile`` is ``selector="quantile", scope="world",
    denominator="all"``, which is the default here.

    Args:
        rho: share of the tokens that count as forking, 0 < rho <= 1.
        selector: "quantile" keeps H >= the (1 - rho)-quantile, ties included; "topk" exactly ceil(rho n).
        scope: where the share is taken: one "response", this "micro"-batch, the micro-batch of the "world" of ranks, or the
            whole "rollout" (threshold on the entropies recorded before the first update).
        denominator: "all" leaves TRL's denominator; "kept" makes the loss a mean over the kept tokens of the micro-batch
            (over the ranks for the scopes world and rollout).
        keep: "high" is the method; "low" keeps everything else instead, the paper's ablation.
        policy: whose entropy: the "current" policy's (the paper, the official code and TRL), or that of the "rollout". On-policy
            they are the same; off-policy only "rollout" knows the mask before the update, which then skips all other tokens.

    Raises:
        ConfigError: a value outside these.
    """

    neutral: Mapping[str, Any] = {"rho": 1.0, "keep": "high"}

    def __init__(
        self,
        *,
        rho: float = 0.2,
        selector: Selector = "quantile",
        scope: Scope = "world",
        denominator: Denominator = "all",
        keep: Literal["high", "low"] = "high",
        policy: Policy = "current",
    ):
        fraction("fork_mask.rho", rho, "0.2 keeps the top 20 %.")
        one_of("fork_mask.selector", selector, get_args(Selector))
        one_of("fork_mask.scope", scope, get_args(Scope))
        one_of("fork_mask.denominator", denominator, get_args(Denominator))
        one_of("fork_mask.keep", keep, ("high", "low"))
        one_of("fork_mask.policy", policy, get_args(Policy))
        self.rho, self.selector, self.scope, self.denominator, self.keep = rho, selector, scope, denominator, keep
        self.policy = policy
        needs = {"old_entropy"} if policy == "rollout" else set()
        self.needs = frozenset(needs | ({"rollout_entropy"} if scope == "rollout" else set()))
        promises = {"recorded"} if policy == "rollout" else set()
        alone = scope in ("response", "rollout") and denominator == "all"
        self.promises = frozenset(promises | ({"alone"} if alone else set()))

    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        forking = self._forking(tokens)
        kept = forking if self.keep == "high" else tokens.mask & ~forking
        rescale = None
        if self.denominator == "kept":
            rescale = n_all_over_kept(tokens, kept, "world" if self.scope in ("world", "rollout") else "micro")
        return signal.drop(tokens.mask & ~kept, rescale).log("kept", kept.float(), tokens.mask)

    def _forking(self, tokens: TokenBatch) -> Tensor:
        entropy = tokens.entropy.detach() if self.policy == "current" else tokens.old_entropy
        if self.selector == "topk":
            return tokens.reduce.topk(entropy, self.rho, self.scope, rollout=tokens.rollout_entropy)
        threshold = tokens.reduce.quantile(entropy, 1 - self.rho, self.scope, rollout=tokens.rollout_entropy)
        return (entropy >= threshold) & tokens.mask
