import pytest
import torch

from rl.contract import RunFacts, Signal
from rl.errors import ConfigError
from rl.pipeline import Pipeline
from rl.plugins.fork_mask import ForkMask
from rl.plugins.steer import Steer
from rl.testing import batch_from_logits, loss_from_signal


def tokens(seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(4, 5, 7, generator=g, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [3], [4], [0]])
    return batch_from_logits(logits, torch.zeros(4, 5), mask, torch.tensor([1.0, -1.0, 0.5, 1.0]).double())


class Constant:
    needs, neutral = frozenset(), {}

    def __init__(self, act, state=None):
        self.act, self.state = act, state

    def __call__(self, tokens, signal):
        return self.act(tokens, signal)

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state

    def check(self, run):
        return [] if run.on_policy else ["off-policy."]


def test_an_empty_pipeline_is_plain_grpo():
    batch = tokens()
    signal = Pipeline({})(batch)
    assert torch.equal(signal.effective, batch.advantages * batch.mask) and not signal.metrics and not signal.penalties


def test_masks_and_weights_compose_and_order_does_not_matter_to_them():
    batch = tokens()
    mask, steer = ForkMask(rho=0.5), Steer(w_min=0.5)
    a = Pipeline({"mask": mask, "steer": steer})(batch)
    b = Pipeline({"steer": steer, "mask": mask})(batch)
    alone = [Pipeline({"it": p})(batch) for p in (mask, steer)]
    assert torch.equal(a.effective, b.effective)
    assert torch.equal(a.keep, alone[0].keep) and torch.equal(a.weight, alone[1].weight)
    assert torch.allclose(loss_from_signal(batch, a), loss_from_signal(batch, b))


def test_advantages_are_shaped_in_order():
    batch = tokens()
    double = Constant(lambda t, s: s.shape(2 * s.advantages))
    add = Constant(lambda t, s: s.shape(s.advantages + 1))
    assert torch.equal(Pipeline({"a": double, "b": add})(batch).advantages, 2 * batch.advantages + 1)
    assert torch.equal(Pipeline({"b": add, "a": double})(batch).advantages, 2 * batch.advantages + 2)


def test_metrics_and_penalties_carry_the_plugins_name():
    batch = tokens()
    noisy = Constant(lambda t, s: s.log("x", t.entropy, t.mask).penalise("p", t.entropy, 0.1, t.mask))
    signal = Pipeline({"first": noisy, "second": noisy})(batch)
    assert [p.name for p in signal.penalties] == ["first/p", "second/p"]
    for name in ("first", "second"):
        mean = signal.metrics[f"plugin/{name}/x"]
        assert torch.allclose(mean.total / mean.count, batch.entropy[batch.mask].mean())


def audit(act, name="touched"):
    mean = Pipeline({"it": Constant(act)})(tokens()).metrics[f"plugin/it/{name}"]
    return (mean.total / mean.count).item()


def test_audit_counts_what_each_kind_of_act_touched():
    first_column = torch.zeros(4, 5, dtype=torch.bool)
    first_column[:, 0] = True  # three trainable tokens of twelve
    assert audit(lambda t, s: s) == 0
    assert audit(lambda t, s: s.drop(first_column)) == 3 / 12
    assert audit(lambda t, s: s.scale(torch.where(first_column, 0.5, 1.0))) == 3 / 12
    assert audit(lambda t, s: s.shape(torch.where(first_column, 9.0, s.advantages))) == 3 / 12
    assert audit(lambda t, s: s.penalise("p", t.entropy, 1.0, first_column & t.mask)) == 3 / 12
    assert audit(lambda t, s: s.penalise("p", t.entropy, 0.0, t.mask)) == 0
    assert audit(lambda t, s: s.scale(torch.full_like(s.weight, 0.5)), "adv_mass") == 0.5
    assert audit(lambda t, s: s.drop(first_column, torch.tensor(2.0)), "adv_mass") == pytest.approx(
        2 * (4 * 1 + 2 * 1 + 3 * 0.5) / (5 * 1 + 3 * 1 + 4 * 0.5)
    )


def test_unknown_promises_are_refused_and_a_promise_counts_when_all_give_it():
    a, b = Constant(None), Constant(None)
    assert Pipeline({}).promises == {"recorded", "alone"} and not Pipeline({"a": a}).promises
    a.promises, b.promises = frozenset({"alone", "recorded"}), frozenset({"alone"})
    assert Pipeline({"a": a, "b": b}).promises == {"alone"}
    a.promises = frozenset({"fast"})
    with pytest.raises(ConfigError, match="plugin.it promises .'fast'"):
        Pipeline({"it": a})


def test_unknown_needs_are_refused():
    plugin = Constant(lambda t, s: s)
    plugin.needs = frozenset({"logits"})
    with pytest.raises(ConfigError, match="plugin.it needs .'logits'"):
        Pipeline({"it": plugin})


def test_state_and_advice_go_through():
    plugin = Constant(lambda t, s: s, state={"coef": 3})
    pipeline = Pipeline({"it": plugin, "mask": ForkMask()})
    state = pipeline.state_dict()
    assert state == {"it": {"coef": 3}}
    pipeline.load_state_dict({"it": {"coef": 4}})
    assert plugin.state == {"coef": 4}
    facts = RunFacts(on_policy=False, loss_type="dapo", beta=0.0, micro_batch=2, world_size=1, group_size=8)
    assert pipeline.check(facts) == ["plugin.it: off-policy."]


def test_no_gradient_through_weights_even_if_a_plugin_forgets():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    batch = batch_from_logits(logits, torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2).double())
    signal = Signal.start(batch).scale(batch.entropy).shape(batch.logp)
    assert not signal.effective.requires_grad
