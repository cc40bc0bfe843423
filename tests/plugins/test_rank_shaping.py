"""RankShaping against hand-computed numbers of the paper's reward carried to RL."""

import pytest
import torch

from golden import close, tensor
from rl.contract import Signal
from rl.errors import ConfigError
from rl.plugins.rank_shaping import RankShaping
from rl.testing import batch_from_logits

LOGITS = [[2, 1, 0, -1, -2], [0.2, 1.5, 0.7, -0.5, 0], [0.1, 0, -0.3, 0.4, -1]]


def example():
    ids, advantages = torch.tensor([[0, 3, 2]]), tensor([[0.5, 0.5, -0.7]])
    return batch_from_logits(tensor([LOGITS]), ids, torch.ones(1, 3), advantages)


def test_probability_and_rank_of_the_sampled_tokens():
    batch = example()
    close(batch.logp.exp()[0], [0.636408646559, 0.065054837651, 0.157430197207])
    assert batch.rank[0].tolist() == [1, 5, 4]


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({"beta": -0.25}, [0.643897320237, 0.508479524775, -0.7]),
        ({"beta": 0.5}, [0.301492683759, 0.483462812000, -0.7]),
        ({"beta": 0, "lam_head": 0.1, "lam_tail": -0.1, "k": 2}, [0.5, 0.5, -0.8]),
        ({"beta": 0, "lam_head": 0.1, "lam_tail": -0.1, "k": 4}, [0.5, 0.5, -0.6]),
    ],
)
def test_shaped_advantages(kwargs, expected):
    batch = example()
    close(RankShaping(**kwargs)(batch, Signal.start(batch)).advantages[0], expected)


def test_groups_without_spread_are_not_shaped():
    batch = batch_from_logits(tensor([LOGITS]), torch.tensor([[0, 3, 2]]), torch.ones(1, 3), tensor([0.0]))
    shaped = RankShaping(beta=-0.25, lam_head=0.1, lam_tail=-0.1, k=2)(batch, Signal.start(batch)).advantages
    assert (shaped == 0).all()


def test_certain_token_stays_finite():
    batch = batch_from_logits(tensor([[[1000.0, 0]]]), torch.zeros(1, 1), torch.ones(1, 1), tensor([1.0]))
    close(RankShaping(beta=-0.25)(batch, Signal.start(batch)).advantages[0], [1e-6**-0.25])


def test_ties_share_the_best_rank():
    batch = batch_from_logits(tensor([[[1, 1, 0]]]), torch.tensor([[1]]), torch.ones(1, 1), tensor([1.0]))
    assert batch.rank.tolist() == [[1]]


@pytest.mark.parametrize("bad", [{"beta": -1}, {"k": -1}, {"k": 2.5}])
def test_refuses(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        RankShaping(**bad)
