"""WReinforce against the example of the paper's code."""

import pytest
import torch

from golden import close, tensor
from rl.contract import Signal
from rl.errors import ConfigError
from rl.pipeline import Pipeline
from rl.plugins.w_reinforce import WReinforce
from rl.testing import batch_from_logits, loss_from_signal

MASK = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]])


def example(rewards=(1, 0, 1, 0), advantages=(0.5, -0.5, 0.5, -0.5)):
    logits = torch.zeros(4, 2, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(4, 2)
    return logits, batch_from_logits(logits, ids, MASK, tensor(advantages), reward=tensor(rewards))


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({}, [0.1, -1, 0.1, -1]),
        ({"positive": 1.0, "negative": 0.0}, [1, 0, 1, 0]),
        ({"positive": 0.0, "negative": 1.0}, [0, -1, 0, -1]),
    ],
    ids=["w_reinforce", "psr", "nsr"],
)
def test_advantages_of_the_example(kwargs, expected):
    _, batch = example()
    close(WReinforce(**kwargs)(batch, Signal.start(batch)).effective, (tensor(expected)[:, None] * MASK).tolist())


def test_loss_and_gradient_are_those_of_the_objective():
    """-1/N sum_t A d ln p: the mean over 7 tokens, of which 4 have 0.1 and 3 have -1; d ln p_0 / dz_0 = 1 - 1/3."""
    logits, batch = example()
    loss = loss_from_signal(batch, WReinforce()(batch, Signal.start(batch)))
    close(loss, -(4 * 0.1 - 3) / 7)
    loss.backward()
    close(logits.grad[0, 0], [-0.1 / 7 * 2 / 3, 0.1 / 7 / 3, 0.1 / 7 / 3])
    close(logits.grad[3, 1], [1 / 7 * 2 / 3, -1 / 7 / 3, -1 / 7 / 3])
    close(logits.grad[1, 1], [0, 0, 0])


def test_a_group_without_spread_is_trained_on():
    _, batch = example(rewards=(0, 0, 0, 0), advantages=(0, 0, 0, 0))
    pipeline = Pipeline({"w_reinforce": WReinforce()})
    signal = pipeline(batch)
    assert "zero_advantage" in pipeline.needs
    close(signal.effective[MASK.bool()], [-1] * 7)


def test_where_a_completion_begins_to_be_right():
    _, batch = example(rewards=(1.2, 0.9, 1.0, -1.0))
    effective = WReinforce(correct_from=1.0)(batch, Signal.start(batch)).effective
    close(effective[:, 0], [0.1, -1, 0.1, -1])


@pytest.mark.parametrize("bad", [{"positive": -0.1}, {"negative": -1.0}, {"positive": 0.0, "negative": 0.0}])
def test_refuses(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        WReinforce(**bad)
