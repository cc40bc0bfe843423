"""Reinforce right and wrong completions by fixed amounts, instead of by their group's spread."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rl.contract import Explanation, Signal, TokenBatch
from rl.errors import ConfigError


class WReinforce:
    """Give every right completion the same small positive advantage and every wrong one the same negative, whatever its group did.

    With R the completion's reward, without a baseline and without the group's deviation::

        A = positive  where R >= correct_from,  else  A = -negative

    (0.1, 1) is W-REINFORCE with lambda 0.1, (1, 0) positive sample reinforcement (PSR), (0, 1) negative (NSR). Source: "The
    Surprising Effectiveness of Negative Reinforcement" (arXiv 2506.01347), the objectives PSR, NSR and their weighted sum, and
    its official code; ``explain`` says what differs. Completions whose whole group is right, or wrong, are trained on too.
    Advantages that earlier plug-ins shaped are replaced.

    Args:
        positive: of a right completion. negative: of a wrong one, with its sign turned. Both >= 0, one of them > 0.
        correct_from: weighted sum of the rewards from which a completion is right.

    Raises:
        ConfigError: a value outside these.
    """

    needs = frozenset({"zero_advantage"})
    promises = frozenset({"recorded", "alone"})
    neutral: None = None  # it replaces the advantages

    def __init__(self, *, positive: float = 0.1, negative: float = 1.0, correct_from: float = 0.5):
        for key, value in {"positive": positive, "negative": negative}.items():
            if not value >= 0:
                raise ConfigError(
                    f"plugin.w_reinforce.{key}={value} would turn its sign. Expected {key} >= 0; the paper's is "
                    f"{'0.1' if key == 'positive' else '1'}."
                )
        if not positive and not negative:
            raise ConfigError(
                "plugin.w_reinforce.positive and negative are both 0: nothing would be trained. Set one of them above 0."
            )
        self.positive, self.negative, self.correct_from = positive, negative, correct_from

    @torch.no_grad()
    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        right = (tokens.reward >= self.correct_from).unsqueeze(1).expand(tokens.mask.shape)
        a = torch.full_like(signal.advantages, -self.negative).masked_fill(right, self.positive)
        return signal.shape(a.where(tokens.mask, signal.advantages)).log("right", right.float(), tokens.mask)

    def explain(self) -> Explanation:
        """The two advantages at these settings."""
        return Explanation(
            formula=[f"A' = {self.positive:g} where the reward >= {self.correct_from:g}, else {-self.negative:g}"],
            reads=["reward"],
            changes=["advantages"],
            differs=list(self._differences()),
        )

    def _differences(self) -> Iterator[str]:
        if self.positive and self.negative and (self.positive, self.negative) != (0.1, 1.0):
            yield "the paper's weights are 0.1 for right and 1 for wrong"
        yield "the paper's reward is 0 or 1; any other is cut in two at correct_from"
        yield "its runs have no KL term, as trainer.beta=0"
