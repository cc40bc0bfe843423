"""KlCov against the numbers of GOLDEN 8 and the released loss written out in plain torch."""

import pytest
import torch

from golden import close, tensor
from rl.contract import RunFacts, Signal
from rl.errors import ConfigError
from rl.plugins.kl_cov import KlCov
from rl.testing import batch_from_logits, loss_from_signal

LOGP, OLD, A = [-0.1, -2, -0.5, -1.4, -0.05], [-0.2, -2.1, -0.4, -1.5, -0.07], [1, 1, -1, -1, 1]
NO_CLIP = (1.0, 1e6)  # epsilon, epsilon_high


def logits_of(logp):
    """Two words, of which the first has this log-probability."""
    return torch.stack([logp, (1 - logp.exp()).log()], -1)


def test_the_golden_loss():
    batch = batch_from_logits(
        logits_of(tensor([LOGP])), torch.zeros(1, 5), torch.ones(1, 5), tensor([A]), logits_of(tensor([OLD]))
    )
    signal = KlCov(fraction=2e-4)(batch, Signal.start(batch))
    assert signal.penalties[0].where.nonzero().tolist() == [[0, 3]]
    close(signal.metrics["cov"].total, 0.708)
    close(loss_from_signal(batch, signal, *NO_CLIP), -0.224106968013)


def test_loss_and_gradient_are_the_released_ones():
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(30, 20, 7, generator=g, dtype=torch.float64)).requires_grad_()
    old = logits.detach() + 0.4 * torch.randn(logits.shape, generator=g, dtype=torch.float64)
    ids = torch.randint(0, 7, (30, 20), generator=g)
    mask = torch.arange(20) < torch.randint(0, 21, (30,), generator=g)[:, None]
    batch = batch_from_logits(logits, ids, mask, torch.randn(30, generator=g).double(), old)
    ours = loss_from_signal(batch, KlCov(fraction=0.05, coef=0.7)(batch, Signal.start(batch)), *NO_CLIP)

    a, logp = batch.advantages[mask], batch.logp[mask]
    cov = (a - a.mean()) * (logp.detach() - logp.detach().mean())
    largest = cov.topk(max(1, int(len(cov) * 0.05))).indices
    log_ratio = logp - batch.old_logp[mask]
    losses = -a * log_ratio.exp()
    with_kl = losses + 0.7 * log_ratio.abs()
    theirs = losses.index_put((largest,), with_kl[largest]).mean()
    close(ours, theirs)
    close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)), 1e-12)
    assert len(largest) > 10


def test_it_says_that_it_does_nothing_on_policy():
    facts = {"loss_type": "dapo", "beta": 0.0, "micro_batch": 8, "world_size": 1, "group_size": 8}
    assert "steps_per_generation" in KlCov().check(RunFacts(on_policy=True, **facts))[0]
    assert KlCov().check(RunFacts(on_policy=False, **facts)) == []


@pytest.mark.parametrize("bad", [{"fraction": -0.1}, {"fraction": 2}, {"coef": -1}, {"scope": "rollout"}])
def test_refuses(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        KlCov(**bad)
