"""ForkMask against the hand-computed example of the 80/20 paper's equation and of its official code's denominator."""

import pytest
import torch

from golden import close, tensor
from rl.contract import Signal
from rl.errors import ConfigError
from rl.plugins.fork_mask import ForkMask
from rl.plugins.windows import mean_ahead
from rl.testing import batch_from_logits, loss_from_signal

LOGITS = [
    [[2, 1, 0, -1], [0.5, 0.4, 0, 0], [4, 0, 0, -2]],
    [[1, 1, 0, -3], [3, 2, -1, -1], [0, 0, 0, 0]],
]
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
OLD_PROB = tensor([[0.60, 0.25, 0.97], [0.50, 0.27, 1.0]])


def example(temperature=1.0):
    logits = tensor(LOGITS).requires_grad_()
    ids = torch.tensor([[0, 1, 0], [1, 1, 0]])
    batch = batch_from_logits(logits, ids, MASK, tensor([1, -1]), temperature=temperature)
    return logits, batch.__class__(**{**vars_of(batch), "old_logp": OLD_PROB.log()})


def vars_of(batch):
    return {name: getattr(batch, name) for name in batch.__dataclass_fields__}


def run(**kwargs):
    logits, batch = example()
    signal = ForkMask(**kwargs)(batch, Signal.start(batch))
    return logits, batch, signal, loss_from_signal(batch, signal)


def test_entropies_and_losses_of_the_example():
    _, batch = example()
    close(
        batch.entropy,
        [[0.947536963975, 1.360711903682, 0.193687545729], [1.054572642142, 0.705940780417, 1.386294361120]],
    )
    close(loss_from_signal(batch, Signal.start(batch)), -0.28357822041454706)
    close(
        example(temperature=2.0)[1].entropy,
        [[1.245050427467, 1.379814965627, 0.801056369070], [1.217961796034, 1.079710527872, 1.386294361120]],
    )


@pytest.mark.parametrize("selector", ["quantile", "topk"])
def test_both_selectors_keep_the_two_most_uncertain_and_never_padding(selector):
    logits, batch, signal, loss = run(rho=0.4, selector=selector)
    assert signal.keep.tolist() == [[False, True, False], [True, False, False]]
    close(loss, -0.06453506595103313)
    loss.backward()
    close(logits.grad[0, 1], [0.074462313696, -0.164789666196, 0.045163676250, 0.045163676250])
    close(logits.grad[1, 0], [-0.070250286455, 0.097380601456, -0.025843636123, -0.001286678879])
    logits.grad[0, 1] = logits.grad[1, 0] = 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("selector", ["quantile", "topk"])
def test_official_denominator_is_the_kept_tokens(selector):
    close(run(rho=0.4, selector=selector, denominator="kept")[3], -0.16133766487758283)


@pytest.mark.parametrize("rho, threshold, kept", [(0.2, 1.1158004944503295, 1), (0.5, 0.9475369639754256, 3)])
def test_thresholds_of_other_fractions(rho, threshold, kept):
    _, batch = example()
    close(batch.reduce.quantile(batch.entropy, 1 - rho, "micro"), threshold)
    for selector in ("quantile", "topk"):
        assert run(rho=rho, selector=selector)[2].keep.sum() == kept


def test_selectors_differ_as_documented():
    """rho = 0.3 of n = 7: the code keeps ceil(2.1) = 3, the quantile 1 + floor(6 * 0.3) = 2."""
    logits = torch.zeros(1, 7, 3, dtype=torch.float64)
    logits[0, :, 0] = torch.arange(7)
    batch = batch_from_logits(logits, torch.zeros(1, 7), torch.ones(1, 7), tensor([1.0]))
    kept = {
        s: ForkMask(rho=0.3, selector=s)(batch, Signal.start(batch)).keep.sum().item() for s in ("topk", "quantile")
    }
    assert kept == {"topk": 3, "quantile": 2}


def test_low_keeps_the_complement():
    high, low = run(rho=0.4)[2].keep, run(rho=0.4, keep="low")[2].keep
    assert torch.equal(high ^ low, MASK.bool()) and not (high & low).any()


def test_response_scope_selects_within_each_completion():
    keep = run(rho=0.34, selector="topk", scope="response")[2].keep  # ceil(1.02) = 2 of 3, ceil(0.68) = 1 of 2
    assert keep.tolist() == [[True, True, False], [True, False, False]]
    assert run(rho=0.5, scope="response")[2].keep.tolist() == [[True, True, False], [True, False, False]]


def test_rollout_scope_takes_the_recorded_threshold():
    _, batch = example()
    pool = tensor([0.0, 1.0, 1.2, 1.3, 1.34])  # the rest of the rollout was more certain than nothing here but r0[1]
    batch = batch.__class__(**{**vars_of(batch), "rollout_entropy": pool})
    for selector in ("quantile", "topk"):
        signal = ForkMask(rho=0.2, selector=selector, scope="rollout")(batch, Signal.start(batch))
        assert signal.keep.tolist() == [[False, True, False], [False, False, False]]
    assert ForkMask(scope="rollout").needs == {"rollout_entropy"}


def test_empty_micro_batch_keeps_nothing_and_has_a_finite_loss():
    logits, batch = example()
    batch = batch.__class__(**{**vars_of(batch), "mask": torch.zeros_like(batch.mask)})
    for selector in ("quantile", "topk"):
        signal = ForkMask(selector=selector, denominator="kept")(batch, Signal.start(batch))
        assert not signal.keep.any()
        loss = loss_from_signal(batch, signal)
        assert loss.item() == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"window": -1},
        {"window": 2.5},
        {"window": 4, "scope": "rollout"},
        {"rho": 20},
        {"rho": 0},
        {"selector": "median"},
        {"scope": "batch"},
        {"denominator": "n"},
        {"keep": "mid"},
    ],
)
def test_refuses(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        ForkMask(**bad)


def test_needs_and_promises_say_whose_entropy_and_who_is_compared():
    assert not ForkMask().needs and not ForkMask().promises
    assert ForkMask(scope="response").promises == {"alone"}
    assert not ForkMask(scope="response", denominator="kept").promises
    assert ForkMask(policy="rollout", scope="rollout").promises == {"recorded", "alone"}
    assert ForkMask(policy="rollout", scope="rollout").needs == {"old_entropy", "rollout_entropy"}


def test_window_entropy_is_the_mean_of_the_next_tokens():
    entropy = tensor([[9, 1, 2, 3, 7, 100], [9, 1, 2, 3, 100, 100], [5, 4, 100, 100, 100, 100]])
    mask = torch.arange(6) < torch.tensor([5, 4, 2])[:, None]
    mean, full = mean_ahead(entropy, mask, 3)
    close(mean, [[2, 4, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0], [0] * 6])
    assert torch.equal(full, mean > 0)
    assert not mean_ahead(entropy, mask, 6)[1].any()


def test_window_steps_over_what_the_policy_did_not_write():
    entropy, mask = tensor([[9, 1, 100, 100, 3, 8]]), torch.tensor([[1, 1, 0, 0, 1, 1]]).bool()
    close(mean_ahead(entropy, mask, 2)[0], [[2, 5.5, 0, 0, 0, 0]])


def test_a_window_keeps_the_tokens_before_the_uncertain_ones():
    """Entropies 0.948, 1.361, 0.194 and 1.055, 0.706: with a window of one, each token has the next one's."""
    for selector in ("quantile", "topk"):
        assert run(rho=0.4, selector=selector, window=1)[2].keep.tolist() == [
            [True, False, False],
            [True, False, False],
        ]
