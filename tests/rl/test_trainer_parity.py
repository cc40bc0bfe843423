"""EntropyTrainer against stock TRL, up to rounding: parameters after real optimizer steps on real rollouts."""

import pytest

from rl.contract import Signal, TokenBatch
from rl.plugins.fork_mask import ForkMask
from tiny import EntropyTrainer, GRPOTrainer, assert_same, save_model, train

LOSSES = ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]

# on-policy: one update per rollout; off-policy: two updates on two halves, twice each
POLICIES = {"on": {}, "off": {"steps_per_generation": 4, "num_iterations": 2, "max_steps": 4}}
KL = {"no_kl": 0.0, "kl": 0.1}


class EntropyBonus:
    """TRL's ``entropy_coef`` as a penalty plug-in."""

    needs = frozenset({"entropy.grad"})
    neutral = {"coef": 0.0}

    def __init__(self, coef):
        self.coef = coef

    def __call__(self, tokens: TokenBatch, signal: Signal) -> Signal:
        return signal.penalise("bonus", -tokens.entropy, self.coef, tokens.mask)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("beta", KL.values(), ids=KL)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_no_plugin_is_trl(model, tmp_path, loss_type, policy, beta):
    changes = {"loss_type": loss_type, "beta": beta, **POLICIES[policy]}
    assert_same(train(GRPOTrainer, model, tmp_path, **changes), train(EntropyTrainer, model, tmp_path, **changes))


@pytest.mark.parametrize("beta", KL.values(), ids=KL)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_fork_mask_is_top_entropy_quantile(model, tmp_path, loss_type, policy, beta):
    changes = {"loss_type": loss_type, "beta": beta, **POLICIES[policy]}
    stock = train(GRPOTrainer, model, tmp_path, top_entropy_quantile=0.2, **changes)
    assert_same(stock, train(EntropyTrainer, model, tmp_path, {"fork_mask": ForkMask(rho=0.2)}, **changes))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_penalty_is_entropy_coef(model, tmp_path, loss_type, policy):
    changes = {"loss_type": loss_type, **POLICIES[policy]}
    stock = train(GRPOTrainer, model, tmp_path, entropy_coef=0.3, **changes)
    assert_same(stock, train(EntropyTrainer, model, tmp_path, {"bonus": EntropyBonus(0.3)}, **changes))


def test_the_comparison_can_fail(model, tmp_path):
    plain = train(GRPOTrainer, model, tmp_path)
    masked = train(EntropyTrainer, model, tmp_path, {"fork_mask": ForkMask(rho=0.5)})
    assert any((plain[n] - masked[n]).abs().max() > 1e-3 for n in plain)


def test_sequence_level_ratio_and_untied_head(tmp_path):
    model = save_model(tmp_path / "untied", tied=False)
    changes = {"importance_sampling_level": "sequence", "loss_type": "grpo", **POLICIES["off"]}
    stock = train(GRPOTrainer, model, tmp_path, top_entropy_quantile=0.2, **changes)
    assert_same(stock, train(EntropyTrainer, model, tmp_path, {"fork_mask": ForkMask(rho=0.2)}, **changes))
