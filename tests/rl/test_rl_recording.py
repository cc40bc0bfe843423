"""What is recorded of a rollout is what the policy of its name says, and recording leaves the training alone."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from data import countdown
from rl.plugins.fork_mask import ForkMask
from rl.plugins.rank_shaping import RankShaping
from rl.recorder import Recorder
from rl.rollout import NativeSampler
from tiny import EntropyTrainer, grpo_config, make_trainer, save_model

T = 0.7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


class Snapshots(TrainerCallback):
    """The weights before the first step and after each."""

    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights = [{n: p.detach().clone() for n, p in model.state_dict().items()}]

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append({n: p.detach().clone() for n, p in model.state_dict().items()})


def recorded(model, folder, plugins=None, *, max_rows=8, every=1, alternatives=5, sampler=False, **changes):
    """Train, recording; returns the weights at each step and the trainer."""
    seen, options = Snapshots(), {"temperature": T, "max_steps": 4, **changes}
    recorder = Recorder(folder / "rollouts", every=every, max_rows=max_rows, alternatives=alternatives)
    extra = {"recorder": recorder, "callbacks": [seen]}
    if sampler:
        extra["sampler"] = NativeSampler(Qwen3Config(), grpo_config(folder, temperature=T))
    trainer = make_trainer(EntropyTrainer, model, folder, plugins, extra=extra, **options)
    trainer.train()
    return seen.weights, trainer


def step_of(folder, step):
    return pd.read_parquet(folder / "rollouts" / f"step_{step:06d}.parquet")


def distribution(policy, row):
    """(T, V) logp of every word in each place of a recorded completion, from plain logits."""
    prompt = countdown.tokenizer()(row.prompt)["input_ids"]
    with torch.no_grad():
        logits = policy(torch.tensor([[*prompt, *row.token_ids.tolist()]])).logits[0, len(prompt) - 1 : -1]
    return (logits / T).log_softmax(-1)


# two updates on different halves of each rollout, twice
TWICE = {"steps_per_generation": 4, "num_iterations": 2}
CASES = {
    "first update": ({}, lambda step: step - 1),
    "stale": (TWICE, lambda step: 4 * ((step - 1) // 4)),
    "ahead": ({"plugins": {"mask": ForkMask(rho=0.3, policy="rollout")}, "sampler": True}, lambda step: step - 1),
    "ranks": ({"plugins": {"rank": RankShaping(lam_tail=-0.1, k=3)}, **TWICE}, lambda step: 4 * ((step - 1) // 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_each_column_is_of_the_policy_it_says(model, tmp_path, name):
    changes, rollout_of = CASES[name]
    weights, _ = recorded(model, tmp_path, max_steps=5, **changes)
    policies = [Qwen3ForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in weights]
    for policy, values in zip(policies, weights, strict=True):
        policy.load_state_dict(values)
    for step in range(1, 6):
        frame = step_of(tmp_path, step)
        assert 4 <= len(frame) <= 8
        for row in frame.itertuples():
            ids = torch.tensor(row.token_ids)[:, None]
            drawn, loss, after = (distribution(policies[s], row) for s in (rollout_of(step), step - 1, step))

            def logp(of, ids=ids):
                return pytest.approx(of.gather(-1, ids).squeeze(-1).numpy(), abs=2e-5)

            assert row.old_logp == logp(drawn) and row.logp == logp(loss) and row.logp_after == logp(after)
            top = drawn.topk(5)
            assert np.stack(row.top_probs) == pytest.approx(top.values.exp().numpy(), abs=1e-5)
            assert np.stack(row.top_ids).tolist() == top.indices.tolist()
            assert row.rank.tolist() == ((drawn > drawn.gather(-1, ids)).sum(-1) + 1).tolist()
            words = [[countdown.tokenizer().decode([i]) for i in each] for each in top.indices.tolist()]
            assert [list(each) for each in row.top_tokens] == words
    moved = [abs(row.logp_after - row.logp).max() for row in step_of(tmp_path, 5).itertuples() if row.advantage]
    assert max(moved) > 1e-3  # or the test could not tell the policies apart


def rows_looked_at(trainer):
    """What the model is called on in evaluation mode from now on: rows of each call."""
    calls = []

    def keep(module, args, kwargs):
        if not module.training and kwargs.get("labels") is not None:
            calls.append(len(kwargs["input_ids"]))

    trainer.model.register_forward_pre_hook(keep, with_kwargs=True)
    return calls


@pytest.mark.parametrize("max_rows, rows", [(4, [4, 4]), (5, [8, 5]), (99, [8, 8, 8, 8])])
def test_only_what_is_recorded_is_looked_at_and_only_where_it_is_due(model, tmp_path, max_rows, rows):
    """Whole groups before the shuffle, as one cannot say whose text comes first; micro-batches are of 8."""
    recorder = Recorder(tmp_path / "rollouts", every=3, max_rows=max_rows)
    trainer = make_trainer(EntropyTrainer, model, tmp_path, max_steps=4, extra={"recorder": recorder})
    calls = rows_looked_at(trainer)
    trainer.train()
    assert calls == rows * 2  # steps 1 and 3
    assert len(step_of(tmp_path, 3)) == min(16, max_rows)


def test_a_rollout_for_several_updates_is_looked_at_once_and_shared_by_them(model, tmp_path):
    """Each of two updates gets half of the 32 completions: of the first 8 each has its part."""
    weights, trainer = recorded(model, tmp_path, max_rows=4, max_steps=2, steps_per_generation=4)
    first, second = step_of(tmp_path, 1), step_of(tmp_path, 2)
    assert set(first["group"]) | set(second["group"]) <= {0, 1}
    assert 4 <= len(first) + len(second) <= 8 and max(len(first), len(second)) <= 4


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_checkpointing": True},
        {"plugins": {"mask": ForkMask(rho=0.3, policy="rollout")}, "sampler": True},
        {"mask_truncated_completions": True, "max_completion_length": 4},
    ],
    ids=["checkpointing", "ahead", "truncated"],
)
def test_recording_changes_nothing(model, tmp_path, changes):
    plain, _ = recorded(model, tmp_path / "plain", every=0, **changes)
    seen, _ = recorded(model, tmp_path / "seen", every=1, **changes)
    assert not (tmp_path / "plain" / "rollouts").exists() and len(list((tmp_path / "seen" / "rollouts").iterdir())) == 4
    for before, after in zip(plain, seen, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_completion_without_a_trainable_token_is_a_row_of_empty_lists(model, tmp_path):
    recorded(model, tmp_path, max_rows=16, mask_truncated_completions=True, max_completion_length=4)
    frame = pd.concat(step_of(tmp_path, step) for step in range(1, 5))
    empty = frame[frame["token_ids"].map(len) == 0]
    assert 0 < len(empty) <= len(frame)
    for column in ("entropy", "logp", "old_logp", "logp_after", "rank", "kept", "top_ids", "top_probs"):
        assert (empty[column].map(len) == 0).all() and (frame[column].map(len) == frame["token_ids"].map(len)).all()


def test_without_alternatives_there_are_ranks_all_the_same(model, tmp_path):
    recorded(model, tmp_path, alternatives=0, max_steps=1)
    frame = step_of(tmp_path, 1)
    assert {"rank", "old_logp", "logp_after"} <= set(frame) and not [c for c in frame if c.startswith("top_")]
