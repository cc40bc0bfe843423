"""The didactic script against the trainer: the same completions give the same parameters, after AdamW, clipping and warm-up."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rewards.countdown import solved
from rl import build
from rl.config import compose
from rl.paths import find_model
from rl.pipeline import Pipeline
from rl.plugins.fork_mask import ForkMask
from rl.trainer import EntropyTrainer

SCRIPT = Path(__file__).parents[1] / "scripts" / "minimal_grpo.py"
STEPS = 3
CLIP = 0.03  # the gradient's norm is about 0.06 here, and the default of 1 would never act


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal_grpo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


class Recorded(EntropyTrainer):
    """Keeps the problems, completions and advantages of every rollout, in the order of the groups."""

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        self.rollouts.append((inputs, out))
        return out


def embedded():
    folder = find_model("builtin:countdown")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The default configuration's trainer after three steps: its rollouts, and its parameters."""
    cfg = compose([f"trainer.max_steps={STEPS}", f"trainer.max_grad_norm={CLIP}", "rollout=hf", "data.train.count=256"])
    trainer = Recorded(
        model=embedded(),
        reward_funcs=[solved],
        args=build.grpo_config(cfg, str(tmp_path_factory.mktemp("run")), [1.0]),
        train_dataset=build.make("data.train", cfg.data.train),
        processing_class=AutoTokenizer.from_pretrained(find_model("builtin:countdown")),
        pipeline=Pipeline({"fork_mask": ForkMask(rho=cfg.plugin.fork_mask.rho)}),
    )
    trainer.rollouts = []
    trainer.train()
    return trainer.rollouts, parameters(trainer.model)


def follow(minimal, rollouts, settings):
    """The script's parameters after its updates on these rollouts."""
    model = embedded().eval()
    learner = minimal.Learner(model, settings)
    tokenizer = AutoTokenizer.from_pretrained(minimal.EMBEDDED)
    for rows, out in rollouts:
        texts = tokenizer.batch_decode(out["completion_ids"], skip_special_tokens=True)
        advantages = minimal.advantages_of(minimal.rewards_of(rows, texts), settings.group)
        torch.testing.assert_close(advantages, out["advantages"], rtol=0, atol=1e-5)
        drawn = [out[key] for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
        learner.update(minimal.Rollout(*drawn), advantages)
    return parameters(model)


def furthest(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_three_updates_end_where_the_trainers_do(minimal, trained):
    rollouts, after = trained
    assert len(rollouts) == STEPS and furthest(after, parameters(embedded())) > 1e-4
    ours = follow(minimal, rollouts, minimal.Settings(max_grad_norm=CLIP))
    assert furthest(ours, after) < 5e-7  # 6e-8 seen; a step moves them by about 2e-4


@pytest.mark.parametrize(
    "other", [{"rho": 1.0}, {"rho": 0.25}, {"warmup": 4}, {"max_grad_norm": 1.0}, {"betas": (0.9, 0.999)}], ids=str
)
def test_with_another_setting_they_do_not(minimal, trained, other):
    rollouts, after = trained
    settings = replace(minimal.Settings(max_grad_norm=CLIP), **other)
    assert furthest(follow(minimal, rollouts, settings), after) > 2e-6


def test_the_defaults_are_those_of_the_configuration(minimal):
    cfg, s = compose(["rollout=hf"]), minimal.Settings()
    t = cfg.trainer
    assert (s.prompts * s.group, s.group) == (t.per_device_train_batch_size, t.num_generations)
    assert (s.max_tokens, s.temperature, s.steps, s.seed) == (
        t.max_completion_length,
        t.temperature,
        t.max_steps,
        cfg.seed,
    )
    assert (s.epsilon_low, s.epsilon_high, s.rho) == (t.epsilon, t.epsilon_high, cfg.plugin.fork_mask.rho)
    assert (s.learning_rate, s.warmup, s.max_grad_norm) == (t.learning_rate, t.warmup_steps, t.max_grad_norm)
    assert s.betas == (t.adam_beta1, t.adam_beta2) and t.weight_decay == 0


def test_what_it_draws_ends_with_its_end_of_text(minimal):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minimal.EMBEDDED)
    drawn = minimal.sample(embedded(), tokenizer, ["2 9 3 8 > 22 :", "1 2 > 3 :"], 8, minimal.Settings())
    assert len(drawn.completion) == 16 and drawn.prompt_mask[-1].sum() == 5
    for ids, mask in zip(drawn.completion, drawn.mask, strict=True):
        inside, outside = ids[mask.bool()], ids[~mask.bool()]
        assert not (inside[:-1] == tokenizer.eos_token_id).any() and (outside == tokenizer.pad_token_id).all()
        assert inside[-1] == tokenizer.eos_token_id or mask.all()


def test_it_stays_short_and_shows_all_of_it():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 300 and "import trl" not in text and "from rl" not in text
