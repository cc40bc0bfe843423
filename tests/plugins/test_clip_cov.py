"""ClipCov against the numbers of GOLDEN 8 and the released loss written out in plain torch."""

from dataclasses import replace

import pytest
import torch

from golden import close, tensor
from rl.contract import Signal
from rl.errors import ConfigError
from rl.plugins.clip_cov import ClipCov
from rl.testing import batch_from_logits, loss_from_signal

LOGP, OLD, A = [-0.1, -2, -0.5, -1.4, -0.05], [-0.2, -2.1, -0.4, -1.5, -0.07], [1, 1, -1, -1, 1]
WIDE = {"epsilon_low": 1.0, "epsilon_high": 1e6}  # nothing is clipped


def batch_of(logp, old, advantages, mask=None):
    """A batch whose sampled tokens have just these log-probabilities, under two words."""

    def logits(values):
        return torch.stack([values, (1 - values.exp()).log()], -1)

    logp, old = torch.atleast_2d(tensor(logp)).requires_grad_(), torch.atleast_2d(tensor(old))
    mask = torch.ones(logp.shape) if mask is None else torch.tensor(mask)
    ids = torch.zeros(logp.shape)
    return logp, batch_from_logits(logits(logp), ids, mask, torch.atleast_2d(tensor(advantages)), logits(old))


def random_batch(rows=40, columns=25, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, columns, 7, generator=g, dtype=torch.float64)
    old = logits + 0.4 * torch.randn(logits.shape, generator=g, dtype=torch.float64)
    ids = torch.randint(0, 7, (rows, columns), generator=g)
    mask = torch.arange(columns) < torch.randint(0, columns + 1, (rows,), generator=g)[:, None]
    return batch_from_logits(logits, ids, mask, torch.randn(rows, generator=g).double(), old)


def cov_of(batch, mask):
    a, logp = batch.advantages, batch.logp.detach()
    n = mask.sum()
    return (a - (a * mask).sum() / n) * (logp - (logp * mask).sum() / n)


def test_the_golden_loss():
    _, batch = batch_of(LOGP, OLD, A)
    close(cov_of(batch, batch.mask)[0], [0.568, -0.952, -0.372, 0.708, 0.608])
    signal = ClipCov(fraction=0.2, low=0.1, high=0.6, **WIDE)(batch, Signal.start(batch))
    assert (~signal.keep).nonzero().tolist() == [[0, 0]]
    close(loss_from_signal(batch, signal, 1.0, 1e6), -0.023072784398)


@pytest.mark.parametrize("clip", [(0.2, 0.28), (1.0, 1.0)])
def test_the_loss_is_the_released_one_for_the_tokens_that_were_drawn(clip):
    batch = random_batch()
    low, high = clip
    plugin = ClipCov(fraction=0.05, low=0.5, high=5.0, epsilon_low=low, epsilon_high=high)
    signal = plugin(batch, Signal.start(batch))
    dropped, mask, a = ~signal.keep & batch.mask, batch.mask, batch.advantages
    ratio = (batch.logp - batch.old_logp).exp()
    plain, clipped = -a * ratio, -a * ratio.clamp(1 - low, 1 + high)
    cov = cov_of(batch, mask).masked_fill(~mask | (clipped > plain), -torch.inf)
    candidates = (cov > 0.5) & (cov < 5.0)
    n = max(int(0.05 * mask.sum().item()), 1)
    assert 1 < n < candidates.sum() and int(dropped.sum()) == n and not (dropped & ~candidates).any()
    expected = (torch.maximum(plain, clipped) * ~dropped * mask).sum() / mask.sum()
    close(loss_from_signal(batch, signal, low, high), expected)


def test_fewer_candidates_than_asked_for_are_all_dropped():
    batch = random_batch()
    signal = ClipCov(fraction=1.0, low=1.0, **WIDE)(batch, Signal.start(batch))
    cov = cov_of(batch, batch.mask)
    assert torch.equal(~signal.keep & batch.mask, (cov > 1) & (cov < 5) & batch.mask)


def test_every_candidate_is_drawn_equally_often():
    """Over many steps: 10 of about 150 candidates, 600 times; a binomial's 5 sigma."""
    batch, plugin = random_batch(), ClipCov(fraction=0.02, low=0.5, **WIDE)
    cov = cov_of(batch, batch.mask)
    candidates, steps = (cov > 0.5) & (cov < 5) & batch.mask, 600
    times = sum(~plugin(b, Signal.start(b)).keep & b.mask for b in (replace(batch, step=s) for s in range(steps)))
    n = max(1, int(0.02 * batch.mask.sum().item()))
    p = n / candidates.sum().item()
    assert abs(times[candidates].double() - steps * p).max() < 5 * (steps * p * (1 - p)) ** 0.5
    assert int(times.sum()) == steps * n


def test_the_draw_uses_up_no_random_numbers_and_repeats():
    batch, before = random_batch(), torch.get_rng_state()
    first, again = (ClipCov(low=0.5)(batch, Signal.start(batch)).keep for _ in range(2))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [{"fraction": -0.1}, {"fraction": 2}, {"low": 5.0}, {"scope": "response"}])
def test_refuses(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        ClipCov(**bad)
