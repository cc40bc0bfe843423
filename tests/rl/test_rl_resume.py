"""Stopped at any step and resumed is the same as never stopped: parameters and series, to the last bit."""


import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from transformers import TrainerCallback

from data import countdown
from rl.checkpoint import Checkpoints
from rl.contract import Mean
from rl.plugins.entropy_band import EntropyBand
from rl.plugins.fork_mask import ForkMask
from rl.rollout import NativeSampler
from tiny import EntropyTrainer, grpo_config, make_trainer, save_model

STEPS = 7


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


class Controller:
    """A method whose strength depends on all it has seen."""

    needs, neutral = frozenset(), {}

    def __init__(self):
        self.sum, self.seen = torch.zeros(()), 0

    def __call__(self, tokens, signal):
        self.sum, self.seen = self.sum + tokens.entropy.detach()[tokens.mask].mean(), self.seen + 1
        weight = (1 + self.sum / self.seen / 10).expand(tokens.mask.shape)
        strength = Mean(self.sum / self.seen, torch.ones(()))
        scaled = signal.scale(weight.where(tokens.mask, 1.0))
        return type(scaled)(**{**vars(scaled), "metrics": {"strength": strength}})

    def state_dict(self):
        return {"sum": self.sum, "seen": self.seen}

    def load_state_dict(self, state):
        self.sum, self.seen = state["sum"], state["seen"]


class Stop(TrainerCallback):
    """What a signal does: save, and leave at the end of this step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def rows(count=12):
    """Three rollouts an epoch."""
    return countdown.dataset("train", [3], count, seed=0)


def stream(count=12):
    return IterableDataset.from_generator(lambda: iter(rows(count)))


def build(model, folder, case, *, every=None, max_steps=STEPS, callbacks=(), keep_last=None, **changes):
    """A trainer with Adam, and the list its series go to."""
    lines = []

    def sink(step, metrics, histograms):
        same = {name: value for name, value in metrics.items() if not name.startswith("time/")}
        lines.append([step, same, histograms["entropy/hist"].counts])

    case = dict(case)
    extra = {"checkpoints": Checkpoints(folder, every=every, keep_last=keep_last), "sinks": [sink]}
    extra |= {"callbacks": list(callbacks)} | case.pop("extra", dict)()
    plugins, dropout, data = case.pop("plugins", dict)(), case.pop("dropout", False), case.pop("data", rows)()
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": max_steps, **case, **changes}
    trainer = make_trainer(EntropyTrainer, model, folder, plugins, data=data, extra=extra, **options)
    if dropout:
        for layer in trainer.model.model.layers:
            layer.self_attn.attention_dropout = 0.1
    return trainer, lines


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


TWICE = {"steps_per_generation": 4, "num_iterations": 2}  # 4 updates from a rollout, the half of them on stale ones
CASES = {
    "plain": {},
    "adapters": {"extra": lambda: {"peft_config": LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)}},
    "dropout, reference": {"dropout": True, "disable_dropout": False, "beta": 0.1},
    "twice": {**TWICE, "plugins": lambda: {"mask": ForkMask(rho=0.8, scope="rollout"), "control": Controller()}},
    "twice, native, reference": {
        **TWICE,
        "beta": 0.1,
        "extra": lambda: {"sampler": NativeSampler(countdown_config(), grpo_config("."))},
        "plugins": lambda: {"band": EntropyBand()},
    },
    "rollouts across updates": {"gradient_accumulation_steps": 3, "steps_per_generation": 2, "num_iterations": 2},
    "stream": {"data": stream},
    "stream, twice": {"data": stream, **TWICE},
}


def countdown_config():
    from transformers import Qwen3Config

    return Qwen3Config()


@pytest.mark.parametrize("name", CASES)
def test_going_on_from_any_step_is_never_having_stopped(model, tmp_path, name):
    straight, expected = build(model, tmp_path / "straight", CASES[name])
    straight.train()
    saving, lines = build(model, tmp_path / "saving", CASES[name], every=1)
    saving.train()
    assert lines == expected and len(lines) == STEPS  # saving changes nothing
    assert_equal(weights(saving), weights(straight))
    for step in range(1, STEPS):
        again, lines = build(model, tmp_path / "again", CASES[name])
        again.train(str(tmp_path / "saving" / f"checkpoint-{step}"))
        assert lines == expected[step:]
        assert_equal(weights(again), weights(straight))
