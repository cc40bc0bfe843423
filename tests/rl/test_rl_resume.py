"""Stopped at any step and resumed is the same as never stopped: parameters, series and records, to the last bit."""

import resource
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3Config, TrainerCallback

from data import countdown
from rl import resume
from rl.checkpoint import Checkpoints, newest_good, rewind
from rl.contract import Mean
from rl.dynamics import Dynamics
from rl.errors import CheckpointError, ConfigError, SaveError
from rl.plugins.entropy_band import EntropyBand
from rl.plugins.entropy_bonus import EntropyBonus
from rl.plugins.fork_mask import ForkMask
from rl.probes import Probes
from rl.recorder import Recorder
from rl.resume import read_state, write_state
from rl.rollout import NativeSampler
from tiny import EntropyTrainer, grpo_config, make_trainer, save_model

STEPS = 6


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


def rows(count=8):
    """Two rollouts an epoch: six steps are three epochs."""
    return countdown.dataset("train", [3], count, seed=0)


def stream():
    return IterableDataset.from_generator(lambda: iter(rows()))


def build(model, folder, case, *, every=None, max_steps=STEPS, callbacks=(), keep_last=None, record=None, **changes):
    """A trainer with Adam, which may record and probe every step, and the list its series go to."""
    lines = []

    def sink(step, metrics, histograms):
        same = {name: value for name, value in metrics.items() if not name.startswith("time/")}
        lines.append([step, same, histograms["entropy/hist"].counts])

    case = dict(case)
    extra = {"checkpoints": Checkpoints(folder, every=every, keep_last=keep_last), "sinks": [sink]}
    extra |= {"recorder": Recorder(record / "rollouts", every=1, max_rows=9)} if record else {}
    extra |= {"callbacks": list(callbacks)} | case.pop("extra", dict)()
    plugins, dropout, data = case.pop("plugins", dict)(), case.pop("dropout", False), case.pop("data", rows)()
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": max_steps, **case, **changes}
    trainer = make_trainer(EntropyTrainer, model, folder, plugins, data=data, extra=extra, **options)
    if dropout:
        for layer in trainer.model.model.layers:
            layer.self_attn.attention_dropout = 0.1
    if record:
        problems = countdown.dataset("heldout", [3], 2, seed=0).to_list()
        trainer.add_callback(Probes(trainer, record / "probes", problems, grade, every=1, seed=5))
    return trainer, lines


def grade(prompts, completions, **columns):
    return [float(len(c) % 2) for c in completions]


def records(folder):
    """Every recorded file by its name."""
    found = {path.name: pd.read_parquet(path) for path in sorted((folder / "rollouts").glob("step_*"))}
    return found | {f"probe {path.name}": pd.read_parquet(path) for path in sorted((folder / "probes").glob("step_*"))}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


TWICE = {"steps_per_generation": 4, "num_iterations": 2}  # four updates on a rollout, three of them on a stale one
ADAPTIVE = {"use_adaptive_entropy": True, "entropy_target": 1.0, "entropy_coef": 0.01}
CASES = {
    "plain": {},
    "adapters": {"extra": lambda: {"peft_config": LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)}},
    "dropout, reference": {"dropout": True, "disable_dropout": False, "beta": 0.1, **ADAPTIVE},
    "twice": {**TWICE, "plugins": lambda: {"mask": ForkMask(rho=0.8, scope="rollout"), "control": Controller()}},
    "twice, native, reference": {
        **TWICE,
        "beta": 0.1,
        "extra": lambda: {"sampler": NativeSampler(Qwen3Config(), grpo_config("."))},
        "plugins": lambda: {"band": EntropyBand()},
    },
    # an epoch of 8 micro-steps: updates of 5 and 3
    "rollouts across updates": {"gradient_accumulation_steps": 5, "steps_per_generation": 2, "num_iterations": 2},
    "stream": {"data": stream},
    "stream, twice, steered": {
        "data": stream,
        **TWICE,
        "plugins": lambda: {"bonus": EntropyBonus(target=2.75, coef=0.2, delta=0.1)},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_going_on_from_any_step_is_never_having_stopped(model, tmp_path, name):
    straight, expected = build(model, tmp_path / "straight", CASES[name])
    straight.train()
    saving, lines = build(model, tmp_path / "saving", CASES[name], every=1, record=tmp_path)
    saving.train()
    assert lines == expected and len(lines) == STEPS  # saving and recording change nothing
    assert_equal(weights(saving), weights(straight))
    recorded = records(tmp_path)
    assert len(recorded) == 2 * STEPS + 1
    for step in range(1, STEPS):
        rewind(tmp_path, step)
        again, lines = build(model, tmp_path / "again", CASES[name], record=tmp_path)
        again.train(str(tmp_path / "saving" / f"checkpoint-{step}"))
        assert lines == expected[step:]
        assert_equal(weights(again), weights(straight))
        found = records(tmp_path)
        assert found.keys() == recorded.keys()
        for file, frame in found.items():
            pd.testing.assert_frame_equal(frame, recorded[file], check_exact=True)


@pytest.mark.parametrize("step", [2, 3])
def test_a_log_never_averages_across_a_checkpoint(model, tmp_path, step):
    case = {"logging_steps": 2}
    straight, expected = build(model, tmp_path / "straight", case, every=step)
    straight.train()
    stopped, first = build(model, tmp_path / "run", case, callbacks=[Stop(step)])
    stopped.train()
    assert stopped.state.global_step == step
    again, second = build(model, tmp_path / "run", case, every=step)
    again.train(str(newest_good(tmp_path / "run")))
    assert first + second == expected and [line[0] for line in expected] == sorted({2, 4, 6, step, 2 * step})
    assert_equal(weights(again), weights(straight))


def test_a_run_at_its_end_trains_no_step_more(model, tmp_path):
    done, _ = build(model, tmp_path, {}, every=3, max_steps=3)  # in the middle of an epoch
    done.train()
    state = torch.get_rng_state()
    again, lines = build(model, tmp_path, {}, every=3, max_steps=3)
    again.train(str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3 and not lines
    assert_equal(weights(again), weights(done))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_warm_starts_quantile_goes_on(model, tmp_path):
    def case(dynamics):
        return {"extra": lambda: {"dynamics": dynamics}, "plugins": lambda: {"mask": ForkMask(rho=1.0)}}

    first, lines = build(model, tmp_path, case(Dynamics(0.5)), every=2, max_steps=2)
    first.train()
    again, after = build(model, tmp_path, case(Dynamics(None)), max_steps=3)
    again.train(str(tmp_path / "checkpoint-2"))
    assert all("entropy/above_reference_p80" in line[1] for line in lines + after)


def test_a_checkpoint_is_a_model(model, tmp_path):
    trainer, _ = build(model, tmp_path / "whole", {}, every=1, max_steps=1)
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-1")
    assert_equal(dict(loaded.named_parameters()), weights(trainer))
    trainer, _ = build(model, tmp_path / "adapters", CASES["adapters"], every=1, max_steps=1)
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapters" / "checkpoint-1")
    ours = {n.removeprefix("base_model.model."): p for n, p in weights(trainer).items() if "lora_" in n}
    assert_equal({n: p for n, p in loaded.named_parameters() if "lora_" in n}, ours)
    for path in (tmp_path / "whole", tmp_path / "adapters"):
        assert [each.name for each in path.iterdir()] == ["checkpoint-1"]
        assert not (path / "checkpoint-1" / "training_args.bin").exists()


@contextmanager
def disk_full_after(size):
    """Writes fail in the operating system once a file is longer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [2_000, 70_000, 150_000])  # the configuration, the weights, the optimizer
def test_a_full_disk_is_said_and_leaves_the_checkpoint_before(model, tmp_path, size):
    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    trainer, _ = build(model, tmp_path, {}, every=1, callbacks=[Full()], keep_last=1)
    with (
        disk_full_after(resource.RLIM_INFINITY),
        pytest.raises(SaveError, match="checkpoint-2 could not be written: .+"),
    ):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert newest_good(tmp_path) == tmp_path / "checkpoint-1"


def test_a_rank_that_wrote_elsewhere_is_noticed(model, tmp_path, monkeypatch):
    trainer, _ = build(model, tmp_path, {}, every=1)
    monkeypatch.setattr(resume, "world_size", lambda: 2)
    with pytest.raises(
        SaveError, match=r"files of ranks \[1\] did not arrive. Put run.dir on a file system that all nodes"
    ):
        trainer.train()
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_the_checkpoint_is_refused(model, tmp_path):
    build(model, tmp_path, {}, every=1, max_steps=1)[0].train()
    path = tmp_path / "checkpoint-1"
    for case, message in [
        ({"num_generations": 8}, "written with trainer.num_generations=4, now it is 8"),
        ({"data": lambda: rows(12)}, "written with number of training problems=8, now it is 12"),
        ({"data": stream}, "written with number of training problems=8, now it is None"),
        ({"plugins": lambda: {"mask": ForkMask(rho=0.2)}}, r"written with plugin=\[\], now it is \['mask'\]"),
    ]:
        with pytest.raises(ConfigError, match=f"{message}.*set it back, or .* model.path={path}"):
            build(model, tmp_path, case)[0].train(str(path))
    trainer, _ = build(model, tmp_path, {})
    with pytest.raises(CheckpointError, match="holds no entrl.json"):
        trainer.train(str(model))
    manifest = path / "entrl.json"
    manifest.write_text(manifest.read_text().replace('"processes": 1', '"processes": 4'))
    with pytest.raises(ConfigError, match="was written by 4 processes, now there is 1"):
        trainer.train(str(path))


def test_a_reference_model_that_moves_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="sync_ref_model=true moves a reference model"):
        build(model, tmp_path, {"beta": 0.1, "sync_ref_model": True}, every=1)
    build(model, tmp_path, {"beta": 0.1, "sync_ref_model": True})


def test_an_engine_that_draws_gets_the_weights_anew(model, tmp_path):
    trainer, _ = build(model, tmp_path, {}, every=1, max_steps=1)
    trainer.train()
    trainer.use_vllm, trainer._last_loaded_step = True, 1
    trainer._restore(read_state(tmp_path / "checkpoint-1", 0, torch.device("cpu")))
    assert trainer._last_loaded_step == -1


def test_a_state_comes_back_bit_for_bit_without_pickle(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    state = {
        "micro_step": 3,
        "rollout": [
            {"ids": whole[:2, 1:], "mask": whole > 5, "n": torch.tensor(7), "images": [1, 2]},
            {"ids": whole[2:]},
        ],
        "half": torch.tensor([0.1, float("nan"), float("inf")], dtype=torch.bfloat16),
        "empty": torch.zeros(0),
        "plugins": {
            "a": {"mean": 0.1, "none": None, "on": True, "nested": {"list": [1.5, "x"], "bound": float("inf")}}
        },
    }
    write_state(tmp_path, 3, state)
    assert [path.name for path in tmp_path.iterdir()] == ["entrl_state_3.safetensors"]
    back = read_state(tmp_path, 3, torch.device("cpu"))
    for left, right in [
        *zip(state["rollout"][0].values(), back["rollout"][0].values(), strict=True),
        (state["rollout"][1]["ids"], back["rollout"][1]["ids"]),
        (state["empty"], back["empty"]),
        (state["half"].view(torch.int16), back["half"].view(torch.int16)),
    ]:
        assert (
            torch.equal(left, right) and left.dtype == right.dtype if isinstance(left, torch.Tensor) else left == right
        )
    assert back["plugins"] == state["plugins"] and back["micro_step"] == 3
    write_state(tmp_path, 0, {"none": None})
    assert read_state(tmp_path, 0, torch.device("cpu")) == {"none": None}


@pytest.mark.parametrize("value", [{1, 2}, {1: 2}, object()])
def test_a_state_of_something_else_is_refused_with_its_place(tmp_path, value):
    with pytest.raises(ConfigError, match="state/plugins/mine/seen is a .* state_dict.. may give tensors"):
        write_state(tmp_path, 0, {"plugins": {"mine": {"seen": value}}})
