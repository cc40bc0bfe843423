"""EntropyAdvantage against hand-computed numbers of the paper's formula."""

from dataclasses import replace

import pytest
import torch

from golden import close, tensor
from rl.contract import Signal
from rl.errors import ConfigError
from rl.plugins.entropy_advantage import EntropyAdvantage
from rl.testing import batch_from_logits


def shaped(advantages, entropy, **kwargs):
    n = len(advantages)
    batch = batch_from_logits(tensor([[[0, 0]] * n]), torch.zeros(1, n), torch.ones(1, n), tensor([advantages]))
    batch = replace(batch, entropy=tensor([entropy]))
    return EntropyAdvantage(**kwargs)(batch, Signal.start(batch)).advantages[0]


def test_the_golden_advantages():
    a, h = [1, 1, -0.5, -0.5], [2, 0.1, 0.5, 1]
    close(shaped(a, h) - tensor(a), [0.5, 0.04, 0.2, 0.25])
    close(shaped(a, h), [1.5, 1.04, -0.3, -0.25])
    close(shaped(a, h, alpha=0.1, kappa=4.0), [1.2, 1.01, -0.45, -0.4])


def test_no_sign_changes_and_no_advantage_stays_none():
    a = [2.0, -2.0, 0.0, -1e-6]
    close(shaped(a, [100.0] * 4, alpha=9.0).sign(), [1, -1, 0, -1])


@pytest.mark.parametrize("bad", [{"alpha": -0.1}, {"kappa": 1.0}, {"kappa": 0}])
def test_refuses(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        EntropyAdvantage(**bad)
