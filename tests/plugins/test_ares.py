"""Ares against the golden scores of its official code, and its thresholds, alphas and KL factors by hand."""

import math
from dataclasses import replace

import pytest
import torch

from golden import close, tensor
from rl.contract import Rollout, RunFacts, Signal
from rl.errors import ConfigError
from rl.plugins.ares import EASY, HARD, KINDS, MEDIUM, Ares, KlControl, entropy_score, kind_of
from rl.testing import batch_from_logits


def score(kind, right, delta, alpha=0.5, target=8.0):
    n = tensor([target + delta])
    return entropy_score(torch.tensor([kind]), torch.tensor([right]), n, tensor([target]), tensor([alpha]))[0]


@pytest.mark.parametrize(
    "kind, right, delta, expected",
    [
        (EASY, True, 4, -0.28125),
        (EASY, False, 4, 0.2406551665675745),
        (MEDIUM, True, -5, -0.15),
        (MEDIUM, False, 4, 0.275989792451045),
        (HARD, True, 4, 0.5436471023884373),
        (HARD, True, -6, -0.056470588235294134),
        (HARD, False, 4, 0.35921259606747125),
    ],
)
def test_scores_of_the_official_code(kind, right, delta, expected):
    close(score(kind, right, delta), expected)


def test_scores_are_bounded_and_punish_only_what_is_right():
    for kind in KINDS:
        cap = 0.5 * (1.2 if kind == HARD else 1)
        for delta in range(-40, 80):
            right, wrong = score(kind, True, delta), score(kind, False, delta)
            assert abs(right) <= cap and 0 < wrong <= cap
            assert right <= 0 or kind == HARD
            if kind != HARD and abs(delta) <= 1:
                assert right == 0


def test_the_kind_of_a_prompt_is_its_share_of_right_completions():
    right = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()
    assert kind_of(right).tolist() == [EASY, MEDIUM, HARD, EASY]


def rollout(entropy, reward, lengths=None, group_size=3):
    """Three completions a prompt; a window is one token, so that a token's window mean is the next one's entropy."""
    entropy = tensor(entropy)
    lengths = torch.full((len(entropy),), entropy.shape[1]) if lengths is None else torch.tensor(lengths)
    mask = torch.arange(entropy.shape[1]) < lengths[:, None]
    return Rollout(
        mask=mask, ids=mask, reward=tensor(reward), old_entropy=entropy, group_size=group_size, trained=group_size
    )


def test_windows_are_counted_against_the_median_of_quantiles():
    """95 % quantiles of the two windows: 0.95 of the way from the smaller to the larger; the middle one is 1.95."""
    seen = rollout([[9, 1, 2], [9, 3, 2], [9, 0, 1]], [1, 1, 0])
    plugin = Ares(window=1, kl_coef=0.0)
    notes = plugin.at_rollout(seen)
    assert plugin.threshold == pytest.approx(1.95)
    close(notes["windows"], [1, 2, 0])
    plugin.at_rollout(rollout([[9, 4, 4]] * 3, [1, 1, 0]))
    assert plugin.threshold == pytest.approx(0.99 * 1.95 + 0.01 * 4)


def test_a_rollout_without_a_whole_window_leaves_the_threshold():
    plugin = Ares(window=4, kl_coef=0.0)
    assert not plugin.at_rollout(rollout([[9, 1, 2]] * 3, [1, 1, 0]))["windows"].any() and plugin.threshold is None


def test_alpha_moves_by_what_rounding_leaves():
    """Windows 1, 2, 0 of an easy prompt: mean 1 is its target. 2, 1, 1 of a hard one: 4/3 is 1/3 more than its target."""
    easy = [[9, 1, 2], [9, 3, 2], [9, 0, 1]]
    hard = [[9, 2, 2], [9, 0, 2], [9, 2, 0]]
    plugin = Ares(window=1, kl_coef=0.0)
    notes = plugin.at_rollout(rollout(easy + hard, [1, 1, 0, 0, 0, 0]))
    close(notes["windows"], [1, 2, 0, 2, 1, 1])
    assert notes["kind"].tolist() == [EASY] * 3 + [HARD] * 3
    close(tensor(plugin.alpha), [0.5, 0.5, 0.5 - 0.05 / 3])


def test_advantages_are_those_of_reward_and_score():
    plugin = Ares(window=1, kl_coef=0.0)
    notes = plugin.at_rollout(rollout([[9, 1, 2], [9, 3, 2], [9, 0, 1]], [1, 1, 0]))
    expected = [score(EASY, right, n - 1, target=1.0) for right, n in ((True, 1), (True, 2), (False, 0))]
    close(notes["score"], torch.stack(expected).tolist())
    total = tensor([1, 1, 0]) + notes["score"]
    close(notes["advantage"], ((total - total.mean()) / (total.std() + 1e-4)).tolist())


def test_the_kl_of_easy_wrong_uncertain_completions_is_relaxed():
    """The first two are as uncertain, but right; the fourth exceeds the threshold by less than half a nat in sum."""
    entropy = [[9, 5, 5], [9, 5, 5], [9, 3, 0], [9, 5, 5], [9, 1, 1], [9, 1, 1], [9, 1, 1], [9, 1, 1], [9, 1, 1]]
    seen = rollout(entropy, [1] * 7 + [0, 0], group_size=9)
    seen = replace(seen, reward=tensor([1, 1, 0, 0, 1, 1, 1, 1, 1]))
    notes = Ares(window=1).at_rollout(seen)  # the median of the quantiles is 1
    close(notes["kl_factor"], [1, 1, 0.67, 0.67, 1, 1, 1, 1, 1])
    unsure = Ares(window=1)
    unsure.threshold = 4.9
    close(unsure.at_rollout(seen)["kl_factor"], [1, 1, 1, 1, 1, 1, 1, 1, 1])


def kl_batch(kl, kind, step):
    """One token a completion, with this KL."""
    size = len(kl)
    logits = torch.zeros(size, 1, 3, dtype=torch.float64)
    batch = batch_from_logits(logits, torch.zeros(size, 1), torch.ones(size, 1), torch.zeros(size).double(), step=step)
    return replace(batch, full_kl=tensor(kl).unsqueeze(1)), torch.tensor(kind).unsqueeze(1)


def test_kl_factors_follow_the_rule_of_the_code():
    """Target 0.01: a KL of 0.03 has e = 2, of 0.0101 is in the dead zone, 0.002 has e = -0.8."""
    control = KlControl(target=0.01, every=2)
    for step in range(5):  # after the fourth step two moves are over
        control.observe(*kl_batch([0.02, 0.04, 0.0101, 0.002], [EASY, EASY, MEDIUM, HARD], step))
    first, second = 0.03, 0.97 * 0.03 + 0.03  # averages of e, in units of e
    close(
        tensor(control.beta),
        [math.exp(0.05 * (2 * first + min(2 * second, 0.2))), 1.0, math.exp(0.05 * -0.8 * (first + second))],
    )


def test_a_factor_does_not_move_within_a_step():
    control = KlControl(target=0.01, every=1)
    for _ in range(3):
        control.observe(*kl_batch([0.5], [HARD], 0))
    assert control.beta == [1.0] * 3
    control.observe(*kl_batch([0.5], [HARD], 1))
    assert control.beta[HARD] > 1 and control.beta[:HARD] == [1.0] * 2


def test_the_anchor_is_weighed_by_kind_and_relaxation():
    batch, kind = kl_batch([0.3, 0.3, 0.3], [EASY, MEDIUM, HARD], 0)
    plugin = Ares(kl_coef=0.01)
    plugin.kl.beta = [1.0, 2.0, 3.0]
    notes = {"advantage": tensor([0, 0, 0]), "score": tensor([0, 0, 0]), "windows": tensor([0, 0, 0])}
    notes |= {"kind": kind[:, 0], "kl_factor": tensor([0.67, 1, 1])}
    batch = replace(batch, noted=notes)
    (penalty,) = plugin(batch, Signal.start(batch)).penalties
    close(penalty.mean(batch.mask), 0.3 * (0.67 + 2 + 3) / 3)
    assert penalty.coef == 0.01


def test_state_goes_on_where_it_was():
    whole = Ares(window=1, kl_every=1)
    seen = rollout([[9, 1, 2], [9, 3, 2], [9, 0, 1]], [1, 1, 0])
    whole.at_rollout(seen)
    whole.kl.observe(*kl_batch([0.5], [EASY], 0))
    again = Ares(window=1, kl_every=1)
    again.load_state_dict(whole.state_dict())
    for plugin in (whole, again):
        plugin.at_rollout(rollout([[9, 4, 2], [9, 3, 0], [9, 0, 1]], [0, 1, 0]))
        plugin.kl.observe(*kl_batch([0.1], [HARD], 1))
    first, second = whole.state_dict(), again.state_dict()
    assert torch.equal(first["kl"].pop("_sums"), second["kl"].pop("_sums")) and first == second


def test_it_says_when_the_kl_is_there_twice():
    facts = RunFacts(on_policy=True, loss_type="dapo", beta=0.04, micro_batch=8, world_size=1, group_size=8)
    assert "on top" in Ares().check(facts)[0] and not Ares(kl_coef=0.0).check(facts)


@pytest.mark.parametrize(
    "bad",
    [
        {"alpha": 2.5},
        {"alpha_step": -1.0},
        {"kl_coef": -0.1},
        {"kl_target": 0.0},
        {"window": 0},
        {"window": True},
        {"kl_every": 0.5},
    ],
)
def test_refuses(bad):
    with pytest.raises(ConfigError, match=f"plugin.ares.{next(iter(bad))}="):
        Ares(**bad)
