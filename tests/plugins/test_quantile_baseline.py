"""QuantileBaseline against hand-computed groups, and its notes on their way through a training."""

from dataclasses import replace

import pytest
import torch

from golden import close, tensor
from rl.contract import Rollout, Signal
from rl.errors import ConfigError
from rl.plugins.quantile_baseline import QuantileBaseline
from rl.testing import batch_from_logits, rollout_of

EASY, HARD = [1.0, 1, 0, 1, 1], [0.0, 0, 1, 0, 0]  # solved by 4 of 5 and by 1 of 5
SPREAD = 0.2**0.5 + 1e-4  # sample deviation of both: sqrt((4 * 0.04 + 0.64) / 4)


@pytest.mark.parametrize("form", ["code", "paper"])
def test_hard_prompts_train_their_successes_and_easy_ones_their_failures(form):
    close(
        QuantileBaseline(form=form).advantages(tensor([EASY, HARD])),
        [[0, 0, -1 / SPREAD, 0, 0], [0, 0, 1 / SPREAD, 0, 0]],
    )


def test_where_code_and_paper_part():
    """Three wrong of eight: place 0.4 * 7 = 2.8 lies between the third 0 and the first 1, and 3/8 < 0.4 <= 4/8."""
    rewards = tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    spread = rewards.std() + 1e-4
    close(QuantileBaseline().advantages(rewards) * spread, [[-0.8] * 3 + [0.2] * 5])
    close(QuantileBaseline(form="paper").advantages(rewards) * spread, [[-1] * 3 + [0] * 5])


@pytest.mark.parametrize("k, size, last_hard", [(0.3, 10, 7), (0.28, 25, 18)])  # 0.28 * 25 is a little more than 7
def test_the_regimes_of_the_paper_change_at_one_minus_k(k, size, last_hard):
    for right in range(size + 1):
        rewards = tensor([[1] * right + [0] * (size - right)])
        found = QuantileBaseline(quantile=k, form="paper").advantages(rewards)
        assert (found >= 0).all() if right <= last_hard else (found <= 0).all()


def test_equal_rewards_have_no_advantage():
    assert not QuantileBaseline().advantages(torch.ones(2, 4)).any()


def test_the_middle_of_a_group_may_get_an_advantage_where_grpo_gives_none():
    rewards = tensor([[0, 0.5, 1]])
    assert QuantileBaseline().advantages(rewards)[0, 1] > 0 and "zero_advantage" in QuantileBaseline.needs


def test_notes_reach_the_loss_and_only_trainable_tokens():
    mask = torch.tensor([[1, 1], [1, 0]] * 5)
    rewards = tensor(EASY + HARD)
    batch = batch_from_logits(
        torch.zeros(10, 2, 3).double(), torch.zeros(10, 2), mask, tensor([0.3] * 10), reward=rewards
    )
    plugin = QuantileBaseline()
    batch = replace(batch, noted=plugin.at_rollout(rollout_of(batch, group_size=5)))
    signal = plugin(batch, Signal.start(batch))
    expected = tensor([0, 0, -1 / SPREAD, 0, 0, 0, 0, 1 / SPREAD, 0, 0])
    close(signal.effective, (expected[:, None] * mask).tolist())
    assert signal.metrics["trained"] == (3, 15)  # rows 2 and 7 have 2 tokens and 1


def test_mere_votes_are_no_part_of_the_group():
    """Of five completions the first three are trained on: rewards 1, 1, 0 have the 0.4-quantile 0.8."""
    mask = torch.ones(5, 1).bool()
    rollout = Rollout(mask=mask, ids=mask, reward=tensor([1, 1, 0, 9, 9]), old_entropy=None, group_size=5, trained=3)
    spread = tensor([1, 1, 0]).std() + 1e-4
    close(QuantileBaseline().at_rollout(rollout)["advantage"] * spread, [0.2, 0.2, -0.8, 0, 0])


@pytest.mark.parametrize("bad", [{"quantile": 0}, {"quantile": 40}, {"form": "theorem"}])
def test_refuses(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        QuantileBaseline(**bad)
