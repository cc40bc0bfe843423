"""Steer against hand-computed numbers of the released code's formulas."""

import pytest
import torch

from golden import close, tensor
from rl.contract import Signal
from rl.errors import ConfigError
from rl.plugins.steer import Steer
from rl.testing import batch_from_logits, loss_from_signal

OLD = [
    [[2, 1, 0, -1, -1], [0.5, 0.4, 0, 0, -0.5], [4, 0, 0, -2, -3]],
    [[1, 1, 0, -3, 0], [3, 2, -1, -1, 0], [0, 0, 0, 0, 0]],
]
SHIFT = [0.10, -0.05, 0, 0.05, 0.02]
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def example():
    old = tensor(OLD)
    logits = (old + tensor(SHIFT)).requires_grad_()
    ids = torch.tensor([[0, 1, 0], [1, 4, 2]])
    return logits, batch_from_logits(logits, ids, MASK, tensor([1.2, -0.8]), old_logits=old)


def weights(**kwargs):
    logits, batch = example()
    signal = Steer(**kwargs)(batch, Signal.start(batch))
    return logits, batch, signal, signal.weight[MASK.bool()]


def test_omega_of_code_and_theorem():
    _, batch = example()
    omega = {form: Steer(form=form).omega(batch, batch.advantages)[MASK.bool()] for form in ("code", "theorem")}
    close(omega["code"], [0.274582632134, 0.107386878789, 0.006850963246, -0.108622836347, 1.921049323669])
    close(omega["theorem"], [0.179183368092, 0.025779567951, 0.006615857330, -0.036655160779, 0.063218217855])


def test_theorem_is_zero_where_ppo_clips():
    _, batch = example()
    free, tight = Steer(form="theorem"), Steer(form="theorem", epsilon_low=0.02, epsilon_high=0.02)
    assert (free.omega(batch, batch.advantages)[MASK.bool()] != 0).all()
    # ratios 1.046 (A > 0) and 0.929, 0.961 (A < 0) leave [0.98, 1.02]; 0.925 with A > 0 is not on the clipped side
    assert (tight.omega(batch, batch.advantages)[MASK.bool()] == 0).tolist() == [True, False, False, True, True]


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({"w_min": 0.7}, [0.950296859881, 0.980259280365, 0.998728812708, 0.980034360002, 0.7]),
        ({"w_min": 0.8}, [0.968608545074, 0.987603724496, 0.999204528415, 0.987461949081, 0.8]),
        (
            {"w_min": 0.7, "w_max": 1.3, "mapping": "asymmetric"},
            [0.950296859881, 0.980259280365, 0.998728812708, 1.020372387758, 0.7],
        ),
        (
            {"w_min": 0.8, "w_max": 1.2, "mapping": "linear"},
            [1.144053516203, 1.178991536589, 1.2, 1.178733265015, 0.8],
        ),
    ],
)
def test_weights(kwargs, expected):
    close(weights(**kwargs)[3], expected)


def test_loss_and_gradient():
    logits, batch, signal, _ = weights(w_min=0.7)
    close(loss_from_signal(batch, Signal.start(batch)), -0.41151566710295945)
    loss = loss_from_signal(batch, signal)
    close(loss, -0.44346044158535014)
    loss.backward()
    close(logits.grad[0, 0], [-0.082878798013, 0.049289845980, 0.019062405480, 0.007372214205, 0.007154332348])
    close(logits.grad[0, 1], [0.067066223121, -0.165342180765, 0.036806723638, 0.038693844712, 0.022775389294])
    close(logits.grad[0, 2], [-0.008261287264, 0.003664782437, 0.003852679850, 0.000548136449, 0.000195688528])
    close(logits.grad[1, 0], [-0.057135906817, 0.096553339520, -0.019018891220, -0.000995443174, -0.019403098309])
    close(logits.grad[1, 1], [-0.077088444435, -0.024409036002, -0.001277561767, -0.001343063759, 0.104118105963])
    _, batch, signal, _ = weights(mapping="linear", w_min=0.8, w_max=1.2)
    close(loss_from_signal(batch, signal), -0.5397950011629674)


def test_omega_predicts_the_entropy_change_of_its_own_logit():
    """When only z_a moves by eta (1 - p_a), dH = -eta Omega(theorem) to first order."""
    logits, eta = tensor([2, 1, 0, -1, -1]), 1e-4
    for a in range(5):
        batch = batch_from_logits(logits[None, None], torch.tensor([[a]]), torch.ones(1, 1), tensor([1.0]))
        moved = logits.clone()
        moved[a] += eta * (1 - logits.softmax(-1)[a])
        after = batch_from_logits(moved[None, None], torch.tensor([[a]]), torch.ones(1, 1), tensor([1.0]))
        predicted = -eta * Steer(form="theorem").omega(batch, batch.advantages)
        measured = after.entropy - batch.entropy
        assert (predicted - measured).abs().item() < 1e-3 * measured.abs().item()


def test_no_advantage_no_steering():
    old = tensor(OLD)
    ids = torch.tensor([[0, 1, 0], [1, 4, 2]])
    batch = batch_from_logits(old, ids, MASK, tensor([0.0, 0.0]))
    assert (Steer()(batch, Signal.start(batch)).weight == 1).all()
    linear = Steer(mapping="linear", w_min=0.8, w_max=1.0)(batch, Signal.start(batch)).weight
    close(linear[MASK.bool()], [0.9] * 5)


def test_exponential_weights_ignore_the_scale_of_the_advantage():
    old = tensor(OLD)
    ids = torch.tensor([[0, 1, 0], [1, 4, 2]])
    first, second = (
        Steer()(batch, Signal.start(batch)).weight
        for batch in (batch_from_logits(old, ids, MASK, c * tensor([1.2, -0.8])) for c in (1, 3))
    )
    close(first, second.tolist(), 1e-12)


@pytest.mark.parametrize(
    "bad", [{"w_min": 0}, {"w_min": 1.5}, {"w_max": 0.1}, {"mapping": "cubic"}, {"form": "v9"}, {"scope": "rollout"}]
)
def test_refuses(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Steer(**bad)
