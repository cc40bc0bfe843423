"""Train on the forking tokens only: the most uncertain ``rho`` of the tokens keep their gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from torch import Tensor

from rl.contract import Denominator, Explanation, Scope, Signal, TokenBatch
from rl.errors import ConfigError
from rl.plugins.checks import fraction, n_all_over_kept, one_of
from rl.plugins.windows import mean_ahead

Selector = Literal["quantile", "topk"]
Policy = Literal["current", "rollout"]


class ForkMask:
    """Drop the policy gradient of every token outside the top ``rho`` by entropy.

    ``J = 1/N_all sum_t 1[H_t >= tau_rho] min(r_t A, clip(r_t) A)`` with H the policy's entropy at the rollout
    temperature and tau over all tokens of the scope, never through the gradient. Source: Beyond the 80/20 Rule
    (arXiv 2506.01939), section 5. KL and other penalties keep all tokens. The defaults are TRL's ``top_entropy_quantile``;
    ``explain`` says what differs from the paper and its code.

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
        window: 0 is the method; w > 0 takes for H_t the mean entropy of the next w tokens, ARES's window entropy
            (arXiv 2510.08457, w = 4), and 0 for the last w tokens of a completion. Not with the scope rollout.

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
        window: int = 0,
    ):
        fraction("fork_mask.rho", rho, "0.2 keeps the top 20 %.")
        one_of("fork_mask.selector", selector, get_args(Selector))
        one_of("fork_mask.scope", scope, get_args(Scope))
        one_of("fork_mask.denominator", denominator, get_args(Denominator))
        one_of("fork_mask.keep", keep, ("high", "low"))
        one_of("fork_mask.policy", policy, get_args(Policy))
        if not isinstance(window, int) or isinstance(window, bool) or window < 0:
            raise ConfigError(
                f"plugin.fork_mask.window={window} is no number of tokens. Expected 0, a token's own entropy, or more; ARES's is 4."
            )
        if window and scope == "rollout":
            raise ConfigError(
                f"plugin.fork_mask.window={window} does not work with scope=rollout, which records single entropies, not windows. "
                "Set scope to response, micro or world."
            )
        self.rho, self.selector, self.scope, self.denominator, self.keep = rho, selector, scope, denominator, keep
        self.policy, self.window = policy, window
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

    def explain(self) -> Explanation:
        """The mask at these settings."""
        high = self.keep == "high"
        h = "W" if self.window else "H"
        if self.selector == "quantile":
            rule = f"keep = 1[{h} {'>=' if high else '<'} τ],  τ = the {1 - self.rho:.4g}-quantile of {h}"
            of_several = "τ"
        else:
            rule = f"keep = 1[{h} {'is' if high else 'is not'} among the ceil({self.rho:.4g} n) highest of n tokens]"
            of_several = "the highest"
        statistics: dict[str, Scope] = {of_several: self.scope}
        if self.denominator == "kept":
            statistics["n_all / n_kept"] = "world" if self.scope in ("world", "rollout") else "micro"
        entropy = "entropy" if self.policy == "current" else "old_entropy"
        window = [f"W = the mean of H over the next {self.window} tokens, 0 where fewer follow"] if self.window else []
        return Explanation(
            formula=[rule, *window],
            reads=[entropy, *(["rollout_entropy"] if self.scope == "rollout" else [])],
            changes=["keep"],
            statistics=statistics,
            denominator=self.denominator,
            differs=list(self._differences()),
        )

    def _differences(self) -> Iterator[str]:
        if self.window:
            yield "the paper takes each token's own entropy; the window is ARES's, whose code masks nothing but counts with it"
        if self.scope in ("response", "rollout"):
            yield f"τ is that of the {self.scope}; the paper's is of a batch or micro-batch, never of one response"
        if self.denominator == "kept":
            yield "the paper's equation divides by all tokens; by the kept ones, as here, does its code"
        if self.keep == "low":
            yield "this is the paper's ablation: the other tokens are trained on"
        if self.policy == "rollout":
            yield "paper and code take the current policy's entropy; the two are one until the first update from a rollout"
        code = {
            "exactly ceil(rho n) tokens, no further ones of equal H": self.selector != "topk",
            "of one rank's micro-batch": self.scope != "micro",
            "divided by their number, which makes gradients about 1 / rho times as large": self.denominator != "kept",
        }
        if other := [what for what, here in code.items() if here]:
            yield f"the official code: {', '.join(other)}"

    def _forking(self, tokens: TokenBatch) -> Tensor:
        entropy = tokens.entropy.detach() if self.policy == "current" else tokens.old_entropy
        if self.window:
            entropy, _ = mean_ahead(entropy, tokens.mask, self.window)
        if self.selector == "topk":
            return tokens.reduce.topk(entropy, self.rho, self.scope, rollout=tokens.rollout_entropy)
        threshold = tokens.reduce.quantile(entropy, 1 - self.rho, self.scope, rollout=tokens.rollout_entropy)
        return (entropy >= threshold) & tokens.mask
