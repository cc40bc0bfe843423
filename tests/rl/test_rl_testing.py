"""Every law can be broken: for each a method that breaks it and nothing beside it that matters, and one that keeps them all."""

from dataclasses import replace

import pytest
import torch

from rl.contract import Explanation, Mean
from rl.testing import LAWS, check_pair, two_ranks


class Good:
    """The rarer of a completion's tokens count less; what a broken method differs in is its own."""

    needs, neutral, promises = frozenset(), {"power": 0.0}, frozenset({"alone"})
    said = {"formula": [], "reads": ["entropy"], "changes": ["weight"], "statistics": {"m": "response"}}

    def __init__(self, *, power=1.0):
        self.power = power

    def weight(self, tokens):
        mean = tokens.reduce.mean(tokens.entropy, "response").clamp(min=1e-6)
        return (tokens.entropy.detach() / mean).clamp(0, 1) ** self.power

    def __call__(self, tokens, signal):
        weight = self.weight(tokens).where(tokens.mask, 1.0)
        return signal.scale(weight).log("weight", weight, tokens.mask)

    def explain(self):
        return Explanation(**self.said)


class UnknownNeed(Good):
    needs = frozenset({"attention"})


class NoIdentity(Good):
    neutral = {"power": 0.5}


class TouchesPadding(Good):
    def __call__(self, tokens, signal):
        return signal.scale(self.weight(tokens) * 0.5)


class ReadsPadding(Good):
    def weight(self, tokens):
        return tokens.entropy.detach() / tokens.entropy.detach().amax(-1, keepdim=True).clamp(min=1e-6)


class Negative(Good):
    def weight(self, tokens):
        return tokens.entropy.detach() - 1.0


class Differentiable(Good):
    def __call__(self, tokens, signal):
        return replace(signal, weight=signal.weight * tokens.entropy.where(tokens.mask, 1.0))


class FirstCompletion(Good):
    def weight(self, tokens):
        return torch.ones_like(tokens.entropy).index_fill(0, torch.arange(min(1, len(tokens.entropy))), 0.5)


class InPlace(Good):
    def weight(self, tokens):
        return tokens.old_entropy.detach().clamp_(0, 0.5)


class NoPrecision(Good):
    def weight(self, tokens):
        return torch.full_like(tokens.entropy, 900.0 if tokens.entropy.dtype == torch.bfloat16 else 1.0).detach()


class DividesByNothing(Good):
    def weight(self, tokens):
        return tokens.mask.sum() / tokens.mask.sum() * torch.ones_like(tokens.entropy)

    def __call__(self, tokens, signal):
        return signal.shape(signal.advantages * self.weight(tokens))


class NeverActs(Good):
    def weight(self, tokens):
        return torch.ones_like(tokens.entropy).detach()


class WeighsInPlace(Good):
    def __call__(self, tokens, signal):
        signal.weight.mul_(0.5)
        return signal.log("weight", signal.weight, tokens.mask)


class LooksAtTheCurrentPolicy(Good):
    promises = frozenset({"recorded"})


class ComparesCompletions(Good):
    def weight(self, tokens):
        return (tokens.entropy.detach() / tokens.reduce.mean(tokens.entropy, "world").clamp(min=1e-6)).clamp(0, 1)


class WakesTheDead(Good):
    def __call__(self, tokens, signal):
        return signal.shape(tokens.advantages + 0.1 * tokens.entropy * tokens.mask)


class PenaltyWithoutGradient(Good):
    def __call__(self, tokens, signal):
        return signal.penalise("low", tokens.entropy.detach(), 0.1, tokens.mask)


class OtherScope(Good):
    def weight(self, tokens):
        return (tokens.entropy.detach() / tokens.reduce.mean(tokens.entropy, "micro").clamp(min=1e-6)).clamp(0, 1)


class SecretPenalty(Good):
    needs = frozenset({"entropy.grad"})

    def __call__(self, tokens, signal):
        return super().__call__(tokens, signal).penalise("secret", tokens.entropy, 0.1, tokens.mask)


class SecretMask(Good):
    def __call__(self, tokens, signal):
        return super().__call__(tokens, signal).drop(tokens.entropy.detach() < 0.5)


class SecretReading(Good):
    def weight(self, tokens):
        return super().weight(tokens) * tokens.old_logp.exp()


class OneRanksMean(Good):
    """Over this rank's tokens, and it says over the ranks': what the law of two ranks is there for."""

    def weight(self, tokens):
        entropy = tokens.entropy.detach()
        mean = (entropy * tokens.mask).sum() / tokens.mask.sum().clamp(min=1)
        return (entropy / mean.clamp(min=1e-6)).clamp(0, 1)


class SeriesOfOneRank(Good):
    def __call__(self, tokens, signal):
        one = torch.ones(())
        return replace(super().__call__(tokens, signal), metrics={"calls": Mean(one, one)})


class BestOfItsPrompt(Good):
    """Compares completions by notes: a method of the other kind that keeps all laws."""

    promises = frozenset()
    said = {"formula": [], "reads": ["reward"], "changes": ["keep"], "statistics": {"best": "group"}}

    def at_rollout(self, rollout):
        rewards = rollout.groups(rollout.reward)
        return {"worse": rollout.own(rewards < rewards.amax(1, keepdim=True))}

    def __call__(self, tokens, signal):
        return signal.drop(tokens.mask & tokens.noted["worse"].unsqueeze(1) & (self.power > 0))


class SilentOnGroups(BestOfItsPrompt):
    said = {**BestOfItsPrompt.said, "statistics": {}}


class OneRanksGroups(BestOfItsPrompt):
    def at_rollout(self, rollout):
        return {"worse": torch.arange(len(rollout.reward)) % 4 == 0}  # as if this rank had all completions


class Sharpens(Good):
    """Scales the logits of completions: the third kind."""

    needs = frozenset({"logit_scale"})
    said = {**Good.said, "changes": ["logit_scale"]}

    def scale(self, tokens):
        return (1 + self.weight(tokens)) ** self.power

    def weight(self, tokens):
        return super().weight(tokens) * self.power

    def __call__(self, tokens, signal):
        return signal.scale_logits(self.scale(tokens).where(tokens.mask, 1.0))


class SharpensPadding(Sharpens):
    def __call__(self, tokens, signal):
        return signal.scale_logits(torch.full_like(tokens.entropy, 2.0))


class SharpensAlways(Sharpens):
    def scale(self, tokens):
        return torch.full_like(tokens.entropy, 2.0)


class SharpensToNothing(Sharpens):
    def scale(self, tokens):
        return self.weight(tokens).clamp(max=0)


class SharpensInSecret(Sharpens):
    said = Good.said


class SharpensByItsRank(Sharpens):
    def scale(self, tokens):
        return 1 + (tokens.entropy.detach() * tokens.mask).sum() * torch.ones_like(tokens.entropy) * self.power


OTHER_KINDS = [
    ("names_the_scopes_it_uses", SilentOnGroups),
    ("two_ranks_are_one_process", OneRanksGroups),
    ("is_the_identity_at_neutral", SharpensAlways),
    ("leaves_padding_alone", SharpensPadding),
    ("gives_finite_weights_of_at_least_0", SharpensToNothing),
    ("changes_what_it_says", SharpensInSecret),
    ("treats_completions_alone_if_it_promises", SharpensByItsRank),
    ("two_ranks_are_one_process", SharpensByItsRank),
]

BROKEN = {
    "needs_and_promises_are_known": UnknownNeed,
    "is_the_identity_at_neutral": NoIdentity,
    "leaves_padding_alone": TouchesPadding,
    "does_not_read_padding": ReadsPadding,
    "gives_finite_weights_of_at_least_0": Negative,
    "lets_no_gradient_through": Differentiable,
    "does_not_care_for_the_order_of_completions": FirstCompletion,
    "does_not_change_the_batch": InPlace,
    "in_bf16_is_close_to_fp32": NoPrecision,
    "works_without_tokens": DividesByNothing,
    "touches_something": NeverActs,
    "as_a_shadow_changes_nothing": WeighsInPlace,
    "reads_only_the_record_if_it_promises": LooksAtTheCurrentPolicy,
    "treats_completions_alone_if_it_promises": ComparesCompletions,
    "gives_nothing_to_advantage_0_unless_it_says_so": WakesTheDead,
    "penalises_what_carries_gradient": PenaltyWithoutGradient,
    "names_the_scopes_it_uses": OtherScope,
    "has_the_denominator_and_penalties_it_says": SecretPenalty,
    "changes_what_it_says": SecretMask,
    "reads_what_it_says": SecretReading,
    "two_ranks_are_one_process": OneRanksMean,
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_a_law_holds_of_a_good_method_and_can_be_broken(law):
    law(Good)
    with pytest.raises(AssertionError) as broken:
        law(BROKEN[law.__name__])
    assert str(broken.value).strip()


@pytest.mark.parametrize("method", [BestOfItsPrompt, Sharpens])
def test_the_laws_hold_of_methods_that_compare_completions_or_scale_logits(method):
    for law in LAWS:
        law(method)


@pytest.mark.parametrize("law, method", OTHER_KINDS)
def test_they_break_the_laws_as_others_do(law, method):
    with pytest.raises(AssertionError):
        next(each for each in LAWS if each.__name__ == law)(method)


def test_who_replaces_advantages_need_not_have_an_identity():
    class Replaces(Good):
        neutral = None

    next(law for law in LAWS if law.__name__ == "is_the_identity_at_neutral")(Replaces)


def test_every_law_says_itself_in_one_sentence():
    assert len({law.__name__ for law in LAWS}) == len(LAWS) and all(law.__doc__ for law in LAWS)


def test_a_method_without_promises_and_explanation_is_measured_by_the_other_laws():
    class Plain:
        needs, neutral = frozenset(), {"power": 0.0}
        __init__, weight, __call__ = Good.__init__, Good.weight, Good.__call__

    for law in LAWS:
        law(Plain)


def test_what_a_rank_raises_is_raised_here():
    def fails(rank):
        raise ValueError(f"rank {rank} has an opinion")

    with pytest.raises(Exception, match="has an opinion"):
        two_ranks(fails)


def test_the_series_of_two_ranks_add_up_to_those_of_one():
    from rl.testing import two_ranks_are_one_process

    with pytest.raises(AssertionError, match="calls"):
        two_ranks_are_one_process(SeriesOfOneRank)


class Shapes(Good):
    """Also changes advantages, and says so."""

    said = {**Good.said, "reads": ["advantages", "entropy"], "changes": ["advantages"]}

    def __call__(self, tokens, signal):
        return signal.shape((signal.advantages * self.weight(tokens)).where(tokens.mask, signal.advantages))


class Replaces(Good):
    """The weights of whoever came before are lost."""

    def __call__(self, tokens, signal):
        return replace(signal, weight=self.weight(tokens).where(tokens.mask, 1.0))


class KeepsAgain(Good):
    def __call__(self, tokens, signal):
        return replace(super().__call__(tokens, signal), keep=tokens.mask)


class Drops(Good):
    said = {**Good.said, "changes": ["keep"]}

    def __call__(self, tokens, signal):
        return signal.drop(tokens.mask & (self.weight(tokens) < 0.5) & (self.power > 0))


class Penalises(Good):
    needs = frozenset({"entropy.grad"})
    said = {**Good.said, "changes": [], "statistics": {}, "penalties": {"bonus": (0.1, "all")}}

    def __call__(self, tokens, signal):
        return signal.penalise("bonus", -tokens.entropy, 0.1 * self.power, tokens.mask)


class PenalisesInstead(Penalises):
    def __call__(self, tokens, signal):
        return super().__call__(tokens, replace(signal, penalties=()))


class LooksAtTheMask(Good):
    """What an earlier method dropped counts less."""

    def __call__(self, tokens, signal):
        weight = self.weight(tokens) * torch.where(signal.keep | (self.power == 0), 1.0, 0.5)
        return signal.scale(weight.where(tokens.mask, 1.0))


@pytest.mark.parametrize("first", [Good, Shapes, Drops, Penalises])
@pytest.mark.parametrize("second", [Good, Shapes, Drops, Penalises])
def test_good_methods_compose(first, second):
    check_pair(first, second)


@pytest.mark.parametrize(
    "first, second, sentence",
    [
        (Good, Replaces, "weights are not multiplied"),
        (Drops, KeepsAgain, "is kept"),
        (Drops, LooksAtTheMask, "weights are not multiplied"),
        (Penalises, PenalisesInstead, "the penalties of the two are"),
    ],
)
def test_methods_that_keep_the_laws_alone_and_do_not_compose(first, second, sentence):
    for law in LAWS:
        law(second)
    with pytest.raises(AssertionError, match=sentence):
        check_pair(first, second)


def test_a_partner_that_is_not_neutral_is_found():
    with pytest.raises(AssertionError, match="changes its partner's loss"):
        check_pair(NoIdentity, Drops)
