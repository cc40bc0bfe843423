"""EntropyBonus against TRL's own, fixed and steered by a target, whole runs and over a resume."""

from dataclasses import replace

import pytest
import torch

from golden import close, tensor
from rl.contract import Signal
from rl.errors import ConfigError
from rl.plugins.entropy_bonus import EntropyBonus
from rl.testing import batch_from_logits, loss_from_signal
from tiny import EntropyTrainer, GRPOTrainer, assert_same, make_trainer, save_model, train

STEERED = {"target": 2.77, "delta": 0.1, "coef": 0.15, "coef_max": 0.3}
TWO_MICRO_BATCHES = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 6}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


def batch():
    logits = tensor([[[2, 1, 0], [0, 0, 0]], [[1, 0, 0], [5, 0, 0]]]).requires_grad_()
    mask = torch.tensor([[1, 1], [1, 0]])
    return logits, batch_from_logits(logits, torch.zeros(2, 2), mask, tensor([0.0, 0.0]))


def test_the_loss_is_minus_coef_times_the_mean_entropy():
    logits, tokens = batch()
    loss = loss_from_signal(tokens, EntropyBonus(coef=0.2)(tokens, Signal.start(tokens)))
    p = logits.softmax(-1)
    h = -(p * p.log()).sum(-1)
    close(loss, -0.2 * h[tokens.mask].mean())
    loss.backward()
    expected = 0.2 / 3 * p * (p.log() + h[..., None]) * tokens.mask[..., None]  # minus dH/dz
    close(logits.grad, expected.detach(), 1e-12)


def test_the_steering_by_hand():
    """The bonus waits for an update at or below the target, and c moves by delta within its range."""
    _, tokens = batch()
    plugin = EntropyBonus(target=1.0, delta=0.1, coef=0.15, coef_max=0.3)
    applied = []
    for step, entropies in enumerate([[1.5, 0.3], [0.5], [0.2, 0.4], [1.0], [3.0], [3.0], [3.0]]):
        for entropy in entropies:  # micro-batches
            seen = replace(tokens, step=step, entropy=torch.full_like(tokens.entropy, entropy))
            signal = plugin(seen, Signal.start(seen))
            applied.append(round(sum(p.coef for p in signal.penalties), 9))
            mean = signal.metrics["coef"]
            assert mean.total / mean.count == pytest.approx(applied[-1])
    # means of the updates: 0.9, 0.5, 0.3, 1.0, 3.0, 3.0, 3.0
    assert applied == [0.0, 0.0, 0.25, 0.3, 0.3, 0.3, 0.3, 0.0, 0.0]
    assert plugin.coef == pytest.approx(0.1)  # 0.3 after four updates, less two of 3.0; the last is under way


def test_a_fixed_bonus_is_trls(model, tmp_path):
    stock = train(GRPOTrainer, model, tmp_path, entropy_coef=0.3)
    assert_same(stock, train(EntropyTrainer, model, tmp_path, {"it": EntropyBonus(coef=0.3)}))


def test_a_steered_bonus_is_trls(model, tmp_path):
    stock = make_trainer(
        GRPOTrainer,
        model,
        tmp_path,
        use_adaptive_entropy=True,
        entropy_coef=STEERED["coef"],
        entropy_target=STEERED["target"],
        entropy_coef_delta=STEERED["delta"],
        entropy_coef_max=STEERED["coef_max"],
        **TWO_MICRO_BATCHES,
    )
    stock.train()
    applied, plugins = [], {"it": EntropyBonus(**STEERED)}
    sinks = {"sinks": [lambda step, metrics, histograms: applied.append(metrics["plugin/it/coef"])]}
    ours = make_trainer(EntropyTrainer, model, tmp_path, plugins, extra=sinks, **TWO_MICRO_BATCHES)
    ours.train()
    assert_same(*(dict(t.model.named_parameters()) for t in (stock, ours)))
    assert applied[0] == 0 and len(set(applied)) > 2 and applied.index(0, 1) < 5  # it rose, was left out, came back


def test_going_on_from_its_state_is_never_having_stopped():
    _, tokens = batch()

    def run(plugin, steps):
        found = []
        for step in steps:
            seen = replace(tokens, step=step, entropy=torch.full_like(tokens.entropy, [0.5, 3.0, 0.1][step % 3]))
            found.append(sum(p.coef for p in plugin(seen, Signal.start(seen)).penalties))
        return found

    straight = run(EntropyBonus(**STEERED), range(9))
    for stop in range(1, 9):
        first, again = EntropyBonus(**STEERED), EntropyBonus(**STEERED)
        before = run(first, range(stop))
        again.load_state_dict(first.state_dict())
        assert before + run(again, range(stop, 9)) == straight
    assert len(set(straight)) > 2


@pytest.mark.parametrize(
    "bad", [{"target": 0}, {"delta": -1}, {"coef": 2.0, "target": 0.2}, {"coef_min": 0.5, "target": 0.2}]
)
def test_refuses(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        EntropyBonus(**bad)
