"""TargetEntropy: the controller's rule step by step, and a training that it holds on a schedule."""

import math

import pytest
import torch

from golden import close, tensor
from rl.contract import Signal
from rl.errors import ConfigError
from rl.plugins.target_entropy import TargetEntropy
from rl.testing import batch_from_logits, loss_from_signal


def batch(logits, step, mask=((1, 1), (1, 0))):
    """Four equal logits have ln 4 = 1.386 nats; a first one of 3 leaves 0.531."""
    shape = torch.tensor(mask).shape
    logits = tensor(logits).expand(*shape, 4).clone().requires_grad_()
    return logits, batch_from_logits(logits, torch.zeros(shape), torch.tensor(mask), torch.zeros(2).double(), step=step)


def step(plugin, at, logits=(0, 0, 0, 0)):
    """The coefficient that acts in a step."""
    _, tokens = batch(logits, at)
    penalties = plugin(tokens, Signal.start(tokens)).penalties
    return penalties[0].coef if penalties else 0.0


LOW, HIGH = (3, 0, 0, 0), (0, 0, 0, 0)


def test_the_rule_of_skywork():
    """c rises by 0.1 after a step below 1 nat and falls after one above, not below 0; it acts only after one below."""
    plugin = TargetEntropy(target=1.0, coef=0.1, delta=0.1, coef_max=0.25)
    acting = [step(plugin, i, logits) for i, logits in enumerate([LOW, LOW, LOW, HIGH, HIGH, LOW, HIGH])]
    close(tensor(acting), [0.1, 0.2, 0.25, 0.25, 0.0, 0.0, 0.15])
    assert plugin.coef == pytest.approx(0.15)  # 0.25 - 0.1 after step 3, 0.05 after 4, 0.15 after 5


def test_a_negative_bound_pushes_down_too():
    plugin = TargetEntropy(target=1.0, coef=0.0, delta=0.1, coef_min=-0.3)
    acting = [step(plugin, i, logits) for i, logits in enumerate([HIGH, HIGH, HIGH, LOW, LOW])]
    close(tensor(acting), [0.0, -0.1, -0.2, -0.3, 0.0])


def test_the_mean_is_of_all_micro_batches_of_a_step():
    plugin = TargetEntropy()
    for logits, mask in ((LOW, ((1, 1), (1, 1))), (HIGH, ((1, 0), (0, 0)))):
        _, tokens = batch(logits, 0, mask)
        plugin(tokens, Signal.start(tokens))
    low = batch(LOW, 0)[1].entropy[0, 0].item()
    step(plugin, 1)
    assert plugin.last == pytest.approx((4 * low + math.log(4)) / 5)
    assert TargetEntropy().coef == plugin.coef + 0.005


def test_the_bonus_raises_entropy():
    """L = -c mean H: with dH/dz_b = -p_b (ln p_b + H), over 3 tokens."""
    logits, tokens = batch(LOW, 0)
    loss_from_signal(tokens, TargetEntropy(target=1.0, coef=0.3)(tokens, Signal.start(tokens))).backward()
    p = tensor(LOW).softmax(-1)
    close(logits.grad[0, 0], (0.3 / 3 * p * (p.log() + tokens.entropy[0, 0])).tolist())
    close(logits.grad[1, 1], [0, 0, 0, 0])


def test_the_target_moves_along_its_points():
    plugin = TargetEntropy(target=[[10, 0.6], [20, 0.2], [30, 0.4]])
    close(tensor([plugin.target(s) for s in (0, 10, 15, 20, 25, 99)]), [0.6, 0.6, 0.4, 0.2, 0.3, 0.4])
    assert TargetEntropy(target=0.3).target(77) == 0.3


def test_it_holds_the_entropy_of_a_policy_that_would_collapse():
    """One softmax whose best token is rewarded: without the bonus its entropy falls to nothing, with it follows the target."""

    def train(plugin, steps=400):
        z, path = torch.zeros(4, dtype=torch.float64), []
        for i in range(steps):
            logits = z.expand(1, 1, 4).clone().requires_grad_()
            tokens = batch_from_logits(logits, torch.zeros(1, 1), torch.ones(1, 1), tensor([1.0]), step=i)
            signal = Signal.start(tokens) if plugin is None else plugin(tokens, Signal.start(tokens))
            loss_from_signal(tokens, signal).backward()
            z, path = z - 0.2 * logits.grad.sum((0, 1)), [*path, tokens.entropy.item()]
        return path

    assert train(None)[-1] < 0.15
    path = train(TargetEntropy(target=[[0, 1.0], [200, 0.6]], delta=0.05, coef_min=-1.0, coef_max=10.0))
    assert path[100] == pytest.approx(0.8, abs=0.15) and sum(path[300:]) / 100 == pytest.approx(0.6, abs=0.1)


def test_the_state_goes_on_in_the_middle_of_a_step():
    whole, cut = (TargetEntropy(target=1.0, coef=0.1, delta=0.1) for _ in range(2))
    for i, logits in enumerate([LOW, HIGH]):
        step(whole, i, logits), step(cut, i, logits)
    again = TargetEntropy(target=1.0, coef=0.1, delta=0.1)
    again.load_state_dict(cut.state_dict())
    assert [step(whole, 2), step(whole, 3)] == [step(again, 2), step(again, 3)]
    assert again.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    "bad",
    [
        {"target": -0.1},
        {"target": True},
        {"target": []},
        {"target": "0.3"},
        {"target": [0.6, 0.3]},
        {"target": [[0, 0.6], [0, 0.3]]},
        {"target": [[0, -0.6]]},
        {"delta": -0.1},
        {"coef": 2.0},
    ],
)
def test_refuses(bad):
    with pytest.raises(ConfigError, match=f"plugin.target_entropy.{next(iter(bad))}"):
        TargetEntropy(**bad)
